"""The loader: from a DataConfig to batches, with a state that can be saved.

The data is dealt into a fixed number of streams, and sequences [s·B/S, (s+1)·B/S) of every global batch come from
stream s. A process runs the pipelines of the streams that its sequences come from. So the batches depend on the number
of streams and not on the number of processes, and a saved state can be restored with another number of them.
"""

import dataclasses
import itertools
import json
import math
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from deepseek_jax.data import loader_state
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.documents import Documents, Tokenize
from deepseek_jax.data.packing import empty_sequence
from deepseek_jax.data.pipeline import check_lengths, held_out_sequences, training_sequences
from deepseek_jax.data.sources import InMemory, open_source
from deepseek_jax.data.tokenizers import Tokenizer
from deepseek_jax.errors import ConfigError
from deepseek_jax.identity import is_free
from deepseek_jax.ranges import at_least, check_value, one_of

SPLITS = ("train", "validation")
Batch = dict[str, np.ndarray]


class Loader:
    """Iterator over batches: dictionaries of int32 arrays [B / count, T] `tokens`, `segment_ids` (0 = padding),
    `positions` (restart in every segment) and `loss_mask` (1 where the token, as a target, is trained on). B / count is
    the number of sequences of this share.

    Batches of the validation split also have `num_bytes` [B / count]: the bytes of text behind each sequence's targets.
    Summed over a whole pass they are the exact size of the text, so bits per byte = summed loss / ln 2 / summed bytes.
    """

    def __init__(
        self,
        streams: dict[int, grain.IterDataset],
        num_streams: int,
        share: tuple[int, int],
        description: dict[str, Any],
        batch_size: int,
        empty_sequence: dict[str, Any],
    ):
        self._streams, self._num_streams = streams, num_streams
        self._start()
        self._share = share
        self._description = description
        self._empty_sequence = empty_sequence
        self.batch_size = batch_size

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return self.take(self.batch_size)

    def take(self, num_sequences: int) -> Batch:
        """This process's sequences of the next `num_sequences` global ones: a batch of any size, for batch-size ramps.

        The last batch of a finite pass is filled up with empty sequences; after it StopIteration is raised. Raises
        ConfigError if the streams and the shares don't divide `num_sequences`.
        """
        check_divisible(num_sequences, self._num_streams, self._share[1])
        per_stream = num_sequences // self._num_streams
        sequences = []
        for iterator in self._iterators:
            found = list(itertools.islice(iterator, per_stream))
            if not found:
                raise StopIteration
            sequences += found + [self._empty_sequence] * (per_stream - len(found))
        index, count = self._share
        start = index * num_sequences // count - min(self._streams) * per_stream
        mine = sequences[start : start + num_sequences // count]
        fields = [
            field
            for field in self._empty_sequence
            if field != "num_bytes" or self._description["split"] == "validation"
        ]
        return {field: np.stack([sequence[field] for sequence in mine]) for field in fields}

    def get_state(self) -> loader_state.LoaderState:
        """The state of this process's streams, as JSON values. It does not depend on batch size or threads.

        A checkpoint needs the state of all streams, which `loader_state.gather` puts together.
        """
        states = {
            str(stream): iterator.get_state() for stream, iterator in zip(self._streams, self._iterators, strict=True)
        }
        return json.loads(json.dumps({"data": self._description, "streams": states}))

    def set_state(self, state: loader_state.LoaderState) -> None:
        """Restores a saved state; the batches that follow are bit-identical. Raises DataError if it was saved over
        other data."""
        states = loader_state.select(state, json.loads(json.dumps(self._description)), self._streams)
        self.restart()
        for iterator, saved in zip(self._iterators, states, strict=True):
            iterator.set_state(saved)

    def restart(self) -> None:
        """Goes back to the first batch, as after a finished pass."""
        self.close()
        self._start()

    def close(self) -> None:
        """Stops the reading threads. Also happens when the loader is dropped or the program ends."""
        self._finalizer()

    def _start(self) -> None:
        # The finalizer empties the list: the iterators' threads must be gone before the interpreter shuts down.
        self._iterators = [iter(sequences) for sequences in self._streams.values()]
        self._finalizer = weakref.finalize(self, _stop, self._iterators)


def build_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    split: str = "train",
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    *,
    in_memory: InMemory | None = None,
    vocab_size: int | None = None,
) -> Loader:
    """Opens, checks and packs the sources; see `Loader` for the batches.

    Args:
        seq_len: tokens per sequence, T.
        batch_size: sequences per global batch, over all processes; `Loader.batch_size` may be changed later.
        split: 'train', or 'validation' for one ordered pass over the held-out documents in which every token but a
            document's first is a target exactly once (unless the format masks it). It is a single stream.
        share: (index, count): this process holds block `index` of the `count` equal blocks of every batch's sequences.
            Several processes may hold the same one.
        in_memory: for each source that is not on disk: split -> random-access sequence of records, such as {'tokens':
            ids, 'loss_mask': mask} (see `SourceConfig.format`).
        vocab_size: the model's; token ids in the data must be below it (None: the tokenizer's).

    Raises:
        ConfigError: shares, streams and batch_size don't divide.
        DataError: a source is missing, unreadable or empty, has a bad record (named by file and line) or a document
            longer than a sequence (packing 'whole'), or all training documents of a stream together are shorter than
            its share of a batch.
    """
    check_value("split", split, one_of(SPLITS))
    check_value("seq_len", seq_len, at_least(2, why="a token and its target"))
    if split == "validation":
        config = dataclasses.replace(config, streams=1)
    mine = streams_of_share(share, config.streams)
    check_divisible(batch_size, config.streams, share[1])
    vocab_size = vocab_size or tokenizer.vocab_size
    sources = [open_source(source, split, config.data_dir, in_memory, vocab_size) for source in config.sources]
    documents = [
        grain.MapDataset.source(Documents(records, Tokenize(source, tokenizer, vocab_size)))
        for records, source in zip(sources, config.sources, strict=True)
    ]
    streams = {}
    for stream in mine:
        check_lengths(config, documents, seq_len, batch_size // config.streams if split == "train" else 0, stream)
        if split == "train":
            sequences = training_sequences(config, documents, seq_len, tokenizer.pad_id, seed, stream)
        else:
            sequences = held_out_sequences(config, documents, seq_len, tokenizer.pad_id)
        if config.prefetch_sequences:
            sequences = grain.experimental.ThreadPrefetchIterDataset(
                sequences, prefetch_buffer_size=-(-config.prefetch_sequences // len(mine))
            )
        streams[stream] = sequences
    description = _describe(config, sources) | {
        "split": split,
        "seed": seed,
        "seq_len": seq_len,
        "vocab_size": tokenizer.vocab_size,
    }
    return Loader(streams, config.streams, share, description, batch_size, empty_sequence(seq_len, tokenizer.pad_id))


def streams_of_share(share: tuple[int, int], num_streams: int) -> range:
    """The streams of block `share` = (index, count) of the sequences: several whole ones, or one that several blocks
    share.

    Raises ConfigError if the blocks cut across streams.
    """
    index, count = share
    if not 0 <= index < count:
        raise ConfigError(f"share={share}: its first number goes from 0 to {count - 1}, one less than the second")
    if num_streams % count and count % num_streams:
        divisors = ", ".join(str(n) for n in range(1, num_streams + 1) if num_streams % n == 0)
        raise ConfigError(
            f"data.streams={num_streams} cannot be dealt to {count} equal blocks of sequences: the hosts can hold "
            f"{divisors} blocks, or a multiple "
            f"of {num_streams}; or set data.streams to 1 or a multiple of {count}, which is another order of the data"
        )
    return range(index * num_streams // count, -(-(index + 1) * num_streams // count))


def check_divisible(num_sequences: int, num_streams: int, num_blocks: int) -> None:
    """Raises ConfigError unless every stream gives, and every block holds, the same positive number of sequences."""
    unit = math.lcm(num_streams, num_blocks)
    if num_sequences < 1 or num_sequences % unit:
        near = max(unit, num_sequences // unit * unit)
        raise ConfigError(
            f"batch_size={num_sequences} must be a positive multiple of {unit}, such as {near}: "
            f"data.streams={num_streams}, and the hosts hold {num_blocks} equal blocks of its sequences"
        )


def _describe(config: DataConfig, sources: Sequence[Any]) -> dict[str, Any]:
    """Everything a position depends on; what only affects speed is left out."""
    fields, values = dataclasses.fields(config), dataclasses.asdict(config)
    return {field.name: values[field.name] for field in fields if not is_free(field)} | {
        "num_documents": [len(source) for source in sources]
    }


def _stop(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()
