"""Streams: the batches are the same for any number of hosts, and each host reads only what its sequences come from."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.data import loader_state
from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.loader import build_loader
from deepseek_jax.errors import ConfigError, DataError

T, B, STREAMS = 16, 8, 4


class Counted(list):
    """Records that note which of them were read."""

    def __init__(self, records):
        super().__init__(records)
        self.reads = []

    def __getitem__(self, index):
        self.reads.append(index)
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def make(documents, byte_tokenizer):
    """Two sources mixed 3:1: traced ids, and short texts. `records` replaces the first."""

    def build(share=(0, 1), split="train", seed=0, batch_size=B, records=documents, **config):
        texts = [{"text": f"text number {i}"} for i in range(30)]
        memory = {"ids": {"train": records, "validation": records}, "texts": {"train": texts, "validation": texts}}
        sources = (SourceConfig("ids", weight=3.0, format="tokens"), SourceConfig("texts"))
        config = DataConfig(
            **(
                {
                    "sources": sources,
                    "streams": STREAMS,
                    "shuffle_window": 8,
                    "read_threads": 0,
                    "prefetch_sequences": 0,
                }
                | config
            )
        )
        return build_loader(
            config, byte_tokenizer, T, batch_size, split, seed, share, in_memory=memory, vocab_size=4096
        )

    return build


def hosts(make, count, **kwargs):
    return [make(share=(i, count), **kwargs) for i in range(count)]


def joined(loaders, num_sequences=B):
    """The global batch that several hosts hold parts of."""
    parts = [loader.take(num_sequences) for loader in loaders]
    assert all(len(part["tokens"]) == num_sequences // len(loaders) for part in parts)
    return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for field in batch:
        np.testing.assert_array_equal(batch[field], expected[field], err_msg=field)


def saved(loaders):
    """The loader state that a checkpoint of these hosts holds."""
    return json.loads(json.dumps(loader_state.merge([loader.get_state() for loader in loaders])))


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize(
    "packing",
    [{}, {"packing": "whole", "long_documents": "cut", "open_sequences": 3, "prefetch_sequences": 3}],
    ids=["split", "whole"],
)
def test_any_number_of_hosts_gives_the_same_batches(make, count, packing):
    whole, several = make(**packing), hosts(make, count, **packing)
    for _ in range(6):
        assert_same(joined(several), next(whole))
    assert saved(several) == whole.get_state()


@pytest.mark.parametrize("before, after", [(4, 2), (1, 8), (8, 1)])
def test_a_position_is_restored_with_another_number_of_hosts(make, before, after):
    steady, first, then = make(), hosts(make, before), hosts(make, after)
    for _ in range(4):
        assert_same(joined(first), next(steady))
    state = saved(first)
    for loader in then:
        loader.set_state(state)
    assert saved(then) == state
    for _ in range(4):
        assert_same(joined(then), next(steady))


def test_documents_are_dealt_round_robin(make, documents):
    """Without shuffling, stream s of S is the concatenation of the documents s, s + S, s + 2S, … cut every T tokens."""
    only_ids = {"sources": (SourceConfig("ids", format="tokens"),), "shuffle": False, "batch_size": 4 * 2}
    for streams in (1, 2, 4):
        loader = make(streams=streams, **only_ids)
        batches = [next(loader)["tokens"] for _ in range(3)]
        for stream in range(streams):
            sequences = np.concatenate([batch.reshape(streams, -1, T)[stream] for batch in batches])
            endless = np.concatenate([document["tokens"] for document in documents[stream::streams]] * 4)
            np.testing.assert_array_equal(sequences.reshape(-1), endless[: sequences.size])


def test_every_document_is_shown_once_in_an_epoch_and_in_a_new_order_in_the_next(make, documents):
    """Documents of one sequence each, so that sequences are documents: 60 of them, dealt to four streams."""
    records = [{"tokens": np.full(T, 1000 + i)} for i in range(60)]
    loader = make(records=records, sources=(SourceConfig("ids", format="tokens"),), batch_size=4, shuffle_window=1)
    epochs = [np.stack([next(loader)["tokens"][:, 0] for _ in range(15)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch.reshape(-1)) == list(range(1000, 1060))
    assert (epochs[0] != epochs[1]).mean() > 0.8


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_host_reads_only_its_own_documents(make, documents, shuffle):
    """Less than an epoch, so that no document may be read by two hosts."""
    only_ids = {"sources": (SourceConfig("ids", format="tokens"),), "shuffle": shuffle, "shuffle_window": 1}
    everything = Counted(documents)
    whole = make(records=everything, **only_ids)
    everything.reads.clear()
    shares = [Counted(documents) for _ in range(4)]
    loaders = [make(share=(i, 4), records=records, **only_ids) for i, records in enumerate(shares)]
    for records in shares:
        records.reads.clear()
    for _ in range(5):
        assert_same(joined(loaders), next(whole))
    read = [set(records.reads) for records in shares]
    assert all(len(records.reads) == len(set(records.reads)) > 0 for records in shares)
    assert not any(read[i] & read[j] for i in range(4) for j in range(i))
    assert set.union(*read) == set(everything.reads)
    if not shuffle:
        assert all({index % 4 for index in mine} == {i} for i, mine in enumerate(read))


def test_a_host_checks_only_its_share_of_the_documents(make, documents):
    """If documents must fit into a sequence, the hosts together look at each document once."""
    records = [Counted({"tokens": document["tokens"][:T]} for document in documents) for _ in range(4)]
    for i in range(4):
        make(share=(i, 4), records=records[i], packing="whole", sources=(SourceConfig("ids", format="tokens"),))
    assert [sorted(mine.reads) for mine in records] == [list(range(i, 60, 4)) for i in range(4)]
    with pytest.raises(DataError, match=f"document 2 has {T + 1} tokens"):
        long = [{"tokens": np.arange(T + (i == 2))} for i in range(60)]
        make(share=(2, 4), records=long, packing="whole", sources=(SourceConfig("ids", format="tokens"),))


def test_growing_batches_keep_every_stream_in_its_place(make):
    steady, ramped, hosts_ramped = make(), make(), hosts(make, 2)
    by_stream = [next(steady)["tokens"].reshape(STREAMS, -1, T) for _ in range(6)]
    expected = np.concatenate(by_stream, axis=1)
    sizes = [B, 2 * B, 3 * B]
    batches = [ramped.take(size)["tokens"] for size in sizes]
    np.testing.assert_array_equal(
        np.concatenate([batch.reshape(STREAMS, -1, T) for batch in batches], axis=1), expected
    )
    for size, batch in zip(sizes, batches, strict=True):
        np.testing.assert_array_equal(joined(hosts_ramped, size)["tokens"], batch)


def test_sizes_that_do_not_divide_are_refused(make):
    with pytest.raises(ConfigError, match="batch_size=6 must be a positive multiple of 4, such as 4: data.streams=4"):
        make().take(6)
    with pytest.raises(
        ConfigError, match="batch_size=12 must be a positive multiple of 8, such as 8: .* hold 8 equal blocks"
    ):
        make(share=(0, 8), batch_size=16).take(12)
    with pytest.raises(ConfigError, match="batch_size=2 must be a positive multiple of 4, such as 4"):
        make(batch_size=2)
    with pytest.raises(
        ConfigError,
        match=r"data.streams=4 cannot be dealt to 6 .*: the hosts can hold 1, 2, 4 blocks, or a multiple of 4; "
        "or set .* multiple of 6",
    ):
        make(share=(0, 6), batch_size=24)


def test_too_little_for_so_many_streams_is_refused(make, documents):
    only_ids = {"sources": (SourceConfig("ids", format="tokens"),)}
    with pytest.raises(DataError, match="'ids' has 3 documents, too few for data.streams=4: lower data.streams"):
        make(records=documents[:3], **only_ids)
    short = [{"tokens": np.arange(5)}] * 8
    with pytest.raises(
        DataError,
        match="'ids': 10 tokens in stream 3 of 4, fewer than its share of a batch, 2 sequences × 16 tokens; .* lower "
        "data.streams",
    ):
        make(share=(3, 4), records=short, **only_ids)


def test_held_out_passes_are_one_stream_whatever_the_streams(make):
    plain, streamed, halves = (
        make(split="validation", streams=1),
        make(split="validation"),
        hosts(make, 2, split="validation"),
    )
    count = 0
    for batch in plain:
        assert_same(next(streamed), batch)
        assert_same(joined(halves), batch)
        count += 1
    assert count > 3
    for loader in (streamed, *halves):
        with pytest.raises(StopIteration):
            next(loader)


def test_positions_that_do_not_fit_are_refused(make):
    first, second = hosts(make, 2)
    with pytest.raises(DataError, match="has the streams 0, 1 and not 2, 3: it is one process's"):
        second.set_state(first.get_state())
    with pytest.raises(DataError, match="belongs to other data: streams was 4 and is 2"):
        make(streams=2).set_state(saved([first, second]))
    with pytest.raises(DataError, match="two processes read different data: seed was 5 and is 0"):
        loader_state.merge([first.get_state(), make(share=(1, 2), seed=5).get_state()])
    same_stream = hosts(make, 8)
    next(same_stream[0])
    with pytest.raises(DataError, match="stream 0 is at different places in two processes"):
        saved(same_stream)


def test_gathering_in_one_process_changes_nothing(make):
    loader = make()
    assert loader_state.gather(loader.get_state()) == loader.get_state()
    assert loader_state.gather(b"of another loader") == b"of another loader"


PROGRAM = """
import json, sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from deepseek_jax.data import loader_state
mine = {"data": {"seed": 0}, "streams": {sys.argv[2]: {"place": [10 ** (5 * jax.process_index())]}, "2": 7}}
print(json.dumps(loader_state.gather(mine)))
"""


def test_gathering_in_two_processes_gives_both_the_whole():
    """The parts differ in length."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        done = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    whole = {"data": {"seed": 0}, "streams": {"0": {"place": [1]}, "1": {"place": [100_000]}, "2": 7}}
    for output, errors in done:
        assert output.strip() and json.loads(output.splitlines()[-1]) == whole, errors
