"""Chat templates of checkpoints: Jinja in a sandbox, with the names and filters that transformers gives them."""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from deepseek_jax.data.disguise import ascii_json
from deepseek_jax.errors import DataError

Messages = Sequence[Mapping[str, Any]]

MAX_LOOP_STEPS = 1_000_000  # of all loops of one rendering together
_MAX_REPEATED = 1_000_000  # characters or items that one product may make
_COUNT = "count_step__"
_PART = "TextOfAPart"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; templates read the first


class ChatTemplate:
    """Renders chats to text. The template is foreign code: it runs sandboxed, cannot change what it is given, and is
    stopped after a million steps of its loops.

    Content that is a list of parts, {"type": "text", "text": …}, reaches a template that reads parts as it is, as in
    transformers; any other template gets their texts joined, where transformers would write the list's brackets.
    `origin` names the file in messages; `literals` is all text that the template itself can write.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str):
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
        del environment.globals["lipsum"]  # text by the megabyte
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        for name in ("center", "indent", "wordwrap", "truncate"):
            environment.filters[name] = _narrow(environment.filters[name], name)
        self._origin = origin
        self._special_tokens = dict(special_tokens)
        self._writes_calls = "tool_calls" in source
        try:
            tree = environment.parse(source)
            self.literals = _literals(tree)
            self._template = environment.from_string(_counting(tree))
        except Exception as error:  # Jinja's own errors, and Python's for code that is nested too deep
            raise DataError(f"the chat template in {origin} does not compile: {_words(error)}") from error

    def render(self, messages: Messages, add_generation_prompt: bool) -> str:
        """The chat as text. Raises DataError with the template's own words when it refuses the messages."""
        try:
            messages = [_with_reasoning(message) for message in messages]
            if not self._writes_calls and any("content" not in m and m.get("tool_calls") for m in messages):
                raise DataError("content is null and only tool_calls are there, which this template does not write")
            if any(map(_has_parts, messages)) and not self._reads_parts:
                messages = [m | {"content": text_of(m["content"])} if _has_parts(m) else m for m in messages]
            return self._render(messages, add_generation_prompt)
        except Exception as error:  # the template's own refusal, or any error of Python in its expressions
            raise DataError(f"the chat template in {self._origin} refuses these messages: {_words(error)}") from error

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        steps = itertools.count(1)
        return self._template.render(
            self._special_tokens
            | {
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                _COUNT: lambda: _stop_after(next(steps)),
            }
        )

    @functools.cached_property
    def _reads_parts(self) -> bool:
        """True if the template writes the text of a content item, not Python's or JSON's form of the list."""
        try:
            shown = self._render([{"role": "user", "content": [{"type": "text", "text": _PART}]}], True)
        except Exception:  # it wants other messages than this one, or text
            return False
        return _PART in shown and "type" not in shown


def _has_parts(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content)


def text_of(content: Any) -> str:
    """The text of a message's content: a string, None where there is none, or a list of parts, whose texts are joined.
    Raises DataError for anything else, such as an image."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise DataError(f"content holds {type(content).__name__}, neither text nor a list of parts")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"content has a part of type {kind!r}; only text is read: {{'type': 'text', 'text': …}}")
        texts.append(part["text"])
    return "".join(texts)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, made of mappings, sequences and scalars, with every string but keys changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which bounds `range`, with bounds on products, powers and widths too, since they could fill the
    memory as well."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call(self, context, call, /, *arguments, **keywords):
        if any(isinstance(value, int) and abs(value) > _MAX_REPEATED for value in arguments) and hasattr(
            getattr(call, "__self__", None), "__len__"
        ):
            raise jinja2.TemplateError(f"{call.__name__} with a number above {_MAX_REPEATED}")
        return super().call(context, call, *arguments, **keywords)

    def call_binop(self, context, operator, left, right):
        if (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and abs(left) > 1
            and abs(right) > 10_000
        ):
            raise jinja2.TemplateError(f"{left} ** {right} is too large")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(other, int) and len(one) * other > _MAX_REPEATED:
                    raise jinja2.TemplateError(f"{type(one).__name__} * {other} is too long")
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 100_000:
                raise jinja2.TemplateError("a product is too large")
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\d{5,}|\*)", left):
            raise jinja2.TemplateError(f"the format {left[:40]!r} is too wide")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %} marks an assistant's turn; it writes its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Scope:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _counting(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """The same template with a call of `_COUNT` at the start of every loop's body."""
    for loop in tree.find_all(jinja2.nodes.For):
        call = jinja2.nodes.Call(jinja2.nodes.Name(_COUNT, "load"), [], [], None, None)
        loop.body.insert(0, jinja2.nodes.ExprStmt(call).set_lineno(loop.lineno))
    return tree


def _stop_after(steps: int) -> None:
    if steps > MAX_LOOP_STEPS:
        raise jinja2.TemplateError(f"its loops have made {MAX_LOOP_STEPS} steps without an end")


def _literals(tree: jinja2.nodes.Template) -> str:
    """All text that the template itself can write, in pieces."""

    def pieces() -> Iterator[str]:
        for node in tree.find_all((jinja2.nodes.TemplateData, jinja2.nodes.Const)):
            text = node.data if isinstance(node, jinja2.nodes.TemplateData) else node.value
            if isinstance(text, str):
                yield text

    return "\0".join(pieces())


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the fields that are None, and with its reasoning under the names that templates read."""
    if not isinstance(message, Mapping):
        raise TypeError(f"a message is an object with a role and content, not {type(message).__name__}")
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False
) -> str:
    """JSON as people read it: Jinja's own filter would escape <, > and & for HTML."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return ascii_json(text) if ensure_ascii else text


def _narrow(filter_: Callable, name: str) -> Callable:
    """A filter of Jinja's that refuses widths that would fill the memory."""

    @functools.wraps(filter_)
    def checked(*arguments, **keywords):
        if any(isinstance(value, int) and abs(value) > _MAX_REPEATED for value in (*arguments, *keywords.values())):
            raise jinja2.TemplateError(f"{name} with a number above {_MAX_REPEATED}")
        return filter_(*arguments, **keywords)

    return checked


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, jinja2.TemplateError | DataError) else f"{type(error).__name__}: {error}"
