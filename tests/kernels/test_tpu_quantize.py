"""Quantization and SwiGLU on TPUs: interpreted against the definition, and compiled for each generation of TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_cases import SIMULATED, described, kernel_texts, lower, normal, on_every_chip, run, whole_numbers

from kernels_pallas import (
    QTensor,
    Quantizer,
    Unsupported,
    dequantize,
    quantize,
    quantize_transposed,
    requantize_transposed,
    swiglu_quantize,
)
from kernels_pallas.quantize import mosaic_tpu

TILE, BLOCK = Quantizer("tile"), Quantizer("block")
POWERS = Quantizer("tile", power_of_two=True)


def both(function, *args, **options) -> tuple[QTensor, QTensor]:
    """The kernel's result on `args`, and the definition's."""
    reference = jax.jit(functools.partial(function, implementation="xla"))(*args)
    return run(functools.partial(function, implementation="mosaic_tpu"), *args, **options), jax.tree.map(
        np.asarray, reference
    )


def same(kernel: QTensor, reference: QTensor) -> None:
    assert kernel.tile == reference.tile and kernel.values.dtype == reference.values.dtype
    np.testing.assert_array_equal(kernel.scales, reference.scales)
    np.testing.assert_array_equal(kernel.values.astype(np.float32), reference.values.astype(np.float32))


def extreme(shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Normal numbers of many magnitudes, with zeros, the largest there are, numbers below the clamp and infinities."""
    x = normal(0, shape) * jnp.exp2(jnp.round(normal(1, (*shape[:-1], 1)) * 6))
    flat = x.reshape(-1, shape[-1])
    for row, value in enumerate((0.0, 448.0, -448.5, 3e38, 1e-7, jnp.inf, -jnp.inf, 1e-42)):
        flat = flat.at[row * 3, row].set(value)
    return flat.at[2].set(0.0).at[5].multiply(1e-9).reshape(shape).astype(dtype)


@pytest.mark.parametrize(
    "shape, quantizer, dtype",
    [
        ((32, 128), TILE, jnp.float32),
        ((70, 576), POWERS, jnp.float32),  # ragged rows, a last tile that is cut off
        ((2, 40, 300), Quantizer("tile", 256, min_amax=1e-30), jnp.bfloat16),
        ((40, 256), Quantizer("tile", dtype="float8_e5m2"), jnp.float32),
        ((1, 200), TILE, jnp.bfloat16),
        ((200, 300), BLOCK, jnp.float32),
        ((2, 260, 130), Quantizer("block", 256, power_of_two=True), jnp.bfloat16),
    ],
)
def test_tiles_and_blocks(shape, quantizer, dtype):
    same(*both(functools.partial(quantize, quantizer=quantizer), extreme(shape, dtype)))


@pytest.mark.parametrize(
    "shape, quantizer, dtype",
    [
        ((128, 40), TILE, jnp.bfloat16),
        ((300, 200), POWERS, jnp.float32),
        ((2, 260, 130), Quantizer("tile", 256), jnp.float32),
        ((1200, 130), TILE, jnp.float32),
    ],
)
def test_transposed(shape, quantizer, dtype):
    same(*both(functools.partial(quantize_transposed, quantizer=quantizer), extreme(shape, dtype)))


@pytest.mark.parametrize(
    "shape, tile, quantizer",
    [
        ((260, 300), (1, 128), TILE),
        ((130, 700), (1, 256), POWERS),
        ((200, 300), (128, 128), TILE),
        ((40, 200), (40, 200), TILE),
        ((2, 130, 256), (1, 128), TILE),
    ],
)
def test_requantize_transposed(shape, tile, quantizer):
    same(*both(functools.partial(requantize_transposed, quantizer=quantizer), whole_numbers(0, shape, tile)))


@pytest.mark.parametrize(
    "function, spoilt",
    [
        (functools.partial(quantize, quantizer=BLOCK), np.s_[:128, 128:]),
        (quantize, np.s_[40, 128:]),
        (quantize_transposed, np.s_[140, :128]),
    ],
)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_spoils_its_tile_and_no_other(function, spoilt, bad):
    kernel = run(functools.partial(function, implementation="mosaic_tpu"), normal(0, (200, 200)).at[40, 140].set(bad))
    numbers, expected = np.asarray(dequantize(jax.tree.map(jnp.asarray, kernel))), np.ones(kernel.shape, bool)
    expected[spoilt] = False
    np.testing.assert_array_equal(np.isfinite(numbers), expected)


