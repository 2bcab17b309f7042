"""Tokenizers of checkpoints: any `tokenizer.json`, with the chat template and the settings in its folder."""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from deepseek_jax.data.chat_template import Messages, map_strings, text_of
from deepseek_jax.data.disguise import LAST, MARK, Disguise, cut, revealed
from deepseek_jax.data.tokenizer_files import SETTINGS
from deepseek_jax.data.tokenizer_settings import TokenizerSettings
from deepseek_jax.errors import ConfigError, DataError

REASONING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_PROBE = "AnswerOfTheAssistant"


class JsonTokenizer:
    """A `tokenizer.json` and the other files of its folder, read as transformers reads them. Truncation and padding
    that were saved with it never apply.

    Control tokens are the added tokens that the file marks as special, that a setting names, that are written <…>
    (DeepSeek leaves <｜User｜> and <think> unmarked), or that the chat template writes; ordinary text never produces
    them. Padding falls back to the end-of-sequence token, as DeepSeek's files have it. Raises DataError for a file that
    is missing or cannot be read, or that names no eos token. A tokenizer without a bos token (Qwen's) has bos_id None:
    its texts begin with their own first token.
    """

    def __init__(self, file: Path):
        self._file = file
        self._settings = settings = TokenizerSettings(file)
        self._parsing = _build(settings.definition, file)
        self._add_missing()
        self.vocab_size = max(self._parsing.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._named_id("bos_token") if "bos_token" in settings.named else None
        self.eos_id = self._named_id("eos_token")
        self.pad_id = self._named_id("pad_token") if "pad_token" in settings.named else self.eos_id

        written = settings.template.literals if settings.template else ""
        added = self._parsing.get_added_tokens_decoder()
        marked = {token.content for token in added.values() if token.special} | set(settings.named.values())
        self.specials = {
            token.content: i
            for i, token in added.items()
            if token.content in marked or _is_control(token.content, written)
        }
        if any(text[0] > LAST for text in self.specials):
            raise DataError(
                f"{file} has a control token that begins with a character behind U+{ord(LAST):04X}, which is not "
                "supported"
            )
        self.reasoning_tags = tuple(tag for tag in REASONING_TAGS if tag in self.specials)
        unknown = self._parsing.token_to_id(str(getattr(self._parsing.model, "unk_token", None)))
        self._control_ids = frozenset(self.specials.values()) - {unknown}
        self._disguise = Disguise(self.specials)
        end = [i for i in self._library_ids(self._parsing, self._turn_end) if i in self._control_ids]
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *end[:1], *settings.eos_ids]))
        shown = {self.specials[tag] for tag in self.reasoning_tags}
        self._hidden = (
            {self.specials[text] for text in marked & self.specials.keys()} | set(self.stop_ids) & self._control_ids
        ) - shown

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        text = _valid(text)
        ids = self._library_ids(self._parsing, text) if allow_special else self._ids(self._disguise.hide(text))
        return [self.bos_id] * (bos and self.bos_id is not None) + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        shown = [int(i) for i in ids if 0 <= i < self.vocab_size and not (skip_special and i in self._hidden)]
        return _library(
            lambda: self._parsing.decode(shown, skip_special_tokens=False), f"{self._file} cannot decode {shown[:8]}"
        )

    def chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a chat rendered by the checkpoint's own template. Raises ConfigError where the checkpoint has none."""
        return self._ids(self._render(messages, add_generation_prompt))

    def answer(self, text: str) -> list[int]:
        return self._ended(self._ids(self._disguise.hide(_valid(text), self.reasoning_tags) + self._turn_end))

    def turn(self, messages: Messages) -> tuple[list[int], list[int]]:
        """The prompt and the answer as the template writes them. Reasoning that the template drops from finished turns
        is kept."""
        *context, last = messages
        prompt, chat = self._render(context, True), self._render(messages, False)
        content = text_of(self._hide_message(last).get("content"))
        dropped = self._dropped_tags(context, chat, content)
        if dropped:
            if last.get("tool_calls"):
                raise DataError(
                    f"{self._settings.folder}: the chat template drops {dropped[0]} from an answer that has "
                    "tool_calls: leave one of the two out"
                )
            opened = self.answer_opening.strip()
            if opened:
                content = re.sub(rf"\A\s*{re.escape(opened)}\s*", "", content)
            rest = content + self._turn_end
        elif chat.startswith(prompt):
            rest = chat[len(prompt) :]
        else:  # the template writes the opening of an answer only where one is asked for
            place = chat.rfind(content.strip(), 0, len(chat) - len(self._turn_end) * chat.endswith(self._turn_end))
            if place < 0:
                raise DataError(
                    f"{self._settings.folder}: the chat template rewrites this answer, so that its tokens cannot be "
                    f"told: {revealed(content)[:40]!r}"
                )
            prompt, rest = chat[:place], chat[place:]
        prompt_ids, chat_ids = self._ids(prompt), self._ids(prompt + rest)
        apart = chat_ids[: len(prompt_ids)] == prompt_ids
        return prompt_ids, self._ended(chat_ids[len(prompt_ids) :] if apart else self._ids(rest))

    def save(self, folder: str | Path) -> None:
        """Writes the files that were read, and all stop tokens into generation_config.json."""
        self._settings.save(Path(folder), {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id}, self.stop_ids)

    @functools.cached_property
    def answer_opening(self) -> str:
        return self._probed[0]

    @functools.cached_property
    def _turn_end(self) -> str:
        """The text that the template writes after an assistant's words; empty if it writes none, and without a
        template."""
        return self._probed[1]

    @functools.cached_property
    def _probed(self) -> tuple[str, str]:
        """(opening, end) of an assistant's turn."""
        if self._settings.template is None:
            return "", ""
        question = [{"role": "user", "content": "a"}]
        try:
            prompt = self._render(question, True)
            before, found, end = self._render([*question, {"role": "assistant", "content": _PROBE}], False).rpartition(
                _PROBE
            )
        except DataError:  # it wants other messages than these
            return "", ""
        return (prompt[len(before) :] if prompt.startswith(before) else "", end) if found else ("", "")

    def _ended(self, ids: list[int]) -> list[int]:
        """An answer's ids, followed by eos if the template does not end the last turn with a stop token."""
        return ids if set(ids) & set(self.stop_ids) else [*ids, self.eos_id]

    def _dropped_tags(self, context: Messages, chat: str, content: str) -> list[str]:
        tags = [tag for tag in self.reasoning_tags if tag in content]
        before = self._render(context, False) if tags else ""
        return [tag for tag in tags if chat.count(tag) - before.count(tag) < content.count(tag)]

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        """The chat as text, control strings in the messages disguised but for an assistant's reasoning tags."""
        if self._settings.template is None:
            raise ConfigError(
                f"{self._settings.folder} has no chat template (neither chat_template in tokenizer_config.json nor "
                "chat_template.jinja), and none is "
                "guessed: add the one the checkpoint was trained with, or give plain text"
            )
        return _valid(
            self._settings.template.render([self._hide_message(message) for message in messages], add_generation_prompt)
        )

    def _hide_message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(message, Mapping):
            return message  # the template's errors are reported
        tags = self.reasoning_tags if message.get("role") == "assistant" else ()

        def hide(name: str, value: Any) -> Any:
            return map_strings(
                value, lambda text: self._disguise.hide(_valid(text), () if name == "tool_calls" else tags)
            )

        return {name: hide(name, value) for name, value in message.items()}

    def _ids(self, text: str) -> list[int]:
        """Ids of a text in which control strings that must stay text are disguised."""
        if MARK not in text and not self._folds(text):
            return self._library_ids(self._parsing, text)
        wanted = Counter(self.specials[found] for found in self._disguise.find_all(text))
        for pieces in ([text], cut(text)):
            ids = [i for piece in pieces for i in self._library_ids(self._guarded, piece)]
            if not Counter(i for i in ids if i in self._control_ids) - wanted:
                return ids
        raise DataError(
            f"{self._file} makes control tokens of plain text: {revealed(text)[:80]!r}; take the text out, or use "
            "another tokenizer"
        )

    def _folds(self, text: str) -> bool:
        """True if the tokenizer's normalizer can turn other text into control strings, such as capital letters."""
        if self._normalizer is None:
            return False
        folded = _library(lambda: self._normalizer.normalize_str(text), f"{self._file} cannot normalize {text[:40]!r}")
        return bool(Counter(self._disguise.find_all(folded)) - Counter(self._disguise.find_all(text)))

    @functools.cached_property
    def _normalizer(self):
        """The normalizer, if it can make control tokens."""
        tokens = self._parsing.get_added_tokens_decoder().values()
        reachable = self._control_ids & set(self._parsing.get_vocab(with_added_tokens=False).values())
        return (
            self._parsing.normalizer
            if reachable or any(token.normalized and token.content in self.specials for token in tokens)
            else None
        )

    @functools.cached_property
    def _guarded(self) -> tokenizers.Tokenizer:
        """The tokenizer for disguised text: control tokens are found before normalization, then the disguise is
        removed."""
        definition = json.loads(self._parsing.to_str())
        for token in definition["added_tokens"]:
            token["normalized"] = token["normalized"] and token["content"] not in self.specials
        steps = [
            {"type": "Replace", "pattern": {"String": pair}, "content": plain} for pair, plain in self._disguise.pairs
        ]
        definition["normalizer"] = {
            "type": "Sequence",
            "normalizers": steps + [definition["normalizer"]] * (definition["normalizer"] is not None),
        }
        return _build(json.dumps(definition), self._file)

    def _library_ids(self, library: tokenizers.Tokenizer, text: str) -> list[int]:
        return _library(
            lambda: library.encode(text, add_special_tokens=False).ids,
            f"{self._file} cannot encode {revealed(text)[:40]!r}",
        )

    def _add_missing(self) -> None:
        """Adds the tokens that only the settings know, and marks the named ones in the vocabulary as added tokens."""
        known = {token.content for token in self._parsing.get_added_tokens_decoder().values()}
        named = [tokenizers.AddedToken(text, special=True, normalized=False) for text in self._settings.named.values()]
        in_vocabulary = [token for token in named if self._parsing.token_to_id(token.content) is not None]
        missing = [token for token in self._settings.added + in_vocabulary if token.content not in known]
        if missing:
            _library(
                lambda: self._parsing.add_tokens(missing),
                f"{self._file} does not take the added tokens of its settings",
            )

    def _named_id(self, field: str) -> int:
        folder, named = self._settings.folder, self._settings.named
        if field not in named:
            raise DataError(f'{folder} names no {field}: add "{field}": "…" to {folder / SETTINGS}')
        token_id = self._parsing.token_to_id(named[field])
        if token_id is None:
            raise DataError(f"{folder}: {field} {named[field]!r} is not in the vocabulary of {self._file.name}")
        return token_id


def _is_control(content: str, written: str) -> bool:
    """True for an unmarked added token that controls: <…>, or a sign that the template writes. Words and spaces are
    text."""
    return bool(re.fullmatch(r"<.+>", content, re.DOTALL)) or (
        content in written and re.search(r"[^\w\s]", content) is not None
    )


def _build(definition: str, file: Path) -> tokenizers.Tokenizer:
    wrong = f"{file} is not a tokenizer.json that the tokenizers library {tokenizers.__version__} can read"
    library = _library(lambda: tokenizers.Tokenizer.from_str(definition), wrong)
    library.no_truncation()
    library.no_padding()
    return library


def _library(call: Callable[[], Any], wrong: str) -> Any:
    """Calls the tokenizers library. It raises bare Exception for unusable input, and its panics do not derive from
    Exception."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise DataError(f"{wrong}: {error}") from error


def _valid(text: str) -> str:
    """Replaces lone surrogates, which have no UTF-8 form."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
