"""Tokenizers: bytes (built in) and any `tokenizer.json`, with one interface."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from deepseek_jax.data.chat_template import ChatTemplate
from deepseek_jax.errors import ConfigError, DataError, nearest

Messages = Sequence[dict[str, Any]]


class Tokenizer(Protocol):
    """Text to ids and back. Control strings inside a text stay text unless `allow_special` is given."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    specials: dict[str, int]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """`skip_special` leaves out padding, sequence and role markers; reasoning tags such as <think> stay."""

    def chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]: ...


_BYTE_SPECIALS = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "<answer>", "</answer>", "<user>", "<assistant>")
_BYTE_HIDDEN = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")


class ByteTokenizer:
    """UTF-8 bytes 0..255, then the special tokens above; ids 265..271 are reserved. Chats are <bos><user>…<assistant>…<eos>."""

    vocab_size = 272

    def __init__(self):
        self.specials = {name: 256 + i for i, name in enumerate(_BYTE_SPECIALS)}
        self.pad_id, self.bos_id, self.eos_id = (self.specials[name] for name in ("<pad>", "<bos>", "<eos>"))
        self._hidden = frozenset(self.specials[name] for name in _BYTE_HIDDEN)
        self._names = {i: name for name, i in self.specials.items()}
        self._pattern = re.compile("(" + "|".join(map(re.escape, _BYTE_SPECIALS)) + ")")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        ids = [self.bos_id] if bos else []
        for piece in self._pattern.split(text) if allow_special else [text]:
            if allow_special and piece in self.specials:
                ids.append(self.specials[piece])
            else:
                ids.extend(piece.encode("utf-8", errors="replace"))
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        text, run = [], bytearray()
        for i in map(int, ids):
            if i < 256:
                run.append(i)
                continue
            text.append(run.decode("utf-8", errors="replace"))
            run.clear()
            if not (skip_special and i in self._hidden):
                text.append(self._names.get(i, ""))
        return "".join(text) + run.decode("utf-8", errors="replace")

    def chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a chat. An assistant's message may contain the reasoning tags; a user's text is never parsed for control strings."""
        ids = [self.bos_id]
        for message in messages:
            role = message["role"]
            if role == "user":
                ids += [self.specials["<user>"], *self.encode(message["content"])]
            elif role == "assistant":
                ids += [self.specials["<assistant>"], *self.encode(message["content"], allow_special=True), self.eos_id]
            else:
                raise DataError(f"the byte tokenizer's chat has no role {role!r}: {nearest(str(role), ('user', 'assistant'))}")
        return ids + [self.specials["<assistant>"]] if add_generation_prompt else ids


class JsonTokenizer:
    """A `tokenizer.json` with the `tokenizer_config.json` (and chat template) beside it.

    Control tokens are the added tokens the file marks as special, and those written <…> (DeepSeek leaves <｜User｜> and <think>
    unmarked); ordinary text never produces them. Padding falls back to the end-of-sequence token, as DeepSeek's files have it.
    Raises DataError for a file that is missing or cannot be read, or that names no bos or eos token.
    """

    def __init__(self, folder: Path, file: Path):
        self._path = folder
        definition = _read_json(file)
        settings_file = folder / "tokenizer_config.json"
        settings = _read_json(settings_file) if settings_file.exists() else {}
        try:
            self._parsing = tokenizers.Tokenizer.from_str(json.dumps(definition))
            for token in definition.get("added_tokens", []):
                token["special"] = token["special"] or bool(re.fullmatch(r"<.+>", token["content"]))
            self._literal = tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises bare Exception for a file it cannot use
            version = tokenizers.__version__
            raise DataError(f"{file} is not a tokenizer.json that the tokenizers library {version} can read: {error}") from error
        self._literal.encode_special_tokens = True  # "encode the strings of special tokens as text"
        self.specials = {token["content"]: token["id"] for token in definition.get("added_tokens", []) if token["special"]}
        self.vocab_size = max(self._parsing.get_vocab(with_added_tokens=True).values()) + 1
        named = {
            field: _content(value) for field, value in settings.items() if field.endswith("_token") and _content(value) is not None
        }
        self.bos_id = self._named_id(named, "bos_token")
        self.eos_id = self._named_id(named, "eos_token")
        self.pad_id = self._named_id(named, "pad_token") if "pad_token" in named else self.eos_id
        self._template = ChatTemplate.load(folder, settings, named)

    def _named_id(self, named: dict[str, str], field: str) -> int:
        if field not in named:
            raise DataError(f"{self._path} names no {field}: add \"{field}\": \"…\" to {self._path / 'tokenizer_config.json'}")
        token_id = self._parsing.token_to_id(named[field])
        if token_id is None:
            raise DataError(f"{self._path}: {field} {named[field]!r} is not in the vocabulary of tokenizer.json")
        return token_id

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates have no UTF-8 form
        ids = (self._parsing if allow_special else self._literal).encode(text, add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return self._parsing.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a chat rendered by the checkpoint's own template. Raises ConfigError where the checkpoint has none."""
        if self._template is None:
            raise ConfigError(
                f"{self._path} has no chat template (neither chat_template in tokenizer_config.json nor chat_template.jinja), and none is "
                "guessed: add the one the checkpoint was trained with, or give plain text"
            )
        return self.encode(self._template.render(messages, add_generation_prompt), allow_special=True)


def load_tokenizer(spec: str) -> Tokenizer:
    """'byte', a `tokenizer.json`, or a folder that holds one. Raises DataError saying what is missing."""
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no tokenizer at {spec!r}: give 'byte', a tokenizer.json, or a folder that holds one")
    return JsonTokenizer(file.parent, file)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError when the tokenizer has ids the model has no embedding for; a larger model vocabulary is fine."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocab_size is {vocab_size}: "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or choose the tokenizer the model was made for"
        )


class StreamDecoder:
    """Decodes ids as they arrive: the pieces returned by `push` and `flush` together are the decoded whole.

    A character whose bytes have not all arrived shows as U+FFFD at the end of the text, so up to three of those (the most an
    unfinished UTF-8 sequence can show) are held back until later ids complete or refute them.
    """

    _KEEP, _LIMIT = 16, 64

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._sent = 0  # characters of the decoded self._ids that were returned

    def push(self, ids: Sequence[int]) -> str:
        """The text that became certain with these ids."""
        self._ids.extend(map(int, ids))
        text = self._decode()
        held = min(3, len(text) - len(text.rstrip("\ufffd")))
        piece = text[self._sent : len(text) - held]
        self._sent = max(self._sent, len(text) - held)
        if held == 0 and len(self._ids) > self._LIMIT:  # everything was sent: old ids only cost time
            self._ids = self._ids[-self._KEEP :]
            self._sent = len(self._decode())
        return piece

    def flush(self) -> str:
        """What was held back; the decoder is then as new."""
        piece = self._decode()[self._sent :]
        self._ids, self._sent = [], 0
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special=self._skip_special)


def _content(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string or an object with `content`."""
    return value["content"] if isinstance(value, dict) else value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
