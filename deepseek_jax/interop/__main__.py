"""python -m deepseek_jax.interop import <hf_folder> <checkpoint> | export <checkpoint> <hf_folder> | inspect
<hf_folder>

An imported checkpoint is a folder like a training stage's: `checkpoints/` for generation and training, and next to it
the tokenizer files and config.json of the original, which an export copies again.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress

from deepseek_jax import cli
from deepseek_jax.atomic import atomic_folder, check_absent
from deepseek_jax.data import tokenizer_files
from deepseek_jax.data.tokenizer_files import find_tokenizer
from deepseek_jax.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from deepseek_jax.errors import DataError
from deepseek_jax.interop.exporter import EXPORT_DTYPES, export_folder
from deepseek_jax.interop.folder import open_folder, usable_folder
from deepseek_jax.interop.hf_config import read_config
from deepseek_jax.interop.hf_fields import CONFIG_NAME
from deepseek_jax.interop.importer import PARAM_DTYPES, read_variables
from deepseek_jax.interop.report import print_report
from deepseek_jax.training.checkpoints import Checkpoints, load_variables, resolve_checkpoint

# Files of a tokenizer besides those that `Tokenizer.save` writes, and the settings of text generation.
COMPANIONS = (tokenizer_files.TOKENIZER, *tokenizer_files.COMPANIONS, "tokenizer.model", "tiktoken.model")


@flax.struct.dataclass
class Weights:
    """A training state that holds weights alone."""

    step: int
    params: Any
    router_bias: Any


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deepseek_jax.interop", "Hugging Face checkpoints of the DeepSeek families, in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", allow_abbrev=False, help="Hugging Face folder -> checkpoint")
    importing.add_argument("hf_folder", type=Path)
    importing.add_argument("checkpoint", type=Path)
    importing.add_argument("--dtype", choices=tuple(PARAM_DTYPES), default="float32", help="of the parameters")
    exporting = commands.add_parser("export", allow_abbrev=False, help="checkpoint -> Hugging Face folder")
    exporting.add_argument("checkpoint", type=Path)
    exporting.add_argument("hf_folder", type=Path)
    exporting.add_argument(
        "--dtype", choices=EXPORT_DTYPES, default="bfloat16", help="fp8: the released block-scaled layout"
    )
    exporting.add_argument(
        "--max_shard_gb", type=cli.number(above=0), default=5.0, help="size of a file, in 10^9 bytes"
    )
    exporting.add_argument(
        "--tokenizer", help="'byte', a tokenizer.json or its folder; by default the checkpoint's own"
    )
    inspecting = commands.add_parser("inspect", allow_abbrev=False, help="what a Hugging Face folder holds and lacks")
    inspecting.add_argument("hf_folder", type=Path)
    flags = parser.parse_args(argv)
    console = Console()
    if flags.command == "inspect":
        folder = open_folder(flags.hf_folder)
        print_report(folder, console)
        return 1 if folder.problems else 0
    if flags.command == "import":
        import_checkpoint(flags.hf_folder, flags.checkpoint, flags.dtype, console)
    else:
        export_checkpoint(
            flags.checkpoint, flags.hf_folder, flags.dtype, int(flags.max_shard_gb * 1e9), console, flags.tokenizer
        )
    return 0


def import_checkpoint(hf_folder: Path, checkpoint: Path, dtype: str, console: Console) -> None:
    """Reads `hf_folder` and stores it as a checkpoint that `training.checkpoints.load_variables` loads."""
    check_absent(checkpoint)
    folder = usable_folder(hf_folder)
    for note in folder.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    with _progress(console, "importing") as progress:
        variables = read_variables(folder, dtype, progress)
    with atomic_folder(checkpoint) as building:
        store = Checkpoints(building / "checkpoints", folder.config)
        variables = jax.device_put(variables)  # on CPU the same memory: the importer aligned it
        store.save(
            Weights(
                step=jnp.zeros((), jnp.int32), params=variables["params"], router_bias=variables.get("router_bias", {})
            )
        )
        store.close()
        for file in _companions(hf_folder, CONFIG_NAME):
            shutil.copyfile(file, building / file.name)
    console.print(f"{hf_folder} -> {checkpoint}", markup=False, soft_wrap=True)


def export_checkpoint(
    checkpoint: Path, hf_folder: Path, dtype: str, max_shard_bytes: int, console: Console, tokenizer: str | None = None
) -> None:
    """Writes the newest weights of `checkpoint` (anything that `resolve_checkpoint` takes) as a Hugging Face folder,
    with the tokenizer it was trained with (or `tokenizer`) and the files that an import left there."""
    check_absent(hf_folder)
    where = resolve_checkpoint(checkpoint)
    stage = where.parent.parent if where.parent.name == "checkpoints" else where.parent
    config, variables = load_variables(where)
    own = _tokenizer(where, tokenizer, console)
    if own is not None:
        check_vocabulary(own, config.vocab_size)
    carried = read_config(stage) if (stage / CONFIG_NAME).is_file() else None
    with _progress(console, "exporting") as progress:
        export_folder(config, variables, hf_folder, dtype, max_shard_bytes, carried, _companions(stage), own, progress)
    console.print(f"{where} -> {hf_folder}", markup=False, soft_wrap=True)


def _tokenizer(where: Path, spec: str | None, console: Console) -> Tokenizer | None:
    """The tokenizer called `spec`, or that of the checkpoint at `where`. None, with a printed note, if the checkpoint
    does not name one."""
    try:
        return load_tokenizer(spec or find_tokenizer(where))
    except DataError as error:
        if spec is not None:
            raise
        console.print(
            "note: exported without a tokenizer and its token ids, so that transformers does not know where a text "
            f"ends: {error}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        return None


def _companions(folder: Path, *more: str) -> list[Path]:
    return [folder / name for name in (*COMPANIONS, *more) if (folder / name).is_file()]


class _progress:
    """A progress bar over tensors, as the `progress(done, total)` callback that importer and exporter take."""

    def __init__(self, console: Console, title: str):
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._title = title

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        task = self._bar.add_task(self._title)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *_) -> None:
        self._bar.stop()


if __name__ == "__main__":
    cli.run(main)
