"""Packing: documents to sequences of fixed length, with Grain's packers."""

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from deepseek_jax.data.documents import LOSS_MASK, NUM_BYTES, TOKEN

_FIELD = "document"


def pack_split(documents: grain.IterDataset, seq_len: int) -> grain.IterDataset:
    """Joins documents [tokens, 3] and cuts them every `seq_len` tokens: only the last sequence has padding. Each piece
    is a segment of its own."""
    return grain.experimental.ConcatThenSplitIterDataset(documents.map(_wrap), length_struct={_FIELD: seq_len})


def pack_whole(documents: grain.IterDataset, seq_len: int, open_sequences: int) -> grain.IterDataset:
    """Fits whole documents, none longer than `seq_len`, into `open_sequences` sequences at a time, each where it fits
    best; the rest of a sequence is padding."""
    return grain.experimental.BestFitPackIterDataset(
        documents.map(_wrap), length_struct={_FIELD: seq_len}, num_packing_bins=open_sequences, shuffle_bins=False
    )


class CutOverlapping(grain.experimental.FlatMapTransform):
    """Cuts a document into pieces of at most `seq_len` tokens, each starting with the last token of the piece before.

    The first token of a segment is never a target. With the overlap every token but the document's first is a target
    exactly once, over which held-out bits per byte have to sum.
    """

    max_fan_out = 2**31

    def __init__(self, seq_len: int):
        self._seq_len = seq_len

    def flat_map(self, element: np.ndarray) -> list[np.ndarray]:
        pieces = []
        for start in range(0, max(len(element) - 1, 1), self._seq_len - 1):
            piece = element[start : start + self._seq_len].copy()
            piece[:1, LOSS_MASK:] = 0  # counted in the piece before
            pieces.append(piece)
        return pieces


def finish_sequence(packed: Mapping[str, np.ndarray], pad_id: int) -> dict[str, Any]:
    """The fields of a batch, int32 [T] each, and `num_bytes`, the bytes of text behind the sequence's targets (int32
    scalar)."""
    columns_TC, segment_ids_T = packed[_FIELD], packed[f"{_FIELD}_segment_ids"]
    return {
        "tokens": np.where(segment_ids_T > 0, columns_TC[:, TOKEN], np.int32(pad_id)),
        "segment_ids": segment_ids_T,
        "positions": packed[f"{_FIELD}_positions"],
        "loss_mask": columns_TC[:, LOSS_MASK].copy(),
        "num_bytes": columns_TC[:, NUM_BYTES].sum(dtype=np.int32),
    }


def empty_sequence(seq_len: int, pad_id: int) -> dict[str, Any]:
    """A sequence of padding alone; it fills up the last batch of a finite pass."""
    zeros_T = np.zeros(seq_len, np.int32)
    return {
        "tokens": np.full(seq_len, pad_id, np.int32),
        "segment_ids": zeros_T,
        "positions": zeros_T,
        "loss_mask": zeros_T,
        "num_bytes": np.int32(0),
    }


def _wrap(document: np.ndarray) -> dict[str, np.ndarray]:
    return {_FIELD: document}
