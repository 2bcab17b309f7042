"""Tokenizers: bytes (built in), any `tokenizer.json`, and your own as package.module:attribute, with one interface."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from deepseek_jax.data import tokenizer_files
from deepseek_jax.data.byte_tokenizer import MARKED, ByteTokenizer
from deepseek_jax.data.chat_template import Messages
from deepseek_jax.data.json_tokenizer import JsonTokenizer
from deepseek_jax.data.tokenizer_files import find_tokenizer
from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.registry import resolve

__all__ = [
    "ByteTokenizer",
    "JsonTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "check_vocabulary",
    "find_tokenizer",
    "is_own",
    "load_tokenizer",
]


class Tokenizer(Protocol):
    """Text to ids and back. Control strings inside a text stay text unless `allow_special` is given.

    `bos_id` is None where texts begin with no token of their own. `stop_ids` end an answer, `eos_id` first among them.
    `reasoning_tags` are the control strings that an assistant's text, and no other, may hold. `answer_opening` is the
    beginning of the answer that the prompt of a chat already writes, "<think>\n" for R1.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...]
    specials: dict[str, int]
    reasoning_tags: tuple[str, ...]
    answer_opening: str

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """`skip_special` leaves out padding, sequence and role markers; reasoning tags such as <think> stay."""

    def chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]: ...

    def answer(self, text: str) -> list[int]:
        """Ids of an assistant's text, reasoning tags parsed, and of the end of its turn."""

    def turn(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer, its end included, for a chat whose last message is the assistant's."""

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, from which `load_tokenizer(folder)` gives the same tokenizer. One of your own
        needs no such method: a run notes its name."""


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Loads the tokenizer that `spec` names: 'byte', a `tokenizer.json`, a folder that holds one, a checkpoint's (see
    `find_tokenizer`), or your own as package.module:attribute: a Tokenizer, or a class or function that makes one.

    Raises DataError or ConfigError saying what is missing or wrong.
    """
    if str(spec) == "byte":
        return ByteTokenizer()
    if is_own(spec):
        return _own(str(spec))
    if len(str(spec)) > 4096 or any(len(part.encode()) > 255 for part in Path(spec).parts):
        raise DataError(
            f"no tokenizer at {str(spec)[:80]!r} …: no file has so long a name; give 'byte', a tokenizer.json, or a "
            "folder that holds one"
        )
    path, seen = Path(spec).expanduser(), set()
    while path.is_dir() and not (path / tokenizer_files.TOKENIZER).is_file():
        found = find_tokenizer(path)
        if found == "byte":
            return ByteTokenizer()
        seen.add(path.absolute())
        path = Path(found).expanduser()
        if path.absolute() in seen:
            raise DataError(f"no tokenizer at {str(spec)!r}: its run names {found!r}, which names none")
    file = path / tokenizer_files.TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"no tokenizer at {str(path)!r}: give 'byte', a tokenizer.json, or a folder that holds one, or your own "
            "as package.module:attribute"
        )
    settings = file.parent / tokenizer_files.SETTINGS
    if settings.is_file() and tokenizer_files.read_object(settings.read_bytes(), settings).get(MARKED) == "byte":
        return ByteTokenizer()
    return JsonTokenizer(file)


def is_own(spec: str | Path) -> bool:
    """True if a tokenizer is named as package.module:attribute and no file has that name."""
    return re.fullmatch(r"[\w.]+:[\w.]+", str(spec)) is not None and not Path(spec).exists()


def _own(spec: str) -> Tokenizer:
    found = resolve({}, spec, "config.tokenizer")
    if isinstance(found, type) or not hasattr(found, "encode"):
        try:
            found = found()
        except Exception as error:  # of the user's code
            raise DataError(f"tokenizer {spec!r} cannot be made ({type(error).__name__}: {error})") from error
    needed = [name for name in (*Tokenizer.__annotations__, *vars(Tokenizer)) if not name.startswith("_")]
    missing = [name for name in needed if name != "save" and not hasattr(found, name)]
    if missing:
        raise DataError(
            f"tokenizer {spec!r} is a {type(found).__name__} without {', '.join(missing)}: it needs what "
            "deepseek_jax.data.tokenizers.Tokenizer has"
        )
    return found


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError when the tokenizer has ids the model has no embedding for; a larger model vocabulary is
    fine."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocab_size is {vocab_size}: "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or choose the tokenizer the model was made for"
        )


class StreamDecoder:
    """Decodes ids as they arrive: the pieces returned by `push` and `flush` together are the text of all.

    A character whose bytes have not all arrived shows as U+FFFD at the end of the text, so up to three of those (the
    most an unfinished UTF-8 sequence can show) are held back until later ids complete or refute them. Ids are decoded
    together with those of the piece before, since many tokenizers write the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._before: list[int] = []  # returned as a whole
        self._ids: list[int] = []
        self._sent = 0  # characters of the text of self._ids that were returned

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids make certain."""
        return "".join(self._push(int(i)) for i in ids)

    def flush(self) -> str:
        """The text that was held back; the decoder then starts anew."""
        piece = self._text()[self._sent :]
        self._before, self._ids, self._sent = [], [], 0
        return piece

    def _push(self, token: int) -> str:
        self._ids.append(token)
        text = self._text()
        held = min(3, len(text) - len(text.rstrip("\ufffd")))
        certain = len(text) - held
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if text and held == 0:
            self._before, self._ids, self._sent = self._ids, [], 0
        return piece

    def _text(self) -> str:
        """The text of self._ids, after the ids of the piece before."""
        before, whole = self._decode(self._before), self._decode(self._before + self._ids)
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)
