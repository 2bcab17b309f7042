"""python -m deepseek_jax.generation --checkpoint=<folder> --prompt=<text> | --interactive

Streams a completion to stdout, or holds a chat. Notes and errors go to stderr.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from deepseek_jax import cli
from deepseek_jax.data.tokenizer_files import find_tokenizer, is_run
from deepseek_jax.data.tokenizers import StreamDecoder, Tokenizer, check_vocabulary, load_tokenizer
from deepseek_jax.errors import NumericsError
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.generation.stream import Chat, stream
from deepseek_jax.interop import import_folder, precision_for
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.precision import PRECISIONS, FP8Precision, get_precision
from deepseek_jax.training.checkpoints import load_variables, resolve_checkpoint

Completion = Callable[[Sequence[int], int], Iterator[list[int]]]  # ids of a prompt, number of the turn -> chunks of ids


def main(argv: Sequence[str]) -> int:
    flags = _parser().parse_args(argv)
    hugging_face = _is_hugging_face(flags.checkpoint)
    checkpoint = flags.checkpoint if hugging_face else resolve_checkpoint(flags.checkpoint)
    tokenizer = load_tokenizer(flags.tokenizer or find_tokenizer(checkpoint))
    sampling = SamplingConfig(
        max_new_tokens=flags.max_new_tokens,
        eos_id=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
    )
    precision = get_precision(flags.precision, "--precision")
    if hugging_face:
        precision = precision_for(checkpoint, precision)
        config, variables = import_folder(checkpoint, "fp8" if isinstance(precision, FP8Precision) else "float32")
    else:
        config, variables = load_variables(checkpoint)
    check_vocabulary(tokenizer, config.vocab_size)
    ops = Ops(precision, RuntimeConfig(attention_chunk=512))  # a long prompt holds no whole matrix of scores
    model, variables = Transformer(config, ops), jax.device_put(variables)
    rng = jax.random.key(flags.seed)

    def completion(prompt_ids: Sequence[int], turn: int) -> Iterator[list[int]]:
        return stream(model, variables, prompt_ids, jax.random.fold_in(rng, turn), sampling)

    try:
        return _chat(tokenizer, completion) if flags.interactive else _complete(tokenizer, completion, flags)
    except NumericsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _complete(tokenizer: Tokenizer, completion: Completion, flags: argparse.Namespace) -> int:
    """Prints the completion of --prompt; returns 1 if it has no text."""
    prompt_ids = Chat(tokenizer).ask(flags.prompt) if flags.chat else tokenizer.encode(flags.prompt, bos=True)
    ids: list[int] = []
    text = _print_stream(tokenizer, completion(prompt_ids, 0), ids)
    if not (ids and ids[-1] in tokenizer.stop_ids):
        print(f"stopped after --max_new_tokens={flags.max_new_tokens}", file=sys.stderr)
    if not text.strip():
        return _say_that_nothing_came(tokenizer, ids)
    return 0


def _say_that_nothing_came(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    words = [i for i in ids if i not in tokenizer.stop_ids]
    how = f"the {len(words)} tokens of the answer show nothing" if words else "the model ended its answer at once"
    print(f"no text came: {how}; was it trained on prompts like this one, with or without --chat?", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("deepseek_jax.generation", "Streams text from a checkpoint.")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a stage's or a run's folder, one checkpoint, or a Hugging Face folder",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument("--interactive", action="store_true", help="chat; end with an empty line or Ctrl-D")
    parser.add_argument(
        "--chat", action="store_true", help="pass --prompt as a user's question instead of text to continue"
    )
    parser.add_argument("--tokenizer", help="'byte', a tokenizer.json or its folder; by default the checkpoint's own")
    parser.add_argument("--temperature", type=cli.number(least=0), default=0.6, help="0 is greedy")
    parser.add_argument("--top_p", type=cli.number(above=0, most=1), default=0.95, help="1 is off")
    parser.add_argument("--top_k", type=cli.number(int, least=0), default=0, help="0 is off")
    parser.add_argument("--max_new_tokens", type=cli.number(int, least=1), default=512, help="per answer")
    parser.add_argument("--seed", type=cli.number(int, least=0, most=2**32 - 1), default=0, help="of the sampling")
    parser.add_argument(
        "--precision",
        default="float32",
        help=f"number format of the products: {', '.join(PRECISIONS)}, or your own as package.module:NAME",
    )
    return parser


def _is_hugging_face(checkpoint: Path) -> bool:
    """True for a folder whose config.json is not a run's and that has no checkpoint of ours (an import keeps both)."""
    config = checkpoint / "config.json"
    return config.is_file() and not (checkpoint / "checkpoints").is_dir() and not is_run(checkpoint)


def _print_stream(tokenizer: Tokenizer, chunks: Iterator[list[int]], ids: list[int]) -> str:
    """Prints a completion as it is made and returns its text; collects its ids, which are then known even if Ctrl-C
    ends it."""
    decoder, text = StreamDecoder(tokenizer), []
    try:
        for chunk in chunks:
            ids += chunk
            text.append(decoder.push([i for i in chunk if i not in tokenizer.stop_ids]))
            print(text[-1], end="", flush=True)
    finally:
        text.append(decoder.flush())
        print(text[-1], flush=True)
    return "".join(text)


def _chat(tokenizer: Tokenizer, completion: Completion) -> int:
    chat, turn = Chat(tokenizer), 0
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        if not text:
            return 0
        ids: list[int] = []
        try:
            if not _print_stream(tokenizer, completion(chat.ask(text), turn), ids).strip():
                _say_that_nothing_came(tokenizer, ids)
        except KeyboardInterrupt:  # ends the answer, not the chat
            pass
        chat.answer(ids)
        turn += 1


if __name__ == "__main__":
    cli.run(main)
