"""Documents: one int32 array of shape [tokens, 3] per record, so that packing moves a single array.

Columns: the token id; 1 if it is trained on as a target; and the bytes of text it stands for as a target. The last
column spreads a document's UTF-8 length evenly over its targets: sums over a document are exact for every tokenizer,
which is enough for bits per byte.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.data.chat_template import text_of
from deepseek_jax.data.config import SourceConfig
from deepseek_jax.data.tokenizers import Tokenizer
from deepseek_jax.errors import DataError

TOKEN, LOSS_MASK, NUM_BYTES = range(3)


def required_fields(source: SourceConfig) -> tuple[str, ...]:
    """Fields a record of this source must have."""
    by_format = {
        "text": (source.text_field,),
        "completion": ("prompt", "completion"),
        "messages": ("messages",),
        "tokens": ("tokens",),
    }
    return by_format[source.format]


def check_record(record: Mapping[str, Any], source: SourceConfig, where: str, vocab_size: int | None = None) -> None:
    """Raises DataError where a record lacks a field or holds anything but text, a chat or ids; names the fields it has.

    With `vocab_size` every token id must be below it.
    """
    if not isinstance(record, Mapping):
        raise DataError(
            f"{where}: expected an object with fields {', '.join(required_fields(source))}, found "
            f"{type(record).__name__}"
        )
    for field in required_fields(source):
        if field not in record:
            advice = (
                "set text_field to the one with the text"
                if source.format == "text"
                else f"format {source.format!r} needs it"
            )
            raise DataError(
                f"{where}: no field {field!r}; the fields are: {', '.join(map(str, record)) or 'none'}; {advice}"
            )
        if source.format == "text" and not isinstance(record[field], str):
            raise DataError(f"{where}: field {field!r} holds {type(record[field]).__name__}, not text")
        if source.format == "completion" and not isinstance(record[field], str | Sequence | np.ndarray):
            raise DataError(
                f"{where}: field {field!r} holds {type(record[field]).__name__}, neither text nor token ids"
            )
        if source.format == "tokens" or (source.format == "completion" and not isinstance(record[field], str)):
            token_ids(record[field], f"{where}: {field}", vocab_size)
    if source.format == "tokens" and "loss_mask" in record:
        mask = zeros_and_ones(record["loss_mask"], f"{where}: loss_mask")
        if len(mask) != len(record["tokens"]):
            raise DataError(
                f"{where}: {len(record['tokens'])} tokens and {len(mask)} values of loss_mask; every token needs one"
            )
    if source.format == "messages":
        _check_messages(record["messages"], where)


def _check_messages(messages: Any, where: str) -> None:
    """Raises DataError unless these are messages with roles and text, an assistant's at the end. Content may be null
    where an assistant calls tools instead."""
    if (
        not isinstance(messages, Sequence)
        or not messages
        or not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages)
    ):
        raise DataError(f"{where}: messages must be a list of objects with the texts `role` and `content`")
    for number, message in enumerate(messages):
        if message.get("content") is None and not (message["role"] == "assistant" and message.get("tool_calls")):
            raise DataError(
                f"{where}: messages[{number}], the {message['role']}'s, has no `content`; it may be null only where an "
                "assistant has `tool_calls`"
            )
        try:
            text_of(message.get("content"))
        except DataError as error:
            raise DataError(f"{where}: messages[{number}]: {error}") from None
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is the {messages[-1]['role']}'s; it must be the assistant's, which is "
            "trained on"
        )


def token_ids(values: Any, where: str, vocab_size: int | None = None) -> np.ndarray:
    """int32 [n] from a list or array of integers. Raises DataError, with the place, for anything else and for ids
    outside the vocabulary."""
    ids = _numbers(values, where, int, "token ids are integers")
    largest = np.iinfo(np.int32).max if vocab_size is None else vocab_size - 1
    outside = np.flatnonzero((ids < 0) | (ids > largest))
    if len(outside):
        value = ids[outside[0]]
        advice = (
            "a token that is not trained on keeps its id and has loss_mask 0"
            if value < 0
            else "take the tokenizer that the model was made for"
        )
        raise DataError(f"{where}[{outside[0]}] is {value}, outside 0 … {largest}, the ids of the vocabulary; {advice}")
    return ids.astype(np.int32)


def zeros_and_ones(values: Any, where: str) -> np.ndarray:
    """int32 [n] from a list or array of 0 and 1 (or false and true). Raises DataError, with the place, for anything
    else."""
    mask = _numbers(values, where, float, "a loss mask holds 0 and 1")
    other = np.flatnonzero((mask != 0) & (mask != 1))
    if len(other):
        raise DataError(f"{where}[{other[0]}] is {mask[other[0]]}; a loss mask holds 0 and 1")
    return mask.astype(np.int32)


def _numbers(values: Any, where: str, kind: type, rule: str) -> np.ndarray:
    """[n] int64 (kind int), or any numbers and booleans (kind float), without a conversion that would change a
    value."""
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or values.dtype.kind not in ("iu" if kind is int else "iufb"):
            raise DataError(f"{where} is an array of {values.dtype} {values.shape}; {rule}, in one dimension")
        return values.astype(np.int64) if kind is int else values
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise DataError(f"{where} holds {type(values).__name__}, not a list; {rule}")
    allowed = (int, np.integer) if kind is int else (int, float, np.number, np.bool_)
    for python_type in set(map(type, values)):
        if not issubclass(python_type, allowed) or (kind is int and python_type is bool):
            index = next(i for i, value in enumerate(values) if type(value) is python_type)
            raise DataError(f"{where}[{index}] is {values[index]!r}; {rule}")
    if kind is int and not all(-(2**63) <= value < 2**63 for value in (min(values, default=0), max(values, default=0))):
        raise DataError(f"{where} holds {max(values, key=abs)}, which is too large for a token id")
    return np.array(values, np.int64 if kind is int else np.float64)


def split_key(record: Mapping[str, Any], source: SourceConfig) -> bytes:
    """The text that decides a record's side of the train/validation split; for answers it is the question, so that a
    question is on one side only.

    The question is the prompt, a chat's first message of the user, or the tokens before the first one that is trained
    on (of a document that is trained on from its second token or earlier: all of its tokens).
    """
    if source.format == "messages":
        value = next(
            (text_of(message["content"]) for message in record["messages"] if message["role"] == "user"),
            record["messages"][:-1],
        )
    elif source.format == "tokens":
        trained = np.flatnonzero(np.asarray(record.get("loss_mask", ())))
        value = np.asarray(record["tokens"])
        value = value[: trained[0]] if len(trained) and trained[0] > 1 else value
    else:
        value = record[required_fields(source)[0]]
    return json.dumps(value, default=np.ndarray.tolist).encode()


def shape(record: Mapping[str, Any], source: SourceConfig) -> Hashable:
    """The shape of a checked record, which decides if it can be tokenized: one of each shape is tried when a source is
    opened."""
    if source.format == "messages":  # a chat template refuses roles, their order, and fields
        return tuple(
            (
                message["role"],
                type(message.get("content")),
                *sorted(message),
                "think>" in text_of(message.get("content")),
            )
            for message in record["messages"]
        )
    if source.format == "completion":
        texts = [record[field] if isinstance(record[field], str) else None for field in ("prompt", "completion")]
        return tuple(text is None for text in texts), (texts[1] or "").lstrip().startswith("<think>")
    return None


class Documents:
    """A source's documents, int32 [tokens, 3] each. Records are tokenized when they are asked for, and an error names
    the record.

    Making it tokenizes the `examples` of the records, one of each shape. Raises DataError for a record that cannot be
    tokenized.
    """

    def __init__(self, records: Any, tokenize: "Tokenize"):
        self._records, self._tokenize = records, tokenize
        for index in records.examples():
            self[index]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._tokenize(self._records[index], self._records.where(index))


class Tokenize:
    """Callable: record -> document int32 [tokens, 3]. `vocab_size` is the model's, None for the tokenizer's own."""

    def __init__(self, source: SourceConfig, tokenizer: Tokenizer, vocab_size: int | None = None):
        self._source = source
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size or tokenizer.vocab_size
        by_format = {
            "text": self._text,
            "completion": self._completion,
            "messages": self._messages,
            "tokens": self._tokens,
        }
        self._convert = by_format[source.format]

    def __call__(self, record: Mapping[str, Any], where: str | None = None) -> np.ndarray:
        """Raises DataError for a record that cannot be tokenized; the message begins with `where`, the place of the
        record."""
        where = where or f"source {self._source.name!r}"
        check_record(record, self._source, where, self._vocab_size)
        try:
            return self._convert(record)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

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
        """Trains on the turn that ends the conversation, as the chat template writes it."""
        return _answered(*self._tokenizer.turn(record["messages"]), text_of(record["messages"][-1].get("content")))

    def _refuse_second_opening(self, prompt_ids: Sequence[int], completion: str) -> None:
        if completion.lstrip().startswith("<think>") and self._tokenizer.decode(prompt_ids[-4:]).rstrip().endswith(
            "<think>"
        ):
            raise DataError(
                f"the prompt already ends with <think>, and so starts this completion: "
                f"{completion[:40]!r}; remove it from the completions"
            )

    def _tokens(self, record: Mapping[str, Any]) -> np.ndarray:
        ids = np.asarray(record["tokens"], np.int32)
        mask = np.asarray(record["loss_mask"], np.int32) if "loss_mask" in record else np.ones_like(ids)
        targets = ids[1:][mask[1:] > 0]
        return _document(ids, mask, _utf8_length(self._tokenizer.decode(targets.tolist(), skip_special=True)))


def _answered(prompt_ids: Sequence[int], answer_ids: Sequence[int], text: str) -> np.ndarray:
    """The document of a prompt and of the answer that is trained on, which stands for `text`."""
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
