"""Tokenizer settings from the files next to a tokenizer.json: named and added tokens, chat template, ids that end a
text."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from deepseek_jax.data import tokenizer_files as names
from deepseek_jax.data.chat_template import ChatTemplate
from deepseek_jax.data.tokenizer_files import decode_text, read_files, read_object, write_files
from deepseek_jax.errors import DataError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerSettings:
    """The files of one tokenizer, read once and understood as transformers does.

    `named` are the texts of the named tokens by field, `added` the tokens that tokenizer.json may lack, `template` the
    chat template, None without one, `eos_ids` the ids that generation_config.json and the model's config.json name.
    Raises DataError, with the file's name, for a file that cannot be read.
    """

    def __init__(self, file: Path):
        self.folder = file.parent
        self._files = read_files(file)
        self.definition = json.dumps(read_object(self._files[names.TOKENIZER], file))
        settings = self._object(names.SETTINGS)
        self.named = self._named_tokens(settings)
        self.added = self._added_tokens(settings)
        self.template = self._chat_template(settings)
        self.eos_ids = [*self._token_ids(names.GENERATION), *self._token_ids(names.MODEL)]

    def save(self, folder: Path, ids: Mapping[str, int | None], stop_ids: Iterable[int]) -> None:
        """Writes the files as they were read. generation_config.json also gets all of `stop_ids`, and `ids` where it
        lacks them."""
        files = {name: content for name, content in self._files.items() if name != names.MODEL}
        if not set(stop_ids) <= set(self._token_ids(names.GENERATION)):
            stored = (
                {name: i for name, i in ids.items() if i is not None}
                | self._object(names.GENERATION)
                | {"eos_token_id": list(stop_ids)}
            )
            files[names.GENERATION] = json.dumps(stored, indent=2).encode()
        write_files(folder, files)

    def _named_tokens(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """The named tokens. Old files have them in special_tokens_map.json, which then overrides the settings."""
        fields = dict(settings)
        if "added_tokens_decoder" not in settings:
            fields |= {name: value for name, value in self._object(names.SPECIALS).items() if value is not None}
        return {name: self._content(fields[name], name) for name in NAMED if fields.get(name) is not None}

    def _added_tokens(self, settings: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
        """The tokens of added_tokens_decoder or, in old files, of added_tokens.json, in the order of their ids."""
        listed = settings.get("added_tokens_decoder")
        if listed is None:
            special = self.named.values()
            pairs = [
                (i, {"content": text, "special": text in special}) for text, i in self._object(names.ADDED).items()
            ]
        elif isinstance(listed, Mapping) and all(isinstance(token, Mapping) for token in listed.values()):
            pairs = list(listed.items())
        else:
            raise DataError(f"{self.folder / names.SETTINGS}: added_tokens_decoder must be an object of objects")
        try:
            ordered = sorted(((int(i), token) for i, token in pairs), key=lambda pair: pair[0])
            return [
                tokenizers.AddedToken(
                    self._content(token, "added_tokens_decoder"),
                    **{flag: token[flag] for flag in _FLAGS if flag in token},
                )
                for _, token in ordered
            ]
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.folder / names.SETTINGS}: added_tokens_decoder: {error}") from error

    def _chat_template(self, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """The template; of several named ones, `default`. Template files override tokenizer_config.json."""
        origin, source = self.folder / names.SETTINGS, settings.get("chat_template")
        if isinstance(source, list):
            if not all(isinstance(entry, Mapping) and isinstance(entry.get("name"), str) for entry in source):
                raise DataError(f"{origin}: a chat_template that is a list needs objects with `name` and `template`")
            source = {entry["name"]: entry.get("template") for entry in source}
        own = {name: content for name, content in self._files.items() if name.endswith(".jinja")}
        if own:
            default = next((name for name in (names.TEMPLATE, f"{names.TEMPLATES}/default.jinja") if name in own), None)
            origin = self.folder / (default or names.TEMPLATES)
            source = {Path(name).stem: None for name in own} if default is None else decode_text(own[default], origin)
        if isinstance(source, Mapping):
            if "default" not in source:
                raise DataError(
                    f"{origin} has the chat templates {', '.join(map(str, source))} and none named 'default': name one "
                    "so"
                )
            source = source["default"]
        if source is None:
            return None
        if not isinstance(source, str):
            raise DataError(f"{origin}: chat_template holds {type(source).__name__}, not a template's text")
        return ChatTemplate(source, self.named, str(origin))

    def _token_ids(self, name: str) -> list[int]:
        stored = self._object(name).get("eos_token_id")
        ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise DataError(f"{self.folder / name}: eos_token_id={stored!r}: must be a token id or a list of them")
        return ids

    def _content(self, value: Any, where: str) -> str:
        """A token in the settings is a string or an object with `content`."""
        content = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(content, str) or not content or not _has_utf8(content):
            raise DataError(
                f"{self.folder / names.SETTINGS}: {where}={value!a}: must be a token's text, or an object with its "
                "`content`"
            )
        return content

    def _object(self, name: str) -> dict[str, Any]:
        return read_object(self._files[name], self.folder / name) if name in self._files else {}


def _has_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
