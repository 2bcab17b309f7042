"""The loader's promises: resume, hosts, threads, mixing, and errors before training starts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.loader import build_loader
from deepseek_jax.errors import ConfigError, DataError

T, B = 16, 4


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[field], b[field]) for field in a)


@pytest.fixture(scope="module")
def make(documents, byte_tokenizer):
    """Two sources mixed 3:1: traced ids, and sequences of short texts."""
    texts = [{"text": f"text number {i}"} for i in range(30)]
    memory = {"ids": {"train": documents, "validation": documents}, "texts": {"train": texts, "validation": texts}}

    def build(split="train", seed=0, share=(0, 1), seq_len=T, batch_size=B, **config):
        sources = (SourceConfig("ids", weight=3.0, format="tokens"), SourceConfig("texts"))
        config = DataConfig(**({"sources": sources, "shuffle_window": 8} | config))
        return build_loader(
            config, byte_tokenizer, seq_len, batch_size, split, seed, share, in_memory=memory, vocab_size=4096
        )

    return build


ENDLESS_SPLIT = {}
FINITE_SPLIT = {"sources": (SourceConfig("ids", format="tokens"),), "num_epochs": 2}
WHOLE = {"packing": "whole", "seq_len": 64, "open_sequences": 3, "prefetch_sequences": 5}
HELD_OUT = {"split": "validation"}


@pytest.mark.parametrize(
    "kwargs", [ENDLESS_SPLIT, FINITE_SPLIT, WHOLE, HELD_OUT], ids=["split", "finite", "whole", "held-out"]
)
def test_resuming_anywhere_is_bit_identical(make, kwargs):
    loader = make(**kwargs)
    states, batches = [loader.get_state()], []
    for batch in loader:
        batches.append(batch)
        states.append(json.loads(json.dumps(loader.get_state())))
        if len(batches) == 40:
            break
    assert len(batches) > 10
    resumed = make(**kwargs)
    for position in [*range(0, len(batches), 3), 1, len(batches)]:  # forwards, and back to the start
        resumed.set_state(states[position])
        assert resumed.get_state() == states[position]
        for expected in batches[position : position + 4]:
            assert same(next(resumed), expected), f"after resuming at batch {position}"
    if kwargs in (FINITE_SPLIT, HELD_OUT):
        resumed.set_state(states[-1])
        with pytest.raises(StopIteration):
            next(resumed)


@pytest.mark.parametrize("kwargs", [ENDLESS_SPLIT, FINITE_SPLIT, HELD_OUT], ids=["split", "finite", "held-out"])
def test_slices_of_the_hosts_make_up_the_same_global_batches(make, kwargs):
    whole, *hosts = make(**kwargs), *(make(share=(i, 2), **kwargs) for i in range(2))
    for _ in range(8):
        parts = [next(host) for host in hosts]
        assert all(len(part["tokens"]) == B // 2 for part in parts)
        assert same(next(whole), {field: np.concatenate([part[field] for part in parts]) for field in parts[0]})
    assert hosts[0].get_state() == hosts[1].get_state() == whole.get_state(), (
        "a position can be restored with another number of hosts"
    )


def test_threads_do_not_change_the_batches(make):
    plain = make(read_threads=0, prefetch_sequences=0)
    for threads, sequences in ((1, 0), (4, 7)):
        other = make(read_threads=threads, prefetch_sequences=sequences)
        other.set_state(plain.get_state())  # positions carry over, too
        start = plain.get_state()
        assert all(same(next(plain), next(other)) for _ in range(30))
        plain.set_state(start)


def test_seed_decides_the_order(make):
    assert same(next(make(seed=1)), next(make(seed=1)))
    assert not same(next(make(seed=1)), next(make(seed=2)))


def test_batch_size_may_grow_without_losing_the_place(make):
    steady, ramped = make(), make()
    sequences = np.concatenate([next(steady)["tokens"] for _ in range(6)])
    first = ramped.take(B)
    ramped.batch_size = 2 * B
    np.testing.assert_array_equal(
        np.concatenate([first["tokens"], next(ramped)["tokens"], ramped.take(3 * B)["tokens"]]), sequences
    )


def test_weights_are_shares_of_the_sequences(make):
    sequences = make().take(50 * B)["tokens"]
    assert (sequences[:, 0] >= 1000).mean() == 0.75
    assert not ((sequences >= 1000).any(axis=1) & (sequences < 1000).any(axis=1)).any(), (
        "a sequence holds documents of one source"
    )


def test_last_batch_of_a_pass_is_filled_up_with_empty_sequences(make):
    *_, last = make(**FINITE_SPLIT)
    assert last["tokens"].shape == (B, T)
    assert not last["segment_ids"][-1].any() and last["segment_ids"][0].any()


def test_empty_and_too_short_data_are_refused(byte_tokenizer):
    config = DataConfig(sources=(SourceConfig("texts"),))
    with pytest.raises(DataError, match="'texts' has no documents in its train split"):
        build_loader(config, byte_tokenizer, T, B, in_memory={"texts": {"train": []}})
    with pytest.raises(DataError, match="'texts': 11 tokens in all, fewer than one batch of 4 sequences × 16 tokens"):
        build_loader(config, byte_tokenizer, T, B, in_memory={"texts": {"train": [{"text": "nine byte"}]}})
    with pytest.raises(DataError, match="'texts': 30 tokens in all, fewer than one batch of 4 sequences × 16 tokens"):
        build_loader(config, byte_tokenizer, T, B, in_memory={"texts": {"train": [{"text": 28 * "x"}]}})
    with pytest.raises(DataError, match="in-memory source 'texts': no split 'validation': .*train"):
        build_loader(config, byte_tokenizer, T, B, "validation", in_memory={"texts": {"train": []}})


def test_a_bad_record_found_while_training_is_named(byte_tokenizer):
    records = [{"text": "long enough " * 20}, {"body": "x"}]
    config = DataConfig(sources=(SourceConfig("texts"),), shuffle=False)
    loader = build_loader(config, byte_tokenizer, T, B, in_memory={"texts": {"train": records}})
    with pytest.raises(DataError, match="source 'texts' record 1: no field 'text'; the fields are: body"):
        loader.take(100)


def test_a_position_of_other_data_is_refused(make):
    state = make().get_state()
    with pytest.raises(DataError, match="seq_len was 16 and is 32"):
        make(seq_len=32).set_state(state)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"packin": "whole"}, r"unknown field data.packin: did you mean 'packing'"),
        ({"packing": "hole"}, r"data.packing='hole': did you mean 'whole'"),
        (
            {"sources": [{"name": "x", "text_feild": "t"}]},
            r"unknown field data.sources\[0\].text_feild: did you mean 'text_field'",
        ),
        ({"sources": [{"weight": 1.0}]}, r"missing field data.sources\[0\].name"),
        ({"sources": [{"name": "x", "weight": 0}]}, r"'x': weight=0.0: must be above 0"),
        ({"sources": []}, r"data.sources is empty"),
        ({"sources": {"name": "x"}}, r"data.sources={'name': 'x'}: must be a list"),
        ({"num_epochs": 0}, r"data.num_epochs=0: must be at least 1"),
        ({"streams": 0}, r"data.streams=0: must be at least 1"),
        (
            {"num_epochs": 1, "streams": 4},
            r"the data.streams=4 streams would not end together; set num_epochs=None, or streams=1",
        ),
        ({"num_epochs": 1, "sources": [{"name": "x"}, {"name": "y", "weight": 2}]}, r"weights cannot differ"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig.from_dict(fields)


def test_config_from_dict():
    config = DataConfig.from_dict(
        {"sources": [{"name": "stdlib", "max_bytes": 10}, {"name": "a.txt", "weight": 2}], "packing": "whole"}
    )
    assert (
        config.sources == (SourceConfig("stdlib", max_bytes=10), SourceConfig("a.txt", weight=2))
        and config.packing == "whole"
    )


def test_loader_arguments_are_checked(make):
    with pytest.raises(ConfigError, match="split='test'"):
        make(split="test")
    with pytest.raises(
        ConfigError, match="batch_size=4 must be a positive multiple of 3, such as 3: .* the hosts hold 3 equal blocks"
    ):
        make(share=(0, 3))
    with pytest.raises(ConfigError, match=r"share=\(2, 2\): its first number goes from 0 to 1"):
        make(share=(2, 2))


PROGRAM = """
import sys
from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.loader import build_loader
from deepseek_jax.data.tokenizers import load_tokenizer
config = DataConfig(sources=(SourceConfig('stdlib', max_bytes=100_000),), data_dir=sys.argv[1])
loaders = [build_loader(config, load_tokenizer('byte'), 64, 4, split) for split in ('train', 'validation')]
for loader in loaders:
    next(loader)
print('tensorflow' in sys.modules)
"""


def test_tensorflow_is_never_imported_and_the_program_ends_quietly(tmp_path):
    """Even where a package of that name is installed: this one says so when it is imported."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("print('imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "data")], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "False", "")


def test_pieces_of_a_long_document_are_spread_over_batches(byte_tokenizer):
    """Packing leaves the sequences of one document side by side; the window keeps them from filling a batch, and loses
    none."""
    records = [{"tokens": np.full(20 * T, document)} for document in range(8)]

    def sequences(window):
        config = DataConfig(sources=(SourceConfig("long", format="tokens"),), num_epochs=1, shuffle_window=window)
        return np.concatenate(
            [
                batch["tokens"]
                for batch in build_loader(config, byte_tokenizer, T, B, in_memory={"long": {"train": records}})
            ]
        )

    together, spread = sequences(1), sequences(80)
    assert sorted(together[:, 0]) == sorted(spread[:, 0])
    neighbors_alike = [float((x[1:, 0] == x[:-1, 0]).mean()) for x in (together, spread)]
    assert neighbors_alike[0] > 0.9 and neighbors_alike[1] < 0.5
