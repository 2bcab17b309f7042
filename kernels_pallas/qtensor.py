"""Arrays in eight bits with a scale for each tile (QTensor), and the choices by which one is made (Quantizer)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

E4M3 = "float8_e4m3fn"
# By name: the largest finite magnitude, and the dtype that holds the numbers. E5M6 (V3 §3.3.3) has no dtype of its own
# and fits into bfloat16.
FORMATS = {E4M3: (448.0, jnp.float8_e4m3fn), "float8_e5m2": (57344.0, jnp.float8_e5m2), "e5m6": (65024.0, jnp.bfloat16)}
SCOPES = ("tile", "block", "tensor")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("tile",))
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized array: values · scales. A pytree whose `tile` is static.

    values   [..., R, C] in a narrow format
    scales   float32 [..., ceil(R/tile[0]), ceil(C/tile[1])]; the last tiles may be cut off
    tile     rows and columns of the last two axes that share a scale
    """

    values: jax.Array
    scales: jax.Array
    tile: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def mT(self) -> "QTensor":
        """The last two axes swapped: (1, 128) tiles become (128, 1)."""
        return QTensor(self.values.mT, self.scales.mT, self.tile[::-1])

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """The way from an array to a QTensor, with a field for each choice that an ablation may make. Hashable.

    scope          numbers that share a scale: "tile" 1 × size along the last axis, "block" size × size, or "tensor" the
                   whole matrix
    size           128 in V3; 256 suits matrix units that are 256 wide
    dtype          "float8_e4m3fn" (V3), "float8_e5m2", or "e5m6", in which V3 keeps the attention's output for the
                   backward pass
    power_of_two   rounds the scale up to a power of two, so that scaling is exact
    min_amax       a lower bound for each tile's largest magnitude; 1e-4 in the released quantizer. Gradients of a mean
                   over millions of tokens are smaller than that and would lose most of their bits

    Raises ValueError for a value that is not among those.
    """

    scope: str = "tile"
    size: int = 128
    dtype: str = E4M3
    power_of_two: bool = False
    min_amax: float = 1e-4

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r}: one of {', '.join(SCOPES)}")
        if self.dtype not in FORMATS:
            raise ValueError(f"dtype={self.dtype!r}: one of {', '.join(FORMATS)}")
        if self.size not in (128, 256):
            raise ValueError(f"size={self.size}: 128 or 256")
        if not self.min_amax >= 1e-30:
            raise ValueError(
                f"min_amax={self.min_amax}: at least 1e-30, whose scale float32 still holds with all its bits"
            )

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The tile for an array of this shape."""
        return {
            "tile": (1, self.size),  # FP8: tile
            "block": (self.size, self.size),  # FP8: block
            "tensor": (max(shape[-2], 1), max(shape[-1], 1)),
        }[self.scope]


# V3 §3.3.2: activations, weights, and gradients of activations.
TILE = Quantizer("tile")
BLOCK = Quantizer("block")
GRADIENT = Quantizer("tile", min_amax=1e-30)


def dequantize(q: QTensor, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """values · scales, [..., R, C]."""
    return (q.values.astype(jnp.float32) * spread(q.scales, q.tile, q.shape)).astype(dtype)


def spread(scales: jax.Array, tile: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """Repeats each tile's scale for each of its numbers: [..., R, C] of `shape`."""
    for axis, size in ((-2, tile[0]), (-1, tile[1])):
        scales = jnp.repeat(scales, size, axis=axis) if size > 1 else scales
    return scales[..., : shape[-2], : shape[-1]]


def retile(q: QTensor, size: int) -> QTensor:
    """The same numbers with a scale for each row and `size` columns. `size` must divide the width of q's tiles, unless
    one tile covers all columns."""
    if q.tile == (1, size):
        return q
    tiles_each, shape = (q.tile[0], -(-q.tile[1] // size)), (*q.shape[:-1], -(-q.shape[-1] // size))
    return QTensor(q.values, spread(q.scales, tiles_each, shape), (1, size))


def tiles(x: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """Cuts x into tiles of r × c: [..., R, C] -> [..., R/r, r, C/c, c], padded with zeros."""
    rows, columns = (-size % each for size, each in zip(x.shape[-2:], tile, strict=True))
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, columns)])
    return x.reshape(*x.shape[:-2], x.shape[-2] // tile[0], tile[0], x.shape[-1] // tile[1], tile[1])


def round_up(size: jax.Array | int, multiple: int) -> jax.Array | int:
    """The least multiple that is not smaller than `size`, for each of an array of sizes."""
    return -(-size // multiple) * multiple
