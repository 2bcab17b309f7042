"""Partial sums of a product: in float32, or as a Hopper tensor core keeps them, promoted to float32 at intervals (V3
§3.3.2, Fig. 7b)."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas._compat import zeros

ACCUMULATORS = ("float32", "hopper_fp22", "fp22_register")
STEP = 32  # Hopper's FP8 tensor core adds so many products at once
FRACTION_BITS = 13  # of its accumulator: 1 sign + 8 exponent + 13 fraction bits, "FP22"


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """Sums `promote_every` numbers of K in `accumulator` and then adds them to a float32 total; None never promotes.
    Raises ValueError for another accumulator, or an interval that is not a multiple of 32.

    float32         the accumulator of a TPU and of XLA
    hopper_fp22     a Hopper tensor core, emulated: each of 32 products and the sum so far is cut to 13 fraction bits
                    below the largest exponent among them ("Insights into DeepSeek-V3" §3.1), and so is the result
    fp22_register   the last step of that alone, many times faster: sums of 32 are exact, and the running sum is cut to
                    13 fraction bits
    """

    promote_every: int | None = 128
    accumulator: str = "float32"

    def __post_init__(self):
        if self.accumulator not in ACCUMULATORS:
            raise ValueError(f"accumulator={self.accumulator!r}: one of {', '.join(ACCUMULATORS)}")
        if self.promote_every is not None and (self.promote_every < STEP or self.promote_every % STEP):
            raise ValueError(f"promote_every={self.promote_every}: a multiple of {STEP}, or None for never")


def partial_product(a_MK: jax.Array, b_NK: jax.Array, accumulator: str) -> jax.Array:
    """a bᵀ of float32 operands as `accumulator` sums it: float32 [M, N]."""
    if accumulator == "float32":
        return _dot(a_MK, b_NK)
    a_SMk, b_SNk = (_steps(x, STEP) for x in (a_MK, b_NK))
    add = _add_aligned if accumulator == "hopper_fp22" else lambda sum_MN, a, b: truncate(sum_MN + _dot(a, b))
    start_MN = zeros((a_MK.shape[0], b_NK.shape[0]), a_MK, b_NK)
    return jax.lax.scan(lambda sum_MN, ab: (add(sum_MN, *ab), None), start_MN, (a_SMk, b_SNk))[0]


def _add_aligned(sum_MN: jax.Array, a_Mk: jax.Array, b_Nk: jax.Array) -> jax.Array:
    """Adds 32 products to the sum as the tensor core does. Products are computed twice, one number of k at a time, so
    that no array is larger than [M, N]: 14 times as fast on a CPU as an array of all products."""
    b_kN = b_Nk.T

    def fold(add, start_MN):
        return jax.lax.fori_loop(
            0, STEP, lambda k, so_far_MN: add(so_far_MN, a_Mk[:, k, None] * b_kN[k]), start_MN, unroll=8
        )

    largest_MN = fold(lambda largest_MN, product_MN: jnp.maximum(largest_MN, jnp.abs(product_MN)), jnp.abs(sum_MN))
    biased_MN = (jax.lax.bitcast_convert_type(largest_MN, jnp.int32) >> 23) - FRACTION_BITS
    biased_MN = jnp.maximum(biased_MN, 1)  # a smaller quantum would be flushed to zero
    # powers of two
    quantum_MN, per_quantum_MN = (
        jax.lax.bitcast_convert_type(e << 23, jnp.float32) for e in (biased_MN, 254 - biased_MN)
    )
    quanta = lambda x_MN: (x_MN * per_quantum_MN).astype(jnp.int32)  # cut towards zero; at most 2^14
    quanta_MN = fold(lambda so_far_MN, product_MN: so_far_MN + quanta(product_MN), quanta(sum_MN))
    return jnp.where(jnp.isfinite(largest_MN), truncate(quanta_MN * quantum_MN), sum_MN + _dot(a_Mk, b_Nk))


def truncate(x: jax.Array) -> jax.Array:
    """Cuts float32 numbers to 13 fraction bits, without rounding."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFFFFF << (23 - FRACTION_BITS) & 0xFFFFFFFF)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), x)


def _dot(a_MK: jax.Array, b_NK: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
        a_MK, b_NK, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _steps(x_RK: jax.Array, step: int) -> jax.Array:
    """[R, K] -> [ceil(K/step), R, step], padded with zeros."""
    x_RK = jnp.pad(x_RK, ((0, 0), (0, -x_RK.shape[1] % step)))
    return x_RK.reshape(x_RK.shape[0], -1, step).swapaxes(0, 1)
