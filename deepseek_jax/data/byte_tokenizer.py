"""The built-in tokenizer: UTF-8 bytes and a few special tokens."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.data import tokenizer_files
from deepseek_jax.data.chat_template import Messages, text_of
from deepseek_jax.errors import DataError, nearest

_SPECIALS = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "<answer>", "</answer>", "<user>", "<assistant>")
_HIDDEN = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")
# The same chat for programs that read the saved files.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<assistant>{{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = "deepseek_jax"  # the field of tokenizer_config.json that says that saved files are this tokenizer's


class ByteTokenizer:
    """UTF-8 bytes 0..255, then the special tokens above; ids 265..271 are reserved. Chats are
    <bos><user>…<assistant>…<eos>."""

    vocab_size = 272
    reasoning_tags = ("<think>", "</think>", "<answer>", "</answer>")
    answer_opening = ""

    def __init__(self):
        self.specials = {name: 256 + i for i, name in enumerate(_SPECIALS)}
        self.pad_id, self.bos_id, self.eos_id = (self.specials[name] for name in ("<pad>", "<bos>", "<eos>"))
        self.stop_ids = (self.eos_id,)
        self._hidden = frozenset(self.specials[name] for name in _HIDDEN)
        self._names = {i: name for name, i in self.specials.items()}

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        return [self.bos_id] * bos + self._ids(text, _SPECIALS if allow_special else ()) + [self.eos_id] * eos

    def _ids(self, text: str, special: Sequence[str]) -> list[int]:
        """Bytes, and the ids of the strings in `special`."""
        ids: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, special)) + ")", text) if special else [text]:
            ids += [self.specials[piece]] if piece in special else piece.encode("utf-8", errors="replace")
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        text, run = [], bytearray()
        for i in map(int, ids):
            if 0 <= i < 256:
                run.append(i)
                continue
            text.append(run.decode("utf-8", errors="replace"))
            run.clear()
            if not (skip_special and i in self._hidden):
                text.append(self._names.get(i, ""))
        return "".join(text) + run.decode("utf-8", errors="replace")

    def chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a chat. An assistant's message may contain the reasoning tags; a user's text is never parsed for
        control strings."""
        ids = [self.bos_id]
        for message in messages:
            role, content = message["role"], text_of(message.get("content"))
            if message.get("tool_calls"):
                raise DataError("the byte tokenizer's chat has no tool calls: use a checkpoint's own tokenizer")
            if role == "user":
                ids += [self.specials["<user>"], *self.encode(content)]
            elif role == "assistant":
                ids += [self.specials["<assistant>"], *self.answer(content)]
            else:
                raise DataError(
                    f"the byte tokenizer's chat has no role {role!r}: {nearest(str(role), ('user', 'assistant'))}"
                )
        return ids + [self.specials["<assistant>"]] if add_generation_prompt else ids

    def answer(self, text: str) -> list[int]:
        return [*self._ids(text, self.reasoning_tags), self.eos_id]

    def turn(self, messages: Messages) -> tuple[list[int], list[int]]:
        *context, _ = messages
        whole, prompt = self.chat(messages, add_generation_prompt=False), self.chat(context)
        return prompt, whole[len(prompt) :]

    def save(self, folder: str | Path) -> None:
        """Writes the same tokenizer as files that `load_tokenizer` and transformers read."""
        added = [
            {
                "id": i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": name in _HIDDEN,
            }
            for name, i in self.specials.items()
        ]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        definition = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "merges": [],
                      "vocab": {letter: byte for byte, letter in enumerate(_byte_letters())}},
        }  # fmt: skip
        named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "chat_template": _TEMPLATE}
        ids = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id, "pad_token_id": self.pad_id}
        files = {
            tokenizer_files.TOKENIZER: definition,
            tokenizer_files.SETTINGS: named | {"tokenizer_class": "PreTrainedTokenizerFast", MARKED: "byte"},
            tokenizer_files.GENERATION: ids,
        }
        tokenizer_files.write_files(
            Path(folder), {name: json.dumps(content, indent=1).encode() for name, content in files.items()}
        )


def _byte_letters() -> list[str]:
    """The letter by which a byte-level vocabulary writes each byte: itself if it can be seen, else one from U+0100
    on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unseen = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(unseen)) for byte in range(256)]
