"""The Grain pipeline: sources -> documents -> shuffle -> rows -> mix -> batches, with a position that can be saved.

Every process runs the same pipeline over the same global rows and keeps its slice of each batch, so the batches do not depend
on how many processes there are, and a saved position can be restored with another number of them.
"""

import dataclasses
import functools
import json
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.documents import Tokenise
from deepseek_jax.data.packing import CutOverlapping, empty_row, finish_row, pack_split, pack_whole
from deepseek_jax.data.sources import InMemory, open_source
from deepseek_jax.data.tokenizers import Tokenizer
from deepseek_jax.errors import ConfigError, DataError, nearest

SPLITS = ("train", "validation")
Batch = dict[str, np.ndarray]


class Loader:
    """Iterator over batches: dictionaries of int32 arrays [B / process_count, T] `tokens`, `segment_ids` (0 = padding), `positions`
    (restart in every segment), `loss_mask` (1 where the token, as a target, is trained on).

    Batches of the validation split also have `num_bytes` [B / process_count]: the bytes of text behind each row's targets. Summed
    over a whole pass they are the exact size of the text, so bits per byte = summed loss / ln 2 / summed bytes.
    """

    def __init__(
        self, rows: grain.IterDataset, description: dict[str, Any], batch_size: int, seq_len: int, pad_id: int, process: tuple[int, int]
    ):
        self._rows = rows
        self._start()
        self._description = description
        self._empty_row = empty_row(seq_len, pad_id)
        self._process_index, self._process_count = process
        self.batch_size = batch_size
        self._check_divisible(batch_size)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return self.take(self.batch_size)

    def take(self, num_rows: int) -> Batch:
        """This process's slice of the next `num_rows` global rows: a batch of any size, for batch-size ramps.

        The last batch of a finite pass is filled up with empty rows; after it StopIteration is raised.
        """
        self._check_divisible(num_rows)
        rows = []
        for row in self._iterators[0]:
            rows.append(row)
            if len(rows) == num_rows:
                break
        if not rows:
            raise StopIteration
        rows += [self._empty_row] * (num_rows - len(rows))
        share = num_rows // self._process_count
        mine = rows[self._process_index * share : (self._process_index + 1) * share]
        fields = [field for field in self._empty_row if field != "num_bytes" or self._description["split"] == "validation"]
        return {field: np.stack([row[field] for row in mine]) for field in fields}

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values: the same on every process, and independent of batch size and threads."""
        return json.loads(json.dumps({"data": self._description, "position": self._iterators[0].get_state()}))

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position; the batches that follow are bit-identical. Raises DataError if it was saved over other data."""
        saved = state["data"]
        now = json.loads(json.dumps(self._description))
        changed = [f"{name} was {saved.get(name)!r} and is {now[name]!r}" for name in now if saved.get(name) != now[name]]
        if changed:
            raise DataError(f"the saved data position belongs to other data: {'; '.join(changed)}. Restore the setting or start a new run")
        self.close()
        self._start()
        self._iterators[0].set_state(_restore_tuples(state["position"]))

    def close(self) -> None:
        """Stops the reading threads. Happens by itself when the loader is dropped or the program ends."""
        self._finalizer()

    def _start(self) -> None:
        # In a list, so that the finalizer can drop the iterator, whose threads must be gone before the interpreter shuts down.
        self._iterators = [iter(self._rows)]
        self._finalizer = weakref.finalize(self, _stop, self._iterators)

    def _check_divisible(self, num_rows: int) -> None:
        if num_rows < 1 or num_rows % self._process_count:
            raise ConfigError(f"batch_size={num_rows} must be a positive multiple of the number of processes, {self._process_count}")


