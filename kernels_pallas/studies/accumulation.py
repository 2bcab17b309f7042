"""How a product's error grows with its depth K if partial sums stay in the tensor core, and what promotion does to it (V3 §3.3.2, Fig. 7b).

    python -m kernels_pallas.studies.accumulation
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import Accumulation, QTensor, fp8_matmul
from kernels_pallas.qtensor import E4M3

DEPTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
DATA = {"uniform(0, 1)": lambda rng, shape: rng.uniform(size=shape), "normal": lambda rng, shape: rng.normal(size=shape)}
SERIES = {
    "hopper_fp22, never promoted": Accumulation(None, "hopper_fp22"),
    "hopper_fp22, promoted every 128": Accumulation(128, "hopper_fp22"),
    "fp22_register, never promoted": Accumulation(None, "fp22_register"),
    "fp22_register, promoted every 128": Accumulation(128, "fp22_register"),
    "float32": Accumulation(None, "float32"),
}


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of a product C against float64; of its operands' rounding to E4M3 they say nothing.

    elementwise    max |error / C|; means nothing where sums cancel, as those of normal data do
    over_largest   max |error| / max |C|
    """

    elementwise: float
    over_largest: float


def errors(data: str, depth: int, accumulation: Accumulation, size: int = 32, seed: int = 0) -> Errors:
    """Of [size, depth] times [depth, size], both drawn from `data`, a name in DATA, and rounded to E4M3."""
    rng = np.random.default_rng(seed)
    a, b = (DATA[data](rng, (size, depth)).astype(jnp.dtype(E4M3)) for _ in range(2))
    got = np.asarray(_product(_unscaled(a), _unscaled(b), accumulation), np.float64)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    error = np.abs(got - exact)
    return Errors(float((error / np.abs(exact)).max()), float(error.max() / np.abs(exact).max()))


def table(depths: tuple[int, ...] = DEPTHS, **sizes) -> dict[tuple[str, str, int], Errors]:
    """`errors` for each (data, series, depth)."""
    return {(data, series, depth): errors(data, depth, how, **sizes) for data in DATA for series, how in SERIES.items() for depth in depths}


@functools.partial(jax.jit, static_argnums=2)
def _product(a: QTensor, b: QTensor, accumulation: Accumulation) -> jax.Array:
    return fp8_matmul(a, b, out_dtype=jnp.float32, accumulation=accumulation, implementation="xla")


def _unscaled(values: np.ndarray) -> QTensor:
    return QTensor(jnp.asarray(values), jnp.ones((1, 1)), values.shape)


def main() -> None:
    measured = table()
    for definition in ("elementwise", "over_largest"):
        for data in DATA:
            print(f"\n{data}, {definition}\n{'K':36}" + "".join(f"{depth:>10}" for depth in DEPTHS))
            for series in SERIES:
                print(f"{series:36}" + "".join(f"{getattr(measured[data, series, depth], definition):10.1e}" for depth in DEPTHS))


if __name__ == "__main__":
    main()
