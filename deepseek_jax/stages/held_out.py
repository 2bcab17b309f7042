"""Held-out text: the data of a stage opened for checks and for evaluation."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

from deepseek_jax.data.checks import check_sources
from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.loader import Loader, build_loader
from deepseek_jax.parallel.arrays import host_share
from deepseek_jax.stages.base import Experiment
from deepseek_jax.training.batches import Batch


def check_data(
    sources: Sequence[SourceConfig], splits: Sequence[str], experiment: Experiment, data_dir: str | None, prepare: bool
) -> None:
    """Opens the sources with the experiment's tokenizer and vocabulary. Raises DataError (see `check_sources`)."""
    check_sources(sources, splits, experiment.tokenizer, data_dir, experiment.model.config.vocab_size, prepare=prepare)


def held_out_batches(
    data: DataConfig, experiment: Experiment, seq_len: int, batch_size: int
) -> Callable[[], Iterator[Batch]]:
    """A function that starts one ordered pass over the held-out documents, and stops the reading threads when the pass
    is dropped. The data is read and checked once, not at every evaluation."""

    @functools.cache
    def opened() -> Loader:
        model = experiment.model
        return build_loader(
            data,
            experiment.tokenizer,
            seq_len,
            batch_size,
            split="validation",
            share=host_share(model.ops),
            vocab_size=model.config.vocab_size,
        )

    def start() -> Iterator[Batch]:
        loader = opened()
        loader.restart()
        with contextlib.closing(loader):
            yield from loader

    return start
