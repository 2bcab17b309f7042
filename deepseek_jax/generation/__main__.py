"""python -m deepseek_jax.generation --checkpoint=<folder> --prompt=<text> | --interactive

Streams a completion to stdout, or holds a chat. Notes and errors go to stderr.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from deepseek_jax import cli
from deepseek_jax.data.tokenizers import StreamDecoder, Tokenizer, check_vocabulary, load_tokenizer
from deepseek_jax.errors import DataError
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.generation.stream import Chat, stream
from deepseek_jax.interop import import_folder
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.precision import RECIPES, FP8Recipe, recipe
from deepseek_jax.training.checkpoints import load_variables


def main(argv: Sequence[str]) -> None:
    flags = _parser().parse_args(argv)
    tokenizer = load_tokenizer(flags.tokenizer or _own_tokenizer(flags.checkpoint))
    sampling = SamplingConfig(
        max_new_tokens=flags.max_new_tokens,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
    )
    precision = recipe(flags.precision)
    if _is_hugging_face(flags.checkpoint):
        config, variables = import_folder(flags.checkpoint, "fp8" if isinstance(precision, FP8Recipe) else "float32")
    else:
        config, variables = load_variables(flags.checkpoint)
    check_vocabulary(tokenizer, config.vocab_size)
    model, variables = Transformer(config, precision), jax.device_put(variables)
    rng = jax.random.key(flags.seed)

    def completion(prompt_ids: Sequence[int], turn: int) -> Iterator[list[int]]:
        return stream(model, variables, prompt_ids, jax.random.fold_in(rng, turn), sampling)

    if flags.interactive:
        _chat(tokenizer, completion)
        return
    prompt_ids = Chat(tokenizer).ask(flags.prompt) if flags.chat else tokenizer.encode(flags.prompt, bos=True)
    ids: list[int] = []
    _print_stream(tokenizer, completion(prompt_ids, 0), ids)
    if ids[-1] != tokenizer.eos_id:
        print(f"stopped after --max_new_tokens={flags.max_new_tokens}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("deepseek_jax.generation", "Streams text from a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a stage's folder, one checkpoint in it, or a Hugging Face folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument("--interactive", action="store_true", help="chat; end with an empty line or Ctrl-D")
    parser.add_argument("--chat", action="store_true", help="pass --prompt as a user's question instead of text to continue")
    parser.add_argument("--tokenizer", help="'byte', a tokenizer.json or its folder; by default the checkpoint's own, else 'byte'")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.95, help="1 is off")
    parser.add_argument("--top_k", type=int, default=0, help="0 is off")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="per answer")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--precision", choices=tuple(RECIPES), default="float32", help="number format of the products")
    return parser


def _is_hugging_face(checkpoint: Path) -> bool:
    """A config.json without a checkpoint of ours beside it (an import keeps both)."""
    return (checkpoint / "config.json").is_file() and not (checkpoint / "checkpoints").is_dir()


def _own_tokenizer(checkpoint: Path) -> str:
    if (checkpoint / "tokenizer.json").is_file():
        return str(checkpoint)
    if _is_hugging_face(checkpoint):
        raise DataError(f"{checkpoint} has no tokenizer.json: say which tokenizer the model was trained with, --tokenizer=<folder>")
    return "byte"


def _print_stream(tokenizer: Tokenizer, chunks: Iterator[list[int]], ids: list[int]) -> None:
    """Prints a completion as it is made and collects its ids, so that they are there even if Ctrl-C ends it."""
    decoder = StreamDecoder(tokenizer)
    try:
        for chunk in chunks:
            ids += chunk
            print(decoder.push(chunk), end="", flush=True)
    finally:
        print(decoder.flush(), flush=True)


def _chat(tokenizer: Tokenizer, completion) -> None:
    chat, turn = Chat(tokenizer), 0
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text:
            return
        ids: list[int] = []
        try:
            _print_stream(tokenizer, completion(chat.ask(text), turn), ids)
        except KeyboardInterrupt:  # ends the answer, not the chat
            pass
        chat.answer(ids)
        turn += 1


if __name__ == "__main__":
    cli.run(main)
