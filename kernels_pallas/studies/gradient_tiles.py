"""Why gradients are quantised in 1 × 128 tiles where weights may share a scale by 128 × 128 blocks (V3 App. B.2).

    python -m kernels_pallas.studies.gradient_tiles

Gradients differ by token: most tokens are predicted well, a few are not, and all numbers of such a token are large together. A block holds 128
tokens, and its scale is that of the largest. Activations differ by channel: an outlying channel is in each token's tile as it is in the block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import Quantizer, dequantize, fp8_matmul, quantize
from kernels_pallas.qtensor import BLOCK, SCOPES

OPERANDS = {"gradient": 0, "activation": 1}  # the axis along which outliers lie: tokens or channels
FACTORS = tuple(10.0**power for power in range(7))
EVERY = 64  # one token, or channel, in so many is an outlier


@dataclasses.dataclass(frozen=True)
class Loss:
    """What an array loses.

    error         relative L2 error of the whole, which its largest numbers decide
    token_error   root mean square over tokens of each token's own relative L2 error
    underflow     the part of its numbers that became zero
    """

    error: float
    token_error: float
    underflow: float


def operand(name: str, factor: float, tokens: int = 512, width: int = 256, seed: int = 0) -> np.ndarray:
    """Normal numbers, float32 [tokens, width], of which each EVERYth token ("gradient") or channel ("activation") is `factor` times larger."""
    x = np.random.default_rng(seed).normal(size=(tokens, width))
    outliers = (slice(None, None, EVERY), slice(None)) if OPERANDS[name] == 0 else (slice(None), slice(None, None, EVERY))
    x[outliers] *= factor
    return x.astype(np.float32)


def losses(x: np.ndarray, scope: str, features: int = 128, seed: int = 1) -> tuple[Loss, Loss]:
    """Of x [tokens, width] quantised in `scope`, and of its product in FP8 with a matrix in blocks, [width, features]: the input gradient, if x
    is the gradient of a Linear's output, or the output, if it is its input."""
    w = np.random.default_rng(seed).normal(size=(features, x.shape[1])).astype(np.float32)
    quantized, product = _quantized_and_product(x, w, scope)
    return _loss(quantized, x), _loss(product, x.astype(np.float64) @ w.T.astype(np.float64))


def table(factors: tuple[float, ...] = FACTORS, **sizes) -> dict[tuple[str, str, float], tuple[Loss, Loss]]:
    """`losses` for each (operand, scope, factor)."""
    return {(name, scope, factor): losses(operand(name, factor, **sizes), scope) for name in OPERANDS for scope in SCOPES for factor in factors}


@functools.partial(jax.jit, static_argnums=2)
def _quantized_and_product(x: jax.Array, w: jax.Array, scope: str) -> tuple[jax.Array, jax.Array]:
    q = quantize(x, Quantizer(scope, min_amax=1e-30), implementation="xla")
    weight = quantize(w, BLOCK, implementation="xla")
    return dequantize(q), fp8_matmul(q, weight, out_dtype=jnp.float32, implementation="xla")


def _loss(got, exact) -> Loss:
    got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    by_token = np.linalg.norm(got - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return Loss(float(np.linalg.norm(got - exact) / np.linalg.norm(exact)), float(np.sqrt(np.mean(by_token**2))), float(np.mean((got == 0) & (exact != 0))))


def main() -> None:
    measured = table()
    for name in OPERANDS:
        for which, what in enumerate((name, f"product with the {name}")):
            for field in dataclasses.fields(Loss):
                print(f"\n{what}: {field.name}\n{'outliers larger by':20}" + "".join(f"{factor:>10.0e}" for factor in FACTORS))
                for scope in SCOPES:
                    print(f"{scope:20}" + "".join(f"{getattr(measured[name, scope, factor][which], field.name):10.1e}" for factor in FACTORS))


if __name__ == "__main__":
    main()