def build_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    split: str = "train",
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    *,
    in_memory: InMemory | None = None,
) -> Loader:
    """Opens, checks and packs the sources; see `Loader` for what comes out.

    Args:
        seq_len: tokens per row, T.
        batch_size: rows per global batch, over all processes; `Loader.batch_size` may be changed later.
        split: 'train', or 'validation' for one ordered pass over the held-out documents in which every token but a
            document's first is a target exactly once (unless the format masks it).
        in_memory: for each source that is not on disk: split -> random-access sequence of records, such as
            {'tokens': ids, 'loss_mask': mask} (see `SourceConfig.format`).

    Raises: DataError when a source is missing, unreadable, empty, has a bad record, has a document longer than a row (packing
    'whole'), or when all training documents together are shorter than one batch.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: {nearest(split, SPLITS)}")
    if seq_len < 2:
        raise ConfigError(f"seq_len={seq_len}: at least 2, a token and its target")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index={process_index}: from 0 to process_count - 1 = {process_count - 1}")
    sources = [open_source(source, split, config.data_dir, in_memory) for source in config.sources]
    documents = [
        grain.MapDataset.source(records).map(Tokenise(source, tokenizer)) for records, source in zip(sources, config.sources, strict=True)
    ]
    _check_lengths(config, documents, seq_len, batch_size if split == "train" else 0)

    if split == "validation":
        rows = _rows(config, grain.MapDataset.concatenate(documents), seq_len, held_out=True)
    elif config.num_epochs is not None:
        together = _shuffled(config, grain.MapDataset.concatenate(documents), seed, 0).repeat(config.num_epochs)
        rows = _shuffled_rows(config, _rows(config, together, seq_len), seed, 0)
    else:
        endless = [
            _shuffled_rows(config, _rows(config, _shuffled(config, source, seed, i).repeat(), seq_len), seed, i) for i, source in enumerate(documents)
        ]
        rows = grain.IterDataset.mix(endless, weights=[source.weight for source in config.sources])
    rows = rows.map(functools.partial(finish_row, pad_id=tokenizer.pad_id))
    if config.prefetch_rows:
        rows = grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=config.prefetch_rows)
    description = _describe(config, sources) | {"split": split, "seed": seed, "seq_len": seq_len, "vocab_size": tokenizer.vocab_size}
    return Loader(rows, description, batch_size, seq_len, tokenizer.pad_id, (process_index, process_count))


def _shuffled(config: DataConfig, documents: grain.MapDataset, seed: int, index: int) -> grain.MapDataset:
    """A new order in every epoch. Grain adds the epoch to the seed, so the seeds of two sources must not lie side by side."""
    if not config.shuffle:
        return documents
    return documents.shuffle(seed=int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))


def _shuffled_rows(config: DataConfig, rows: grain.IterDataset, seed: int, index: int) -> grain.IterDataset:
    """Pieces of one document, which packing leaves side by side, spread over many batches."""
    cuts = config.packing == "split" or config.long_documents == "cut"
    if not (config.shuffle and cuts) or config.shuffle_window == 1:
        return rows
    window_seed = int(np.random.SeedSequence([seed, index, 1]).generate_state(1)[0])
    return grain.experimental.WindowShuffleIterDataset(rows, window_size=config.shuffle_window, seed=window_seed)


def _rows(config: DataConfig, documents: grain.MapDataset, seq_len: int, held_out: bool = False) -> grain.IterDataset:
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=16))
    if config.packing == "split" and not held_out:
        return pack_split(stream, seq_len)
    if config.packing == "split" or config.long_documents == "cut":
        stream = grain.experimental.FlatMapIterDataset(stream, CutOverlapping(seq_len))
    elif config.long_documents == "truncate":
        stream = stream.map(lambda document: document[:seq_len])
    return pack_whole(stream, seq_len, config.open_rows)


def _check_lengths(config: DataConfig, documents: Sequence[grain.MapDataset], seq_len: int, batch_size: int) -> None:
    """Raises DataError for less than one batch of tokens, or for a document that does not fit into its row.

    The first stops as soon as one batch is found; the second has to look at every document.
    """
    refuse_long = config.packing == "whole" and config.long_documents == "error"
    total, needed = 0, batch_size * seq_len
    for source, source_documents in zip(config.sources, documents, strict=True):
        for index in range(len(source_documents)):
            if total >= needed and not refuse_long:
                return
            length = len(source_documents[index])
            total += length
            if refuse_long and length > seq_len:
                raise DataError(
                    f"source {source.name!r}: document {index} has {length} tokens, more than seq_len={seq_len}; raise seq_len, or set "
                    "data.long_documents='cut' or 'truncate', or data.packing='split'"
                )
    if total < needed:
        names = ", ".join(repr(source.name) for source in config.sources)
        raise DataError(
            f"{names}: {total} tokens in all, fewer than one batch of {batch_size} rows × {seq_len} tokens; "
            "add text, or lower batch_size or seq_len"
        )


def _describe(config: DataConfig, sources: Sequence[Any]) -> dict[str, Any]:
    """Everything a position depends on; what only affects speed is left out."""
    fields = dataclasses.asdict(config)
    for name in ("data_dir", "read_threads", "prefetch_rows"):
        del fields[name]
    return fields | {"num_documents": [len(source) for source in sources]}


def _stop(iterators: list[grain.DatasetIterator]) -> None:
    iterators.pop().close()


def _restore_tuples(state: Any) -> Any:
    """JSON turns tuples into lists, but Grain's packer recognises its 'nothing left over' slices only as tuples."""
    if isinstance(state, dict):
        return {k: {n: tuple(s) for n, s in v.items()} if k == "remainder_slices" else _restore_tuples(v) for k, v in state.items()}
    return [_restore_tuples(item) for item in state] if isinstance(state, list) else state
