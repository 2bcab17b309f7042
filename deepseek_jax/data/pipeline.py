"""The Grain pipeline of one stream: documents -> shuffle -> this stream's share -> sequences -> mix."""

import functools
from collections.abc import Sequence

import grain
import numpy as np

from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.packing import CutOverlapping, finish_sequence, pack_split, pack_whole
from deepseek_jax.errors import DataError


def training_sequences(
    config: DataConfig, documents: Sequence[grain.MapDataset], seq_len: int, pad_id: int, seed: int, stream: int
) -> grain.IterDataset:
    """Sequences of one of `config.streams` streams; `documents` holds all documents of each source.

    In every epoch a source is shuffled anew and dealt round robin, so that the streams together show each document
    once.
    """
    if config.num_epochs is not None:
        together = _shuffled(config, grain.MapDataset.concatenate(list(documents)), seed, 0).repeat(config.num_epochs)
        sequences = _shuffled_sequences(config, _sequences(config, together, seq_len), seed, 0, stream)
    else:
        shares = [
            _shuffled(config, source, seed, i)[stream :: config.streams].repeat() for i, source in enumerate(documents)
        ]
        endless = [
            _shuffled_sequences(config, _sequences(config, share, seq_len), seed, i, stream)
            for i, share in enumerate(shares)
        ]
        sequences = grain.IterDataset.mix(endless, weights=[source.weight for source in config.sources])
    return sequences.map(functools.partial(finish_sequence, pad_id=pad_id))


def held_out_sequences(
    config: DataConfig, documents: Sequence[grain.MapDataset], seq_len: int, pad_id: int
) -> grain.IterDataset:
    """Sequences of one ordered pass in which every token but a document's first is a target once."""
    sequences = _sequences(config, grain.MapDataset.concatenate(list(documents)), seq_len, held_out=True)
    return sequences.map(functools.partial(finish_sequence, pad_id=pad_id))


def _shuffled(config: DataConfig, documents: grain.MapDataset, seed: int, index: int) -> grain.MapDataset:
    """Shuffles anew in every epoch. Grain adds the epoch to the seed, so the seeds of two sources must not be
    neighbors."""
    if not config.shuffle:
        return documents
    return documents.shuffle(seed=_seed(seed, index))


def _shuffled_sequences(
    config: DataConfig, sequences: grain.IterDataset, seed: int, index: int, stream: int
) -> grain.IterDataset:
    """Spreads pieces of one document, which packing leaves next to each other, over many batches."""
    cuts = config.packing == "split" or config.long_documents == "cut"
    if not (config.shuffle and cuts) or config.shuffle_window == 1:
        return sequences
    return grain.experimental.WindowShuffleIterDataset(
        sequences, window_size=config.shuffle_window, seed=_seed(seed, index, 1, stream)
    )


def _seed(*path: int) -> int:
    return int(np.random.SeedSequence(path).generate_state(1)[0])


def _sequences(
    config: DataConfig, documents: grain.MapDataset, seq_len: int, held_out: bool = False
) -> grain.IterDataset:
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=16))
    if config.packing == "split" and not held_out:
        return pack_split(stream, seq_len)
    if config.packing == "split" or config.long_documents == "cut":
        stream = grain.experimental.FlatMapIterDataset(stream, CutOverlapping(seq_len))
    elif config.long_documents == "truncate":
        stream = stream.map(lambda document: document[:seq_len])
    return pack_whole(stream, seq_len, config.open_sequences)


def check_lengths(
    config: DataConfig, documents: Sequence[grain.MapDataset], seq_len: int, num_sequences: int, stream: int
) -> None:
    """Raises DataError for a stream with less text than its `num_sequences` sequences of a batch, or for a document
    that is longer than a sequence.

    Looks at the documents that the stream would get without shuffling, at least one of each source: all streams
    together look at all of them. The first check stops as soon as the sequences are filled; the second has to look at
    every document.
    """
    streams = config.streams
    refuse_long = config.packing == "whole" and config.long_documents == "error"
    total, needed = 0, num_sequences * seq_len
    for source, source_documents in zip(config.sources, documents, strict=True):
        if len(source_documents) < streams:
            raise DataError(
                f"source {source.name!r} has {len(source_documents)} documents, too few for data.streams={streams}: "
                "lower data.streams"
            )
        for index in range(stream, len(source_documents), streams):
            if total >= needed and not refuse_long and index > stream:  # the first one is looked at in any case
                break
            length = len(source_documents[index])
            total += length
            if refuse_long and length > seq_len:
                raise DataError(
                    f"source {source.name!r}: document {index} has {length} tokens, more than seq_len={seq_len}; raise "
                    "seq_len, or set data.long_documents='cut' or 'truncate', or data.packing='split'"
                )
    if total < needed:
        names = ", ".join(repr(source.name) for source in config.sources)
        where, whole, advice = "in all", "one batch of", ""
        if streams > 1:
            where, whole, advice = f"in stream {stream} of {streams}", "its share of a batch,", "lower data.streams, "
        raise DataError(
            f"{names}: {total} tokens {where}, fewer than {whole} {num_sequences} sequences × {seq_len} tokens; "
            f"add text, or {advice}lower batch_size or seq_len"
        )
