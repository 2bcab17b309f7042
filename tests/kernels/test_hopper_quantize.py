"""The Hopper quantizers, interpreted: equal to the reference bit for bit for any numbers in a tile; and their machine
code."""

import functools
import re

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    QTensor,
    Quantizer,
    Unsupported,
    dequantize,
    quantize,
    quantize_transposed,
    requantize_transposed,
    swiglu_quantize,
    targets,
)
from kernels_pallas.quantize import mosaic_gpu_sm90

TILE, BLOCK = Quantizer(), Quantizer("block")
POWER, WIDE = Quantizer(power_of_two=True), Quantizer(size=256, power_of_two=True)


def adversarial(rows, columns, dtype=jnp.bfloat16):
    """Rows of every kind: ordinary, with an outlier, zero, denormal, about the largest E4M3 number, near overflow, with
    NaN and with infinity."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    x[1, ::97] *= 1e4
    x[2] = 0
    x[3] *= 1e-39
    x[4] = rng.choice([-448, 448, 449, -464, 465, 480], size=columns)
    x[5] = rng.choice([3e38, -1e38, 1], size=columns)
    x[6, columns // 2], x[7, columns // 3] = np.nan, -np.inf
    x[8] = 2.0 ** rng.integers(-12, 12, size=columns)  # amax / 448 at powers of two, and next to them
    x[9:12, 0] = (
        448 * 4,
        np.nextafter(np.float32(448 * 4), np.float32(1e9)),
        np.nextafter(np.float32(448 * 4), np.float32(0)),
    )
    return jnp.asarray(x, dtype)


def same(function, *arguments):
    run = lambda implementation: jax.tree.map(
        np.asarray, jax.jit(functools.partial(function, implementation=implementation))(*arguments)
    )
    with hopper.interpreted():
        got = run(hopper.SM90)
    want = run("xla")
    assert got.tile == want.tile
    np.testing.assert_array_equal(got.values.view(np.uint8), want.values.view(np.uint8))
    # a NaN's sign is free
    np.testing.assert_array_equal(got.scales.view(np.int32) & 0x7FFFFFFF, want.scales.view(np.int32) & 0x7FFFFFFF)


@hopper.interprets
@pytest.mark.parametrize(
    "quantizer", [TILE, POWER, WIDE, BLOCK, Quantizer("block", power_of_two=True), Quantizer(min_amax=1e-30)], ids=str
)
def test_quantize(quantizer):
    same(functools.partial(quantize, quantizer=quantizer), adversarial(71, 200))


@hopper.interprets
@pytest.mark.parametrize("quantizer", [TILE, BLOCK], ids=str)
def test_quantize_float32_stacked(quantizer):
    same(
        functools.partial(quantize, quantizer=quantizer),
        jnp.stack([adversarial(24, 128, jnp.float32), adversarial(24, 128, jnp.float32)[::-1]]),
    )


@hopper.interprets
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_quantize_transposed(dtype):
    same(functools.partial(quantize_transposed, quantizer=POWER), adversarial(40, 150, dtype).T)


@hopper.interprets
@pytest.mark.parametrize("before, after", [(TILE, TILE), (BLOCK, POWER), (WIDE, WIDE)], ids=str)
def test_requantize_transposed(before, after):
    same(functools.partial(requantize_transposed, quantizer=after), quantize(adversarial(140, 300)[:, :270], before))


@hopper.interprets
def test_swiglu_quantize_exact():
    """From 32 on silu is the identity in float32; powers of two and small integers multiply exactly."""
    rng = np.random.default_rng(0)
    gate, up = (
        jnp.asarray(rng.integers(32, 64, (40, 200)), jnp.bfloat16),
        jnp.asarray(2.0 ** rng.integers(-4, 5, (40, 200)), jnp.bfloat16),
    )
    same(functools.partial(swiglu_quantize, quantizer=POWER), gate, up)


@hopper.interprets
def test_swiglu_quantize_random():
    """Within half a unit of bfloat16 (2^-9, on both sides) and one of E4M3 (2^-3), the latter if roundings fall
    differently; most do not."""
    rng = np.random.default_rng(0)
    gate, up = (jnp.asarray(rng.normal(size=(40, 128)), jnp.bfloat16) for _ in range(2))
    with hopper.interpreted():
        got = swiglu_quantize(gate, up, implementation=hopper.SM90)
    want = swiglu_quantize(gate, up, implementation="xla")
    np.testing.assert_allclose(got.scales, want.scales, rtol=2.0**-8)
    error = np.abs(np.asarray(dequantize(got)) - np.asarray(dequantize(want)))
    assert np.all(error <= np.abs(dequantize(want)) * (2.0**-3 + 2.0**-8) + np.asarray(want.scales) * 2.0**-9)
    assert np.mean(error > np.abs(dequantize(want)) * 2.0**-7) < 0.1


@hopper.interprets
def test_planted_errors_are_seen(monkeypatch):
    x = adversarial(16, 128)
    with pytest.raises(AssertionError), monkeypatch.context() as patch:
        patch.setattr(
            mosaic_gpu_sm90,
            "scale_of",
            lambda amax, quantizer, of=mosaic_gpu_sm90.scale_of: of(amax, Quantizer(min_amax=1e-30)),
        )
        same(quantize, x)
    with pytest.raises(AssertionError), monkeypatch.context() as patch:
        patch.setattr(mosaic_gpu_sm90, "FRACTION", 0x7FFFFE)  # rounds a power of two up, where it should stay
        same(functools.partial(quantize, quantizer=POWER), x)
    with pytest.raises(AssertionError), monkeypatch.context() as patch:
        patch.setattr(mosaic_gpu_sm90, "scales_across", lambda i, j, height, width: ((0, j * width), (1, width)))
        same(requantize_transposed, quantize(jnp.tile(x, (1, 2)) * jnp.repeat(jnp.array([1, 3], x.dtype), 128)))


X = jax.ShapeDtypeStruct((4096, 7168), jnp.bfloat16)
OPERATIONS = {
    "tile": (functools.partial(quantize, implementation=hopper.SM90), (X,), 1),
    "block": (functools.partial(quantize, quantizer=BLOCK, implementation=hopper.SM90), (X,), 2),
    "transposed": (functools.partial(quantize_transposed, implementation=hopper.SM90), (X,), 1),
    "requantized": (
        functools.partial(requantize_transposed, implementation=hopper.SM90),
        (hopper.struct((4096, 7168), (1, 128)),),
        1,
    ),
    "swiglu": (functools.partial(swiglu_quantize, implementation=hopper.SM90), (X, X), 1),
}


@hopper.compiles
@pytest.mark.parametrize("name", OPERATIONS)
def test_machine_code(name):
    """One conversion makes two numbers, no maximum loses a NaN, and a core has room for two blocks of threads or
    more."""
    function, shapes, strips = OPERATIONS[name]
    kernel = hopper.compiled(targets.H200, function, *shapes)
    assert kernel.ptx.count("cvt.rn.satfinite.e4m3x2.f32") == 32 * strips  # 64 × 128 numbers, 128 threads
    assert "max.s32" in kernel.ptx and not re.search(r"\b(max|min)\.f32", kernel.ptx)
    assert kernel.shared_memory * 4 <= targets.SHARED_MEMORY
    assert kernel.registers * 128 * (2 if name == "swiglu" else 3) <= 65536
    if name == "transposed" and jax.__version_info__ >= (0, 11):
        assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in kernel.ptx
    if kernel.instructions is not None:
        assert kernel.instructions["LDL"] == kernel.instructions["STL"] == 0


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (
            quantize,
            (jnp.zeros((8, 128), jnp.float16),),
            "quantize: mosaic_gpu_sm90 quantizes bfloat16 or float32, not float16",
        ),
        (quantize, (jnp.zeros((8, 128)), Quantizer("tensor")), 'takes the scopes "tile" and "block", not "tensor"'),
        (quantize, (jnp.zeros((8, 128)), Quantizer(dtype="e5m6")), "makes float8_e4m3fn, not e5m6"),
        (quantize, (jnp.zeros((8, 256)), Quantizer("block", 256)), "makes blocks of 128, not of 256"),
        (
            quantize_transposed,
            (jnp.zeros((0, 128)),),
            "quantize_transposed: mosaic_gpu_sm90 needs arrays that are not empty",
        ),
        (
            swiglu_quantize,
            (jnp.zeros((8, 128)), jnp.zeros((8, 128)), Quantizer(dtype="float8_e5m2")),
            "swiglu_quantize: .* not float8_e5m2",
        ),
        (
            requantize_transposed,
            (hopper.integers((8, 128), (1, 64)),),
            r"scales for multiples of 128 columns, not tiles \(1, 64\)",
        ),
        (
            requantize_transposed,
            (QTensor(jnp.zeros((8, 128), jnp.bfloat16), jnp.ones((8, 1)), (1, 128)),),
            "requantizes float8_e4m3fn, not bfloat16",
        ),
    ],
)
def test_unsupported(function, arguments, message):
    with pytest.raises(Unsupported, match=message):
        function(*arguments, implementation=hopper.SM90)
