"""Tokenizer files: their names, reading, writing, and their place in a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.atomic import atomic_write
from deepseek_jax.errors import DataError
from deepseek_jax.json_io import parse_json

TOKENIZER, SETTINGS, SPECIALS, ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATE, TEMPLATES, GENERATION, MODEL = (
    "chat_template.jinja",
    "chat_templates",
    "generation_config.json",
    "config.json",
)
COMPANIONS = (SETTINGS, SPECIALS, ADDED, TEMPLATE, GENERATION)
FOLDER = "tokenizer"  # in a stage's folder
RECORD = "experiment.json"  # in a stage's folder: the experiment that its results belong to


def read_files(file: Path) -> dict[str, bytes]:
    """Contents by name of a tokenizer.json and of the other files of its folder that matter, the model's config.json
    included."""
    files = {TOKENIZER: _read(file)}
    companions = [file.parent / name for name in (*COMPANIONS, MODEL)]
    named = sorted((file.parent / TEMPLATES).glob("*.jinja"))
    return files | {str(path.relative_to(file.parent)): _read(path) for path in (*companions, *named) if path.is_file()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes `files` by name, each complete or not at all."""
    for name, content in files.items():
        atomic_write(folder / name, content)


def decode_text(content: bytes, where: Path) -> str:
    """UTF-8 text, with or without a byte order mark. Raises DataError naming the file."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start})") from error


def read_object(content: bytes, where: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError naming the file."""
    try:
        value = parse_json(content)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} holds {type(value).__name__}, not a JSON object")
    return value


def find_tokenizer(checkpoint: Path) -> str:
    """The tokenizer that a checkpoint was trained with, as `load_tokenizer` takes it.

    `checkpoint` is a Hugging Face folder, a stage's folder, its `checkpoints` folder, one checkpoint in it, or a run's
    folder. A stage has the files in `tokenizer/`; where it has none, as for a tokenizer of a user's own, the stage's
    experiment.json or the run's config.json names the tokenizer. Raises DataError where it is not recorded.
    """
    checkpoint = Path(checkpoint).absolute()
    if not checkpoint.is_dir():
        raise DataError(f"no checkpoint at {checkpoint}: the folder does not exist")
    if checkpoint.name.isdigit() and checkpoint.parent.name == "checkpoints":
        checkpoint = checkpoint.parent
    stage = checkpoint.parent if checkpoint.name == "checkpoints" else checkpoint
    for folder in (stage, stage / FOLDER):
        if (folder / TOKENIZER).is_file():
            return str(folder)
    for file in (stage / RECORD, stage / MODEL, stage.parent / MODEL):
        if "stages" in (config := _config(file)):
            return str(config.get("tokenizer") or "byte")  # an experiment that names none uses bytes
    raise DataError(
        f"no tokenizer at {checkpoint}: it has no {TOKENIZER}, no folder {FOLDER!r} with one, and no config.json of a "
        "run that names one; "
        f"say which the model was trained with: 'byte', a {TOKENIZER} or its folder (--tokenizer=…)"
    )


def is_run(folder: Path) -> bool:
    """True if a folder's config.json is an experiment's, not that of a Hugging Face network."""
    return "stages" in _config(folder / MODEL)


def _config(file: Path) -> dict[str, Any]:
    return read_object(_read(file), file) if file.is_file() else {}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
