"""Errors of a narrow accumulator, with and without promotion (V3 §3.3.2, Fig. 7b).

    python -m kernels_pallas.studies.accumulation      prints them

The paper multiplies two random matrices with K = 4096 on H800 tensor cores and finds a largest relative error of nearly
2%. Here the tensor core is emulated. Both operands are E4M3 with one scale each before they are multiplied, so that the
error is that of the sums and not of quantization.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.matmul.accumulation import Accumulation
from kernels_pallas.matmul.api import fp8_matmul
from kernels_pallas.qtensor import Quantizer, dequantize
from kernels_pallas.quantize.api import quantize

DEPTHS = tuple(2**i for i in range(8, 15))
DISTRIBUTIONS = {"uniform(0, 1)": np.random.Generator.random, "normal": np.random.Generator.standard_normal}
DEFINITIONS = ("max |ΔC / C|", "max |ΔC| / max |C|")
ACCUMULATIONS = {
    "hopper_fp22, never promoted": Accumulation(None, "hopper_fp22"),
    "hopper_fp22, promoted every 128": Accumulation(128, "hopper_fp22"),
    "fp22_register, never promoted": Accumulation(None, "fp22_register"),
    "fp22_register, promoted every 128": Accumulation(128, "fp22_register"),
    "float32": Accumulation(None, "float32"),
}


def accumulation_errors(
    distribution: str, accumulation: Accumulation, depths: Sequence[int] = DEPTHS, size: int = 64
) -> np.ndarray:
    """The largest error of C = A Bᵀ at each K, by both DEFINITIONS: float64 [depths, 2]. ΔC is the distance to the
    float64 product.

    A and B, [size, K], are random numbers of one of the DISTRIBUTIONS in E4M3, the same for every accumulation.
    """
    errors = np.empty((len(depths), len(DEFINITIONS)))
    for i, depth in enumerate(depths):
        rng = np.random.default_rng(depth)
        x = np.zeros((2, size, max(depths)), np.float32)  # zeros add nothing: one compiled program serves every K
        x[..., :depth] = DISTRIBUTIONS[distribution](rng, (2, size, depth))
        a, b, got = _product(jnp.asarray(x), accumulation)
        exact = np.float64(a) @ np.float64(b).T
        error = np.abs(got - exact)
        errors[i] = np.max(error / np.abs(exact)), np.max(error) / np.max(np.abs(exact))
    return errors


@functools.partial(jax.jit, static_argnums=1)
def _product(x: jax.Array, accumulation: Accumulation) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A and B as they were multiplied, and A Bᵀ."""
    a, b = (quantize(operand, Quantizer("tensor"), implementation="xla") for operand in x)
    return (
        dequantize(a),
        dequantize(b),
        fp8_matmul(a, b, out_dtype=jnp.float32, accumulation=accumulation, implementation="xla"),
    )


def main() -> None:
    for distribution in DISTRIBUTIONS:
        errors = {name: accumulation_errors(distribution, accumulation) for name, accumulation in ACCUMULATIONS.items()}
        for column, definition in enumerate(DEFINITIONS):
            print(f"\n{f'{distribution}: {definition}':<36}" + "".join(f"{f'K={depth}':>9}" for depth in DEPTHS))
            for name, by_depth in errors.items():
                print(f"{name:<36}" + "".join(f"{error:9.1e}" for error in by_depth[:, column]))


if __name__ == "__main__":
    main()
