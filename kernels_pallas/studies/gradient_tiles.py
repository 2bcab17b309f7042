"""Errors of gradients and activations quantized in tiles, in blocks, and with one scale (V3 App. B.2).

    python -m kernels_pallas.studies.gradient_tiles      prints them

The paper trained a 16B model whose input gradients came from gradients quantized in 128 × 128 blocks, like weights; it
diverged. Its explanation: gradients differ widely from token to token, so that the scale of a block suits its largest
token and not the others. Activations have their outliers in channels, which a tile contains just as a block does. Here
both are random, with a known imbalance.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.matmul.api import fp8_matmul
from kernels_pallas.qtensor import BLOCK, SCOPES, QTensor, Quantizer, dequantize
from kernels_pallas.quantize.api import quantize

RATIOS = tuple(10.0**i for i in range(7))
OUTLIERS = {"gradients": "token", "activations": "channel"}
EVERY = 32  # one token or channel of so many is an outlier


@dataclasses.dataclass(frozen=True)
class Loss:
    """Errors of an array [tokens, channels].

    error             the relative L2 error of the whole array, which the largest tokens dominate
    error_per_token   the mean of the tokens' relative L2 errors, in which all tokens count alike
    underflow         the share of numbers that were not zero and became zero
    """

    error: float
    error_per_token: float
    underflow: float


def loss(exact: np.ndarray, got: np.ndarray) -> Loss:
    exact, got = np.float64(exact), np.float64(got)
    off, size = np.linalg.norm(got - exact, axis=1), np.linalg.norm(exact, axis=1)
    return Loss(np.linalg.norm(off) / np.linalg.norm(size), np.mean(off / size), np.mean(got[exact != 0] == 0))


def imbalanced(rng: np.random.Generator, tokens: int, channels: int, outliers: str, ratio: float) -> np.ndarray:
    """Normal numbers, float32 [tokens, channels], in which one of 32 tokens or channels, as `outliers` says, is `ratio`
    times larger."""
    x = rng.normal(size=(tokens, channels))
    x[{"token": np.s_[::EVERY], "channel": np.s_[:, ::EVERY]}[outliers]] *= ratio
    return x.astype(np.float32)


def quantization_losses(
    outliers: str, scope: str, ratio: float, tokens: int = 256, channels: int = 512, width: int = 256
) -> tuple[Loss, Loss]:
    """The losses of an imbalanced array quantized with `scope`, and of its product with a weight [width, channels]
    quantized in blocks.

    With outliers in tokens the array stands for a gradient dy and the product for the input gradient dy Wᵀ; with
    outliers in channels for an activation x and for x W. Both are compared with the float64 results without
    quantization.
    """
    rng = np.random.default_rng(0)
    x, w = (
        imbalanced(rng, tokens, channels, outliers, ratio),
        rng.normal(size=(width, channels)).astype(np.float32) / channels**0.5,
    )
    q, product = _product(jnp.asarray(x), jnp.asarray(w), Quantizer(scope))
    return loss(x, dequantize(q)), loss(np.float64(x) @ np.float64(w).T, product)


@functools.partial(jax.jit, static_argnums=2)
def _product(x: jax.Array, w: jax.Array, quantizer: Quantizer) -> tuple[QTensor, jax.Array]:
    q = quantize(x, quantizer, implementation="xla")
    return q, fp8_matmul(q, quantize(w, BLOCK, implementation="xla"), out_dtype=jnp.float32, implementation="xla")


def main() -> None:
    for name, outliers in OUTLIERS.items():
        for scope in SCOPES:
            losses = [quantization_losses(outliers, scope, ratio) for ratio in RATIOS]
            print(
                f"\n{f'{name} by {scope}, outlier {outliers}s':<44}"
                + "".join(f"{f'x{ratio:.0e}':>9}" for ratio in RATIOS)
            )
            for which, what in enumerate(("quantized", "product")):
                for field in dataclasses.fields(Loss):
                    print(
                        f"{what + ', ' + field.name:<44}"
                        + "".join(f"{getattr(pair[which], field.name):9.1e}" for pair in losses)
                    )


if __name__ == "__main__":
    main()
