"""Documents to rows of fixed length, with Grain's packers."""

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from deepseek_jax.data.documents import LOSS_MASK, NUM_BYTES, TOKEN

_FIELD = "document"


def pack_split(documents: grain.IterDataset, seq_len: int) -> grain.IterDataset:
    """Joins documents [tokens, 3] and cuts at row borders: no padding but in the last row. Each piece is a segment of
    its own."""
    return grain.experimental.ConcatThenSplitIterDataset(documents.map(_wrap), length_struct={_FIELD: seq_len})


def pack_whole(documents: grain.IterDataset, seq_len: int, open_rows: int) -> grain.IterDataset:
    """Best fit of whole documents, none longer than `seq_len`, into `open_rows` rows at a time; the rest of a row is
    padding."""
    return grain.experimental.BestFitPackIterDataset(
        documents.map(_wrap), length_struct={_FIELD: seq_len}, num_packing_bins=open_rows, shuffle_bins=False
    )


class CutOverlapping(grain.experimental.FlatMapTransform):
    """Cuts a document into pieces of at most `seq_len` tokens, each starting with the last token of the piece before.

    A segment's first token is nobody's target, so this way every token but the document's first is a target exactly
    once: what held-out bits per byte have to sum over.
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


def finish_row(packed: Mapping[str, np.ndarray], pad_id: int) -> dict[str, Any]:
    """The fields of a batch, int32 [T] each, and `num_bytes`, the bytes of text behind the row's targets (int32
    scalar)."""
    columns_TC, segment_ids_T = packed[_FIELD], packed[f"{_FIELD}_segment_ids"]
    return {
        "tokens": np.where(segment_ids_T > 0, columns_TC[:, TOKEN], np.int32(pad_id)),
        "segment_ids": segment_ids_T,
        "positions": packed[f"{_FIELD}_positions"],
        "loss_mask": columns_TC[:, LOSS_MASK].copy(),
        "num_bytes": columns_TC[:, NUM_BYTES].sum(dtype=np.int32),
    }


def empty_row(seq_len: int, pad_id: int) -> dict[str, Any]:
    """A row that is padding throughout; it fills up the last batch of a finite pass."""
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
