"""Batches for a training step: their sizes, and checks that they fit the model."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from deepseek_jax.errors import DataError
from deepseek_jax.training.config import TrainConfig

Batch = Mapping[str, np.ndarray]
FIELDS = ("tokens", "segment_ids", "positions", "loss_mask")


class Loader(Protocol):
    """An endless loader of batches whose state can be saved; `take` is needed only where the batch size is
    scheduled."""

    def __next__(self) -> Batch: ...
    def take(self, num_sequences: int) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


def step_batches(
    loader: Loader, config: TrainConfig, vocab_size: int, first_step: int, shards: int = 1
) -> Iterator[Batch]:
    """The checked batch of each step: the loader's own, or as many sequences as the schedule says, a multiple of the
    microbatch and of the `shards` that a mesh divides it into."""
    for step in itertools.count(first_step):
        try:
            if config.batch_size is None:
                batch = next(loader)
            else:
                batch = loader.take(int(batch_size_at(config, step, shards)))
        except StopIteration:
            raise DataError(
                f"the data ended after {step} of {config.steps} steps: repeat it more often or lower train.steps"
            ) from None
        yield check_batch(batch, vocab_size)


def batch_size_at(config: TrainConfig, step: Any, shards: int = 1) -> np.ndarray:
    """Sequences of the batches at `step`, one or an array of them, where their size is scheduled: rounded to a multiple
    of the microbatch and of the `shards` that a mesh divides them into."""
    unit = math.lcm(max(config.microbatch, 1), shards)
    return np.maximum(unit, np.round(np.asarray(config.batch_size(step), np.float64) / unit) * unit).astype(np.int64)


def check_batch(batch: Batch, vocab_size: int) -> Batch:
    """The fields a step takes, of this process's sequences. Raises DataError for a batch that does not fit the
    model."""
    missing = [field for field in FIELDS if field not in batch]
    if missing:
        raise DataError(f"a batch lacks {', '.join(missing)}; it has {', '.join(batch)}")
    check_tokens(batch["tokens"], vocab_size)
    return {field: batch[field] for field in FIELDS}


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises DataError for ids that are not integers of the vocabulary: the embedding would clamp them in silence."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"a batch has tokens of dtype {tokens.dtype}: token ids are integers")
    smallest, largest = int(np.min(tokens)), int(np.max(tokens))
    if smallest < 0:
        raise DataError(
            f"token {smallest} is negative: ids go from 0 to {vocab_size - 1}; see which source the record comes from"
        )
    if largest >= vocab_size:
        raise DataError(
            f"token {largest} is outside the model's vocabulary of {vocab_size}: raise model.vocab_size or change "
            "tokenizer"
        )
