"""The loader's config: what it reads and how it packs. Frozen dataclasses, checked when they are made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import build
from deepseek_jax.identity import free
from deepseek_jax.ranges import above, at_least, check, one_of, or_none

FORMATS = ("text", "completion", "messages", "tokens")
PACKINGS = ("split", "whole")
LONG_DOCUMENTS = ("error", "truncate", "cut")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of documents.

    name: 'stdlib' (the Python standard library's own source), 'tfds:NAME' (any TFDS dataset with a text feature), a
        path or glob of .jsonl, .parquet or .txt files (a .txt file is one document), your own function as
        'package.module:function', or the key of an in-memory source given to `build_loader`. Your function returns a
        sequence of records, all of them, or those of a split, 'train' or 'validation', if it has a parameter `split`.
    weight: the source's share of the sequences, and with packing='split' of the tokens, relative to the other sources.
    format: 'text': <bos> text <eos>, every token trained on (no <bos> where the tokenizer has none). 'completion':
        fields `prompt` and `completion` (text or token ids), loss on the completion. 'messages': a chat whose last
        message is the assistant's, loss on that message; `content` is text or a list of {"type": "text", "text": …},
        and may be null next to `tool_calls`. 'tokens': fields `tokens` and optionally `loss_mask`, used as they are.
    text_field: the field that holds the text (format 'text').
    validation_fraction: local files and own functions without `split`: share of documents held out; a document's
        content alone decides whether it is. 0 without a validation_path, for any source, holds nothing out, and
        training runs without held-out evaluation.
    validation_path: local files only: the held-out files, in place of a fraction.
    train_split, validation_split: TFDS only; slices such as 'train[:95%]' are allowed.
    max_bytes: stdlib only: at most this much text, training and validation together (None: all, about 10 MB).
    """

    name: str
    weight: float = 1.0
    format: str = "text"
    text_field: str = "text"
    validation_fraction: float = 0.05
    validation_path: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    max_bytes: int | None = None

    def __post_init__(self):
        check(
            self,
            f"source {self.name!r}: ",
            format=one_of(FORMATS),
            weight=above(0, why="leave the source out to switch it off"),
            validation_fraction=at_least(0, below=1),
            max_bytes=or_none(at_least(1), "for everything"),
        )

    @property
    def holds_out(self) -> bool:
        """True if the source has held-out documents. With validation_fraction=0 and no validation_path, all are trained
        on."""
        return self.validation_fraction > 0 or self.validation_path is not None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of `build_loader`.

    packing: 'split' joins documents and cuts them at the ends of sequences, so no position is wasted; 'whole' keeps
        each document in one sequence (best fit) and pads.
    long_documents: with packing='whole', a document longer than a sequence is an 'error', loses its tail ('truncate'),
        or is 'cut' into pieces of one sequence, so that one loader can mix long texts with short dialogues and tears no
        dialogue.
    shuffle: draw a new order of the documents in every epoch. Where long documents are cut, one of them fills many
        successive sequences; so sequences are shuffled too, among `shuffle_window` of a stream's, to keep one document
        from filling a batch.
    num_epochs: None repeats every source without end and mixes sequences by weight; a number shows every document that
        many times, and weights must be equal.
    streams: the data is dealt into this many streams. Each is packed on its own and gives an equal share of every
        batch's sequences. A host reads only the streams that its sequences come from, so hosts share the work if there
        are at least as many streams as hosts. The batches depend on `streams` and not on the number of hosts: choose
        what the largest machine will need.
    open_sequences: with packing='whole', the sequences that a stream fills at the same time; more of them leave less
        padding.
    read_threads: threads that read and tokenize for each source; 0 does it inside the prefetch thread. The batches
        never depend on it.
    prefetch_sequences: sequences prepared ahead in a background thread; 0 prepares them when asked.
    data_dir: the folder in which TFDS datasets are prepared and found again (None: TFDS's own default,
        ~/tensorflow_datasets or $TFDS_DATA_DIR).
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig("stdlib"),)
    packing: str = "split"
    long_documents: str = "error"
    shuffle: bool = True
    shuffle_window: int = 1024
    num_epochs: int | None = None
    streams: int = 1
    open_sequences: int = 32
    read_threads: int = free(1)
    prefetch_sequences: int = free(64)
    data_dir: str | None = free(None)

    def __post_init__(self):
        check(
            self,
            "data.",
            packing=one_of(PACKINGS),
            long_documents=one_of(LONG_DOCUMENTS),
            streams=at_least(1),
            open_sequences=at_least(1),
            shuffle_window=at_least(1),
            read_threads=at_least(0),
            prefetch_sequences=at_least(0),
            num_epochs=or_none(at_least(1), "to repeat the data without end"),
        )
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one source, for example {'name': 'stdlib'}")
        if self.num_epochs is not None:
            if len({source.weight for source in self.sources}) > 1:
                raise ConfigError(
                    f"data.num_epochs={self.num_epochs} shows every document that many times, so weights cannot "
                    "differ; set num_epochs=None to mix by weight"
                )
            if self.streams > 1:
                raise ConfigError(
                    f"data.num_epochs={self.num_epochs} ends, and the data.streams={self.streams} streams would not "
                    "end together; "
                    "set num_epochs=None, or streams=1, where every host reads all of the data"
                )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "DataConfig":
        """Builds a config from nested mappings (a ConfigDict, JSON).

        Raises ConfigError for an unknown field, naming the nearest, and for a value of the wrong kind.
        """
        return build(cls, fields, "data")
