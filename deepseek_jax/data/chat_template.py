"""A checkpoint's chat template: Jinja in a sandbox, with the names such templates expect."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from deepseek_jax.errors import DataError


class ChatTemplate:
    """Renders chats to text. The template is foreign code: it runs sandboxed and cannot change what it is given."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._origin = origin
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template in {origin} does not compile: {error}") from error

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any], special_tokens: Mapping[str, str]) -> "ChatTemplate | None":
        """The template in tokenizer_config.json (of several named ones, `default`) or chat_template.jinja; None where there is none."""
        source = settings.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if source is not None:
            return cls(source, special_tokens, str(folder / "tokenizer_config.json"))
        file = folder / "chat_template.jinja"
        return cls(file.read_text(encoding="utf-8"), special_tokens, str(file)) if file.is_file() else None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The chat as text. Raises DataError with the template's own words when it refuses the messages."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template in {self._origin} refuses these messages: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as people read it: Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
