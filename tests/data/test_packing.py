"""Rows against a brute-force reading of what packing means."""

import numpy as np
import pytest

from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.loader import build_loader
from deepseek_jax.errors import DataError

T = 16
SOURCE = SourceConfig("ids", format="tokens")


def load(documents, tokenizer, split="train", batch_size=4, seq_len=T, **config):
    config = DataConfig(sources=(SOURCE,), **config)
    return build_loader(
        config,
        tokenizer,
        seq_len,
        batch_size,
        split,
        in_memory={"ids": {"train": documents, "validation": documents}},
        vocab_size=4096,
    )


def segments(batches):
    """Every segment as (tokens, loss_mask), in sequence order; checks what has to hold in any sequence."""
    found = []
    for batch in batches:
        assert all(value.dtype == np.int32 for value in batch.values())
        for tokens, ids, positions, mask in zip(
            batch["tokens"], batch["segment_ids"], batch["positions"], batch["loss_mask"], strict=True
        ):
            used = int((ids > 0).sum())
            assert (ids[:used] > 0).all() and (np.diff(ids[:used]) >= 0).all(), (
                "segments lie side by side, padding at the end"
            )
            assert (tokens[used:] == 256).all() and not mask[used:].any() and not positions[used:].any()
            for segment in range(1, ids.max() + 1):
                inside = ids == segment
                assert inside.any(), "segment ids count up from 1 without gaps"
                np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
                found.append((tokens[inside], mask[inside]))
    return found


def test_split_packing_is_the_concatenation_cut_every_T_tokens(documents, byte_tokenizer):
    batches = list(load(documents, byte_tokenizer, num_epochs=1, shuffle=False))
    sequences = {field: np.concatenate([batch[field] for batch in batches]) for field in batches[0]}
    joined = np.concatenate([document["tokens"] for document in documents])
    owner = np.concatenate([np.full(len(document["tokens"]), i) for i, document in enumerate(documents)])
    masks = np.concatenate([document["loss_mask"] for document in documents])
    flat = {field: value.reshape(-1)[: len(joined)] for field, value in sequences.items()}
    np.testing.assert_array_equal(flat["tokens"], joined)
    np.testing.assert_array_equal(flat["loss_mask"], masks)
    assert not sequences["segment_ids"].reshape(-1)[len(joined) :].any(), "only the end of the pass is padding"
    new_segment = (np.arange(len(joined)) % T == 0) | (np.diff(owner, prepend=-1) != 0)
    starts = np.flatnonzero(new_segment)
    expected_position = np.arange(len(joined)) - starts[np.cumsum(new_segment) - 1]
    np.testing.assert_array_equal(flat["positions"], expected_position)
    first_of_sequence = np.cumsum(new_segment)[np.arange(len(joined)) // T * T]
    np.testing.assert_array_equal(flat["segment_ids"], np.cumsum(new_segment) - first_of_sequence + 1)
    segments(batches)


def test_whole_packing_keeps_every_document_in_one_segment(documents, byte_tokenizer):
    batches = list(load(documents, byte_tokenizer, seq_len=48, packing="whole", num_epochs=1))
    found = {tokens[0]: (tokens, mask) for tokens, mask in segments(batches)}
    assert len(found) == len(documents)
    for document in documents:
        tokens, mask = found[document["tokens"][0]]
        np.testing.assert_array_equal(tokens, document["tokens"])
        np.testing.assert_array_equal(mask, document["loss_mask"])
    used = np.concatenate([batch["segment_ids"] > 0 for batch in batches]).any(axis=1).sum() * 48
    assert sum(len(document["tokens"]) for document in documents) / used > 0.85, "best fit leaves little padding"


def test_every_epoch_shows_every_document_in_a_new_order(documents, byte_tokenizer):
    order = [
        tokens[0]
        for tokens, _ in segments(
            load(documents, byte_tokenizer, seq_len=48, packing="whole", num_epochs=2, open_sequences=1)
        )
    ]
    first, second = order[: len(documents)], order[len(documents) :]
    assert set(first) == set(second) == {document["tokens"][0] for document in documents}
    assert first != second


def test_long_documents_are_refused_by_name_or_truncated(documents, byte_tokenizer):
    with pytest.raises(DataError, match=r"'ids': document \d+ has \d+ tokens, more than seq_len=16; .*truncate.*split"):
        load(documents, byte_tokenizer, packing="whole")
    behind = [{"tokens": np.arange(T)}] * 40 + [{"tokens": np.arange(T + 1)}]  # the rows are full long before it
    with pytest.raises(DataError, match="'ids': document 40 has 17 tokens, more than seq_len=16"):
        load(behind, byte_tokenizer, packing="whole")
    cut = segments(load(documents, byte_tokenizer, packing="whole", long_documents="truncate", num_epochs=1))
    assert sorted(tuple(tokens) for tokens, _ in cut) == sorted(tuple(document["tokens"][:T]) for document in documents)


def test_long_documents_may_be_cut_while_short_ones_stay_whole(documents, byte_tokenizer):
    pieces = segments(load(documents, byte_tokenizer, packing="whole", long_documents="cut", num_epochs=1))
    whole = [tuple(document["tokens"]) for document in documents if len(document["tokens"]) <= T]
    assert whole and set(whole) <= {tuple(tokens) for tokens, _ in pieces}
    targets = sorted(
        token for tokens, mask in pieces for token, wanted in zip(tokens[1:], mask[1:], strict=True) if wanted
    )
    assert targets == sorted(
        t for document in documents for t, m in zip(document["tokens"][1:], document["loss_mask"][1:], strict=True) if m
    )


@pytest.mark.parametrize("seq_len", [2, 7, 16, 64])
def test_held_out_pass_has_every_token_but_the_first_as_a_target_once(documents, byte_tokenizer, seq_len):
    batches = list(load(documents, byte_tokenizer, "validation", seq_len=seq_len))
    targets = sorted(
        token
        for tokens, mask in segments(batches)
        for token, wanted in zip(tokens[1:], mask[1:], strict=True)
        if wanted
    )
    expected = sorted(
        t for document in documents for t, m in zip(document["tokens"][1:], document["loss_mask"][1:], strict=True) if m
    )
    assert targets == expected


def test_held_out_bytes_sum_to_the_size_of_the_text(byte_tokenizer):
    texts = ["héllo wörld" * 9, "", "日本語のテキスト", "x" * 100]
    config = DataConfig(sources=(SourceConfig("texts"),))
    records = {"texts": {"validation": [{"text": text} for text in texts]}}
    batches = list(build_loader(config, byte_tokenizer, 10, 3, "validation", in_memory=records))
    assert sum(int(batch["num_bytes"].sum()) for batch in batches) == sum(len(text.encode()) for text in texts)
    bytes_R = np.concatenate([batch["num_bytes"] for batch in batches])
    targets_R = np.concatenate([batch["loss_mask"].sum(axis=1) for batch in batches])
    segments_R = np.concatenate([batch["segment_ids"].max(axis=1) for batch in batches])
    assert (bytes_R <= targets_R).all() and (bytes_R >= targets_R - segments_R).all(), (
        "sequences carry the bytes of their own targets"
    )


def test_the_held_out_pass_is_always_the_same(documents, byte_tokenizer):
    first, second = (list(load(documents, byte_tokenizer, "validation")) for _ in range(2))
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for field in a:
            np.testing.assert_array_equal(a[field], b[field])
