"""fp8_matmul's Hopper kernel: equal to the reference bit for bit on exact inputs, and its machine code."""

import dataclasses
import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    Accumulation,
    QTensor,
    Unsupported,
    fp8_matmul,
    hopper_tuning,
    quantize_block,
    quantize_tile,
    targets,
)
from kernels_pallas.hopper_tuning import Config
from kernels_pallas.matmul import mosaic_gpu_sm90

BLOCK, ROW = (128, 128), (1, 128)


def product(a, b, implementation=hopper.SM90, **fields):
    return np.asarray(jax.jit(functools.partial(fp8_matmul, implementation=implementation, **fields))(a, b))


@hopper.interprets
@pytest.mark.parametrize(
    "m, n, k, a_tile, b_tile, out_dtype",
    [
        pytest.param(136, 136, 384, ROW, BLOCK, jnp.bfloat16, id="activations-weights"),
        pytest.param(72, 40, 256, ROW, ROW, jnp.float32, id="weight-gradient"),
        pytest.param(1, 72, 128, ROW, BLOCK, jnp.float32, id="one-row"),
        pytest.param(77, 40, 300, ROW, BLOCK, jnp.float32, id="nothing-divides"),
        pytest.param(33, 40, 512, (1, 256), (256, 256), jnp.float32, id="scales-of-256"),
        pytest.param(33, 40, 200, (33, 200), (40, 200), jnp.float32, id="one-scale-each"),
        pytest.param(150, 40, 200, BLOCK, ROW, jnp.float32, id="blocks-on-the-left"),
    ],
)
def test_bit_equal_on_exact_inputs(m, n, k, a_tile, b_tile, out_dtype):
    a, b = hopper.integers((m, k), a_tile), hopper.integers((n, k), b_tile, seed=1)
    with hopper.interpreted():
        y = product(a, b, out_dtype=out_dtype)
    np.testing.assert_array_equal(y, product(a, b, "xla", out_dtype=out_dtype))


@hopper.interprets
@pytest.mark.parametrize("config", [Config(128, "n", 2, 1, 1), Config(64, "m", 3, 1, 2), Config(128, "n", 1)])
def test_any_configuration_gives_the_same(config, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_sm90, "choose_config", lambda *_: config)
    a, b = hopper.integers((130, 256), ROW), hopper.integers((264, 256), BLOCK, seed=1)
    with hopper.interpreted():
        y = product(a, b)
    np.testing.assert_array_equal(y, product(a, b, "xla"))


@hopper.interprets
def test_random_inputs_within_roundoff():
    """Each of K products and K/128 promotions rounds a number no larger than the sum of magnitudes, by 2^-24."""
    rng = np.random.default_rng(0)
    a, b = quantize_tile(rng.normal(size=(40, 512)) * 30), quantize_block(rng.normal(size=(40, 512)))
    with hopper.interpreted():
        y = product(a, b, out_dtype=jnp.float32)
    spread = lambda q, rows: np.repeat(np.repeat(np.asarray(q.scales, np.float64), rows, 0), 128, 1)[: q.shape[0]]
    exact_a, exact_b = (np.asarray(q.values, np.float64) * spread(q, rows) for q, rows in ((a, 1), (b, 128)))
    bound = (512 + 512 / 128 + 2) * 2.0**-24 * (np.abs(exact_a) @ np.abs(exact_b).T)
    assert np.all(np.abs(y - exact_a @ exact_b.T) <= bound)


@hopper.interprets
def test_a_nan_stays_in_its_row():
    a, b = hopper.integers((9, 256), ROW), hopper.integers((24, 256), BLOCK, seed=1)
    poisoned = QTensor(a.values.at[3, 200].set(jnp.nan), a.scales, a.tile)
    with hopper.interpreted():
        y = product(poisoned, b)
    np.testing.assert_array_equal(np.isnan(y), np.arange(9)[:, None].repeat(24, 1) == 3)


@hopper.interprets
@pytest.mark.parametrize("error", ["scales_of_a_skipped", "wrong_block_of_b", "scales_one_step_late"])
def test_planted_errors_are_seen(error, monkeypatch):
    a, b = hopper.integers((16, 256), ROW), hopper.integers((192, 256), BLOCK, seed=1)
    if error == "scales_of_a_skipped":
        monkeypatch.setattr(
            mosaic_gpu_sm90, "load", lambda ref, layout, load=mosaic_gpu_sm90.load: load(ref, layout) * 0 + 1
        )
    original = mosaic_gpu_sm90.operand

    def operand(q, multiple):
        made = original(q, multiple)
        if error == "wrong_block_of_b" and multiple == 64:
            return dataclasses.replace(made, scales=made.scales[::-1])
        if error == "scales_one_step_late" and multiple == 8:
            return dataclasses.replace(made, scales=jnp.roll(made.scales, 1, axis=0))
        return made

    monkeypatch.setattr(mosaic_gpu_sm90, "operand", operand)
    monkeypatch.setattr(mosaic_gpu_sm90, "choose_config", lambda *_: Config(128, "n", 2))
    with hopper.interpreted():
        y = product(a, b)
    assert not np.array_equal(y, product(a, b, "xla"))


