"""Checkpoints: what comes back, what is refused, and what damage does. The trees are small; no network is run."""

import dataclasses
import gc
import json
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.errors import CheckpointError
from deepseek_jax.model.presets import preset
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.training import checkpoints
from deepseek_jax.training.checkpoints import Checkpoints, _checksum, load_variables, resolve_checkpoint
from deepseek_jax.training.state import state_from_variables

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = preset("moonlight_16b")
OPTIMIZER = optax.adam(0.1)


def state_at(step, width=300):
    """A state of three arrays that depend on the step, as training would leave it."""
    numbers = np.random.default_rng(step).normal(size=(width, 40)).astype(np.float32)
    params = {"a": {"kernel": jnp.asarray(numbers)}, "b": {"scale": jnp.ones(3, jnp.bfloat16)}}
    state = state_from_variables(
        Transformer(CONFIG), {"params": params, "router_bias": {"r": jnp.arange(4.0)}}, OPTIMIZER, jax.random.key(step)
    )
    return state.replace(step=jnp.int32(step))


def same(a, b):
    def compare(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)

    jax.tree.map(compare, a, b)


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 3 and 6, and its manager."""
    store = Checkpoints(tmp_path / "checkpoints", CONFIG)
    for step in (3, 6):
        store.save(state_at(step), {"position": step})
        store.note(step, {"bits_per_byte": float(step)})
    yield store
    store.close()
    gc.collect()  # reading damaged files leaves Orbax coroutines behind; here their complaints are filtered


def biggest(store, step):
    files = [path for path in (store.directory / str(step) / "variables").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_everything_comes_back(saved):
    restored = saved.restore(state_at(0))
    same(restored.state, state_at(6))
    assert restored.loader_state == {"position": 6} and restored.metrics == {"bits_per_byte": 6.0}
    assert Checkpoints(saved.directory.parent / "empty", CONFIG).restore(state_at(0)) is None


def test_bytes_of_a_loader_and_a_state_without_bias(tmp_path):
    state = state_at(1).replace(router_bias={})
    store = Checkpoints(tmp_path, CONFIG)
    store.save(state, b"\x00\xffposition")
    store.wait()
    restored = store.restore(state)
    same(restored.state, state)
    assert restored.loader_state == b"\x00\xffposition"
    assert load_variables(tmp_path)[1]["router_bias"] == {}


def test_newest_and_best_are_kept(tmp_path):
    store = Checkpoints(tmp_path, CONFIG, keep_last=2, keep_best=1)
    for step, value in enumerate([3.0, 1.0, 2.0, None, 4.0, 5.0]):
        store.save(state_at(step, 2))
        if value is not None:
            store.note(step, {"bits_per_byte": value})
    store.wait()
    assert store.steps() == [1, 4, 5]
    store.close()
    store = Checkpoints(tmp_path, CONFIG, keep_last=1, keep_best=2)  # ranks are read again
    store.save(state_at(6, 2))
    store.wait()
    assert store.steps() == [1, 4, 6]
    assert float(load_variables(tmp_path, best=True)[1]["params"]["a"]["kernel"][0, 0]) == float(
        state_at(1, 2).params["a"]["kernel"][0, 0]
    )
    same(load_variables(tmp_path)[1]["params"], state_at(6, 2).params)
    store.close()


@pytest.mark.parametrize(
    "values",
    [(float("nan"), 2.0, 1.0), (2.0, float("nan"), 1.0), (float("-inf"), 1.0, float("nan")), (1.0, float("inf"), 2.0)],
)
def test_what_is_not_a_number_is_never_the_best(tmp_path, values):
    store = Checkpoints(tmp_path, CONFIG, keep_last=1, keep_best=1)
    for step, value in enumerate(values):
        store.save(state_at(step, 2))
        store.note(step, {"bits_per_byte": value, "held_out_loss": value})
    store.save(state_at(9, 2))
    store.close()
    best = min((value, step) for step, value in enumerate(values) if np.isfinite(value))[1]
    assert store.steps() == [best, 9] and resolve_checkpoint(tmp_path, best=True).name == str(best)
    again = Checkpoints(tmp_path, CONFIG, keep_last=1, keep_best=1)
    assert again.restore(state_at(0, 2)).metrics == {}
    json.loads((tmp_path / str(best) / "metrics.json").read_text(), parse_constant=pytest.fail)
    again.close()


def test_an_evaluation_that_is_not_a_number_is_kept_as_one(tmp_path):
    store = Checkpoints(tmp_path, CONFIG)
    store.save(state_at(1, 2))
    store.note(1, {"bits_per_byte": float("nan"), "held_out_loss": 3.0})
    assert np.isnan(store.restore(state_at(0, 2)).metrics["bits_per_byte"])
    text = (tmp_path / "1" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"bits_per_byte": None, "held_out_loss": 3.0}
    # the weights are worth more than what was noted about them
    (tmp_path / "1" / "metrics.json").write_text('{"bits_per_')
    restored = store.restore(state_at(0, 2))
    assert restored.metrics == {} and int(restored.state.step) == 1
    store.close()


def test_a_checkpoint_with_metrics_in_its_meta_is_ranked_too(tmp_path):
    """As checkpoints were written before metrics had a file of their own."""
    for step, rank in ((1, 1.5), (2, None)):
        (tmp_path / str(step) / "meta").mkdir(parents=True)
        metrics = {} if rank is None else {"bits_per_byte": rank}
        (tmp_path / str(step) / "meta" / "metadata").write_text(json.dumps({"metrics": metrics, "rank": rank}))
    assert resolve_checkpoint(tmp_path, best=True).name == "1" and resolve_checkpoint(tmp_path).name == "2"


def test_a_runs_folder_stands_for_its_last_stage_with_weights(saved, caplog):
    run = saved.directory.parents[1] / "run"
    for stage, steps in (("sft", (3, 6)), ("pretrain", (6,)), ("after", ()), ("grpo", ())):
        (run / stage / "checkpoints").mkdir(parents=True)
        for step in steps:
            shutil.copytree(saved.directory / str(step), run / stage / "checkpoints" / str(step))
    shutil.copytree(run / "pretrain", run / "zzz")  # no stage of this run
    (run / "config.json").write_text(json.dumps({"stages": ["pretrain", "sft", "grpo", "after"]}))
    assert resolve_checkpoint(run) == run / "sft" / "checkpoints" / "6"
    assert "last stage that has any, sft, step 6" in caplog.text
    assert resolve_checkpoint(run, best=True) == run / "sft" / "checkpoints" / "3"
    same(load_variables(run)[1], state_at(6).variables)
    caplog.clear()
    for path in (run / "pretrain", run / "pretrain" / "checkpoints", run / "pretrain" / "checkpoints" / "6"):
        assert resolve_checkpoint(path) == run / "pretrain" / "checkpoints" / "6"
    assert not caplog.text
    shutil.rmtree(run / "sft" / "checkpoints")
    assert resolve_checkpoint(run) == run / "pretrain" / "checkpoints" / "6"
    for text in ("{}", "[]", '{"stages"', '{"stages": 3}', '{"stages": ["grpo"]}'):
        (run / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="no checkpoint at .*run: give a run's folder"):
            resolve_checkpoint(run)


def numpy_checksum(x):
    """Word i of each axis counts a different odd number of times; written out for one array on one host."""
    words = (
        np.frombuffer(np.ascontiguousarray(x).tobytes(), f"u{min(x.dtype.itemsize, 4)}").reshape(x.shape).astype(object)
    )
    weight = np.ones(x.shape, object)
    for axis, size in enumerate(x.shape):
        for i in range(size):
            place = (i + 0x9E3779B9 * (axis + 1)) % 2**32
            mixed = (place ^ (place >> 16)) * 0x85EBCA6B % 2**32
            index = tuple(i if a == axis else slice(None) for a in range(x.ndim))
            weight[index] = weight[index] * ((mixed ^ (mixed >> 13)) | 1) % 2**32
    return int((words * weight).sum() % 2**32)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, jnp.bfloat16])
def test_checksums_see_every_flipped_bit_and_every_swap(dtype):
    x = np.random.default_rng(0).integers(-100, 100, (3, 4, 5)).astype(dtype)
    expected = numpy_checksum(x)
    assert int(_checksum(jnp.asarray(x))) == expected
    rng = np.random.default_rng(1)
    for _ in range(30):
        other = x.copy()
        a, b = (tuple(rng.integers(0, x.shape)) for _ in range(2))
        other[a], other[b] = x[b], x[a]
        assert (int(_checksum(jnp.asarray(other))) == expected) == (x[a] == x[b])
    for axis in range(3):
        for other in (np.flip(x, axis), np.roll(x, 1, axis)):
            assert int(_checksum(jnp.asarray(other))) != expected
    assert int(_checksum(jnp.asarray(x.transpose(0, 2, 1)))) != expected
    raw = bytearray(x.tobytes())
    for bit in rng.integers(0, 8 * len(raw), 30):
        raw[bit // 8] ^= 1 << bit % 8
        assert int(_checksum(jnp.asarray(np.frombuffer(bytes(raw), dtype).reshape(x.shape)))) != expected
        raw[bit // 8] ^= 1 << bit % 8


def test_words_that_changed_places_on_disk_are_damage(saved, monkeypatch):
    """As a wrong sector or a torn write leaves them: the same words, and the file decodes."""
    real = checkpoints._read_part

    def swapped(folder, like):
        part = real(folder, like)
        if "params" in part and folder.parent.name == "6":
            kernel = part["params"]["a"]["kernel"]
            part["params"]["a"]["kernel"] = kernel.at[0, 0].set(kernel[7, 3]).at[7, 3].set(kernel[0, 0])
        return part

    monkeypatch.setattr(checkpoints, "_read_part", swapped)
    with pytest.raises(CheckpointError, match="the bytes of params/a/kernel are not those"):
        load_variables(saved.directory)
    same(saved.restore(state_at(0)).state, state_at(3))


def test_variables_alone_for_inference(saved):
    for path in (saved.directory.parent, saved.directory, saved.directory / "6"):
        config, variables = load_variables(path)
        assert config == CONFIG
        same(variables, state_at(6).variables)
    same(load_variables(saved.directory / "3")[1], state_at(3).variables)
    with pytest.raises(CheckpointError, match="folder does not exist"):
        load_variables(saved.directory / "nowhere")
    (saved.directory.parent / "bare").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_variables(saved.directory.parent / "bare")


def test_another_model_is_refused_by_its_first_field(saved):
    other = CONFIG.replace(moe=dataclasses.replace(CONFIG.moe, top_k=4))
    with pytest.raises(CheckpointError, match=r"another model: model.moe.top_k is 6 in the checkpoint and 4 here"):
        Checkpoints(saved.directory, other).restore(state_at(0))


@pytest.mark.parametrize("read", [lambda folder: Checkpoints(folder, CONFIG).restore(state_at(0)), load_variables])
def test_a_checkpoint_from_before_the_runtime_section_is_read(saved, read):
    """Its model has fields that say how it was computed."""
    for path in saved.directory.glob("*/meta/metadata"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        meta["model"] |= {"remat": "full", "scan_unroll": 3, "attention_chunk": 64, "attention_heads_at_once": 2}
        meta["model"]["moe"]["implementation"] = "dense"
        path.write_text(json.dumps(meta), encoding="utf-8")
    assert read(saved.directory) is not None


def test_another_state_is_refused_by_its_first_array(saved):
    message = r"state.params/a/kernel is 'float32\[300, 40\]' in the checkpoint and 'float32\[301, 40\]' here"
    with pytest.raises(CheckpointError, match=message):
        saved.restore(state_at(0, width=301))
    other = state_from_variables(
        Transformer(CONFIG), state_at(0).variables, optax.sgd(0.1, momentum=0.9), jax.random.key(0)
    )
    with pytest.raises(CheckpointError, match="opt_state/0/trace/a/kernel"):
        saved.restore(other)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "find"),
    [
        (truncate, lambda store: biggest(store, 6)),
        (flip, lambda store: biggest(store, 6)),
        (pathlib.Path.unlink, lambda store: store.directory / "6/variables/manifest.ocdbt"),
        (truncate, lambda store: store.directory / "6/meta/metadata"),
    ],
    ids=["truncated array", "one bit", "missing file", "truncated meta"],
)
def test_a_damaged_newest_checkpoint_gives_way(saved, caplog, damage, find):
    damage(find(saved))
    with pytest.raises(CheckpointError, match="6 is damaged"):
        load_variables(saved.directory)
    restored = saved.restore(state_at(0), last=6)  # as a finished run asks
    same(restored.state, state_at(3))
    assert restored.loader_state == {"position": 3}
    assert "6 is damaged and will not be used" in caplog.text
    assert saved.steps() == [3] and (saved.directory / "6.damaged").is_dir()
    saved.save(state_at(6))  # the way is free for the step to be saved again
    saved.wait()
    same(saved.restore(state_at(0)).state, state_at(6))


def test_a_write_cut_short_by_a_kill_is_no_checkpoint(saved):
    shutil.copytree(saved.directory / "6", saved.directory / "9.orbax-checkpoint-tmp")
    truncate(biggest(saved, "9.orbax-checkpoint-tmp"))
    same(load_variables(saved.directory)[1], state_at(6).variables)
    again = Checkpoints(saved.directory, CONFIG)
    same(again.restore(state_at(0)).state, state_at(6))
    assert sorted(path.name for path in saved.directory.iterdir() if path.is_dir()) == ["3", "6"]


def test_when_all_are_damaged_nothing_is_started_over(saved):
    for step in (3, 6):
        truncate(biggest(saved, step))
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(steps \[6, 3\]\)"):
        saved.restore(state_at(0))
    assert saved.steps() == [3, 6]


def test_a_full_disk_is_said_before_writing(saved, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("deepseek_jax.training.checkpoints.shutil.disk_usage", lambda _: free)
    with pytest.raises(CheckpointError, match=r"free some space .* steps \[3, 6\] are untouched"):
        saved.save(state_at(9))
    assert saved.steps() == [3, 6]


def test_a_write_that_fails_leaves_the_earlier_checkpoints(saved):
    """The system refuses to write more than 1000 bytes to a file, as a full disk refuses."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not write a checkpoint .* steps \[3, 6\] are untouched"):
            saved.save(state_at(9))
            saved.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = Checkpoints(saved.directory, CONFIG)
    assert again.steps() == [3, 6]
    same(again.restore(state_at(0)).state, state_at(6))
