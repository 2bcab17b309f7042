"""From records to documents: one int32 array of shape [tokens, 3] each, so that packing moves a single array.

Columns: the token id; whether it is trained on as a target; and the bytes of text it stands for as a target. The last column
spreads a document's UTF-8 length evenly over its targets: sums over a document are exact for every tokenizer, which is all that
bits per byte need.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.data.config import SourceConfig
from deepseek_jax.data.tokenizers import Tokenizer
from deepseek_jax.errors import DataError

TOKEN, LOSS_MASK, NUM_BYTES = range(3)


def required_fields(source: SourceConfig) -> tuple[str, ...]:
    """Fields a record of this source must have."""
    by_format = {"text": (source.text_field,), "completion": ("prompt", "completion"), "messages": ("messages",), "tokens": ("tokens",)}
    return by_format[source.format]


def check_record(record: Mapping[str, Any], source: SourceConfig, where: str) -> None:
    """Raises DataError where a record lacks a field or holds something that is no text, chat or ids; names the fields it has."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object with fields {', '.join(required_fields(source))}, found {type(record).__name__}")
    for field in required_fields(source):
        if field not in record:
            advice = "set text_field to the one with the text" if source.format == "text" else f"format {source.format!r} needs it"
            raise DataError(f"{where}: no field {field!r}; the fields are: {', '.join(map(str, record)) or 'none'}; {advice}")
        if source.format == "text" and not isinstance(record[field], str):
            raise DataError(f"{where}: field {field!r} holds {type(record[field]).__name__}, not text")
        if source.format == "completion" and not isinstance(record[field], str | Sequence | np.ndarray):
            raise DataError(f"{where}: field {field!r} holds {type(record[field]).__name__}, neither text nor token ids")
    if source.format == "messages":
        messages = record["messages"]
        if not isinstance(messages, Sequence) or not messages or not all(
            isinstance(message, Mapping) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
            for message in messages
        ):
            raise DataError(f"{where}: messages must be a list of objects with the texts `role` and `content`")
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: the last message is the {messages[-1]['role']}'s; it must be the assistant's, which is trained on")


def split_key(record: Mapping[str, Any], source: SourceConfig) -> bytes:
    """What decides a record's side of the train/validation split: its text, or its prompt, so that equal ones never straddle it."""
    value = record["messages"][:-1] if source.format == "messages" else record[required_fields(source)[0]]
    return json.dumps(value, default=np.ndarray.tolist).encode()


class Tokenise:
    """Callable: record -> document int32 [tokens, 3]."""

    def __init__(self, source: SourceConfig, tokenizer: Tokenizer):
        self._source = source
        self._tokenizer = tokenizer
        by_format = {"text": self._text, "completion": self._completion, "messages": self._messages, "tokens": self._tokens}
        self._convert = by_format[source.format]

    def __call__(self, record: Mapping[str, Any]) -> np.ndarray:
        check_record(record, self._source, f"source {self._source.name!r}")
        return self._convert(record)

    def _text(self, record: Mapping[str, Any]) -> np.ndarray:
        text = record[self._source.text_field]
        ids = self._tokenizer.encode(text, bos=True, eos=True)
        return _document(ids, [0] + [1] * (len(ids) - 1), _utf8_length(text))

    def _completion(self, record: Mapping[str, Any]) -> np.ndarray:
        prompt, completion = record["prompt"], record["completion"]
        question = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            if isinstance(prompt, str):
                return self._messages({"messages": [*question, {"role": "assistant", "content": completion}]})
            self._refuse_second_opening(prompt, completion)
            return _answered(prompt, self._tokenizer.answer(completion), completion)
        prompt_ids = self._tokenizer.chat(question) if isinstance(prompt, str) else prompt
        return _answered(prompt_ids, completion, self._tokenizer.decode(completion, skip_special=True))

    def _messages(self, record: Mapping[str, Any]) -> np.ndarray:
        """The turn that ends the conversation, as the chat template writes it, is trained on."""
        return _answered(*self._tokenizer.turn(record["messages"]), record["messages"][-1]["content"])

    def _refuse_second_opening(self, prompt_ids: Sequence[int], completion: str) -> None:
        if completion.lstrip().startswith("<think>") and self._tokenizer.decode(prompt_ids[-4:]).rstrip().endswith("<think>"):
            raise DataError(
                f"source {self._source.name!r}: the prompt already ends with <think>, and so starts this completion: "
                f"{completion[:40]!r}; remove it from the completions"
            )

    def _tokens(self, record: Mapping[str, Any]) -> np.ndarray:
        ids = np.asarray(record["tokens"], np.int32)
        mask = np.asarray(record["loss_mask"], np.int32) if "loss_mask" in record else np.ones_like(ids)
        if ids.ndim != 1 or mask.shape != ids.shape:
            raise DataError(f"source {self._source.name!r}: tokens {ids.shape} and loss_mask {mask.shape} must be equally long lists")
        targets = ids[1:][mask[1:] > 0]
        return _document(ids, mask, _utf8_length(self._tokenizer.decode(targets.tolist(), skip_special=True)))


def completion_documents(
    prompts_BP: np.ndarray, prompt_lengths_B: np.ndarray, completions_BN: np.ndarray, mask_BN: np.ndarray, *, loss_on_prompt: bool = False
) -> list[dict[str, np.ndarray]]:
    """Records of format 'tokens' from right-padded prompts and completions, as a task writes its demonstrations.

    The loss falls on the completion, and with `loss_on_prompt` (task text in pre-training) on the prompt as well.
    """
    documents = []
    rows = zip(*map(np.asarray, (prompts_BP, prompt_lengths_B, completions_BN, mask_BN)), strict=True)
    for prompt_P, length, completion_N, mask_N in rows:
        completion = completion_N[mask_N > 0]
        tokens = np.concatenate([prompt_P[:length], completion]).astype(np.int32)
        loss_mask = np.concatenate([np.full(length, loss_on_prompt), np.ones(len(completion))]).astype(np.int32)
        documents.append({"tokens": tokens, "loss_mask": loss_mask})
    return documents


def _answered(prompt_ids: Sequence[int], answer_ids: Sequence[int], text: str) -> np.ndarray:
    """The document of a prompt and the answer that is trained on, which stands for `text`."""
    return _document([*prompt_ids, *answer_ids], [0] * len(prompt_ids) + [1] * len(answer_ids), _utf8_length(text))


def _document(ids: Sequence[int], mask: Sequence[int], num_bytes: int) -> np.ndarray:
    document = np.zeros((len(ids), 3), np.int32)
    document[:, TOKEN] = ids
    document[:, LOSS_MASK] = mask
    targets = np.flatnonzero(document[1:, LOSS_MASK]) + 1  # a first token is nobody's target
    shares = np.arange(len(targets) + 1, dtype=np.int64) * num_bytes // max(len(targets), 1)
    document[targets, NUM_BYTES] = np.diff(shares)
    return document


def _utf8_length(text: str) -> int:
    return len(text.encode("utf-8", errors="replace"))