@hopper.interprets
def test_race_detector_sees_a_missing_fence(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_sm90.plgpu, "commit_smem", lambda: None)
    with hopper.interpreted(races=True):
        product(hopper.integers((8, 384), ROW), hopper.integers((24, 384), BLOCK))


@hopper.compiles
@pytest.mark.parametrize(
    "target, m, n, k, b_tile, out_dtype",
    [
        (targets.H100, 4096, 2112, 7168, BLOCK, jnp.bfloat16),
        (targets.H200, 4096, 2112, 7168, BLOCK, jnp.bfloat16),
        (targets.H200, 4096, 576, 7168, BLOCK, jnp.bfloat16),
        (targets.H200, 64, 24576, 1536, BLOCK, jnp.bfloat16),
        (targets.H200, 1, 2112, 7168, BLOCK, jnp.bfloat16),
        (targets.H200, 2048, 7168, 4096, ROW, jnp.float32),
    ],
)
def test_machine_code(target, m, n, k, b_tile, out_dtype):
    """A step of 128 takes four tensor-core instructions and an FFMA for each number that a thread holds; scales for
    each column cost one FMUL more each."""
    function = functools.partial(fp8_matmul, out_dtype=out_dtype, implementation=hopper.SM90)
    kernel = hopper.compiled(target, function, hopper.struct((m, k), ROW), hopper.struct((n, k), b_tile))
    columns = hopper_tuning.rule(m, n, target.cores).columns
    held = 64 * columns // 128  # by each of 128 threads
    assert kernel.fp8_products == 4 and f"m64n{columns}k32" in kernel.ptx
    if kernel.instructions is not None:
        assert kernel.instructions["QGMMA"] == 4 and kernel.instructions["LDL"] == kernel.instructions["STL"] == 0
        assert kernel.instructions["FFMA"] == held and kernel.instructions["FMUL"] == (2 if b_tile == BLOCK else held)


@hopper.compiles
def test_compiling_for_another_generation_fails():
    with pytest.raises(Exception, match="Pass pipeline failed"):
        targets.compile_for(
            targets.B200,
            functools.partial(fp8_matmul, implementation=hopper.SM90),
            hopper.struct((128, 512), ROW),
            hopper.struct((128, 512), BLOCK),
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(accumulation=Accumulation(256)), "promotes every 128 numbers"),
        (dict(accumulation=Accumulation(None)), "promotes every 128 numbers"),
        (dict(accumulation=Accumulation(128, "hopper_fp22")), "adds as the tensor cores do"),
        (dict(out_dtype=jnp.float16), "writes bfloat16 or float32, not float16"),
        (dict(b=hopper.integers((8, 256), (1, 64))), r"multiples of 128 numbers of K, not tiles \(1, 64\)"),
        (
            dict(b=QTensor(jnp.zeros((8, 256), jnp.float8_e5m2), jnp.ones((8, 2)), ROW)),
            "multiplies float8_e4m3fn, not float8_e5m2",
        ),
        (dict(b=hopper.integers((0, 256), ROW)), "needs matrices that are not empty"),
    ],
)
def test_unsupported(changes, message):
    arguments = dict(a=hopper.integers((8, 256), ROW), b=hopper.integers((8, 256), BLOCK)) | changes
    with pytest.raises(Unsupported, match=f"fp8_matmul: mosaic_gpu_sm90 .*{message}.*xla"):
        fp8_matmul(**arguments, implementation=hopper.SM90)


def test_configurations():
    small, large = hopper_tuning.rule(1, 2112, 132), hopper_tuning.rule(4096, 4096, 132)
    assert (small.split, large.split, large.columns) == ("n", "m", 128)
    assert -(-2112 // small.tile_n) > 132 // 4  # small tiles, so that most cores read
    for config in (small, large):
        assert config.fitting(jnp.float32).stages >= 3
    with pytest.raises(ValueError, match="columns 16, 32, 64 or 128"):
        Config(columns=96)
    with pytest.raises(ValueError, match="tiles of 32 columns or more"):
        Config(columns=16, split="m")


def test_measured_configurations_come_from_the_table_of_the_device(tmp_path, monkeypatch):
    (tmp_path / "nvidia_h200.json").write_text(
        '{"fp8_matmul": {"64x2112x7168": {"columns": 64, "split": "n", "stages": 5}}}'
    )
    monkeypatch.setattr(hopper_tuning, "TABLES", tmp_path)
    monkeypatch.setattr(hopper_tuning, "device", lambda: ("NVIDIA H200 141GB HBM3e", 132))
    hopper_tuning._table.cache_clear()
    assert hopper_tuning.choose_config("fp8_matmul", 64, 2112, 7168, jnp.bfloat16) == Config(64, "n", 5)
    assert hopper_tuning.choose_config("fp8_matmul", 64, 2112, 512, jnp.bfloat16) == hopper_tuning.rule(
        64, 2112, 132
    ).fitting(jnp.bfloat16)
    hopper_tuning._table.cache_clear()