def test_requantize_reads_more_scales_than_fit_into_a_block():
    same(*both(requantize_transposed, whole_numbers(0, (32, 130 * 128), (1, 128))))


def test_in_a_simulated_tpu():
    same(*both(quantize, extreme((40, 200)), interpreter=SIMULATED))
    same(*both(functools.partial(quantize, quantizer=BLOCK), extreme((140, 200)), interpreter=SIMULATED))
    same(*both(requantize_transposed, whole_numbers(0, (140, 200), (1, 128)), interpreter=SIMULATED))


@pytest.mark.parametrize("dtype, quantizer", [(jnp.float32, TILE), (jnp.bfloat16, POWERS)])
def test_swiglu(dtype, quantizer):
    """First whole numbers of `gate` so large that silu(gate) is gate or 0, on which all ways to compute it agree; then
    any numbers, within a rounding."""
    gate = jnp.asarray(np.random.default_rng(0).choice([-200.0, 0.0, 30.0, 64.0], (70, 300)), dtype)
    up = jnp.asarray(np.random.default_rng(1).integers(-8, 9, (70, 300)), dtype)
    function = functools.partial(swiglu_quantize, quantizer=quantizer)
    same(*both(function, gate, up))
    kernel, reference = both(function, normal(2, (70, 300), dtype), normal(3, (70, 300), dtype))
    np.testing.assert_allclose(kernel.scales, reference.scales, rtol=2.0**-7)  # a rounding of the dtype apart
    numbers = [q.values.astype(np.float32) * np.repeat(q.scales, 128, axis=1)[:, :300] for q in (kernel, reference)]
    limit = np.repeat(reference.scales, 128, axis=1)[:, :300] * 448 * 2.0**-4  # a rounding of E4M3 apart
    assert np.all(np.abs(numbers[0] - numbers[1]) <= limit)


def test_an_amax_of_the_wrong_tile_is_caught(monkeypatch):
    quantized = mosaic_tpu._quantized
    monkeypatch.setattr(
        mosaic_tpu, "_quantized", lambda x, axes, quantizer: quantized(jnp.roll(x, 1, axis=0), axes, quantizer)
    )
    kernel, reference = both(quantize, extreme((40, 200)))
    assert np.mean(kernel.scales != reference.scales) > 0.5


@pytest.mark.parametrize(
    "function, argument, quantizer, message",
    [
        (quantize, jnp.zeros((8, 128), jnp.float16), TILE, "reads bfloat16 or float32, not float16"),
        (quantize, jnp.zeros((8, 128)), Quantizer("tensor"), "scales tiles and blocks, not whole tensors"),
        (quantize, jnp.zeros((8, 128)), Quantizer(dtype="e5m6"), "rounds to the formats of eight bits, not to e5m6"),
        (quantize, jnp.zeros((0, 128)), TILE, "needs arrays that are not empty"),
        (quantize_transposed, jnp.zeros((8, 128)), BLOCK, "scales tiles where it transposes, not blocks"),
        (requantize_transposed, whole_numbers(0, (8, 128), (1, 64)), TILE, "takes scales for multiples of 128 columns"),
        (
            lambda x, quantizer, **name: swiglu_quantize(x, x, quantizer, **name),
            jnp.zeros((8, 128)),
            Quantizer("tensor"),
            "scales tiles",
        ),
    ],
)
def test_unsupported_says_why(function, argument, quantizer, message):
    with pytest.raises(Unsupported, match=f"mosaic_tpu {message}.*would do it: xla"):
        function(argument, quantizer, implementation="mosaic_tpu")


@on_every_chip
def test_compiles(topology):
    """At V3's widths, everything in one program, its rows split over the mesh."""
    x = jax.ShapeDtypeStruct((4096, 7168), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16)

    def everything(x, gate, up, kept):
        quantized = [
            quantize(x, implementation="mosaic_tpu"),
            quantize(x.astype(jnp.float32), BLOCK, implementation="mosaic_tpu"),
        ]
        quantized += [
            quantize_transposed(x, implementation="mosaic_tpu"),
            requantize_transposed(kept, POWERS, implementation="mosaic_tpu"),
        ]
        return [*quantized, swiglu_quantize(gate, up, implementation="mosaic_tpu")]

    program = lower(topology, everything, x, gate, gate, described((4096, 2112), (1, 128)), sharded=4)
    assert len(kernel_texts(program)) == 5
    program.compile()
