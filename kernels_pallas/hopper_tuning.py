"""Tiles of the FP8 products on Hopper: from a table of measured shapes, else by a rule. No GPU has tried either
yet."""

import dataclasses
import functools
import json
import pathlib

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.hopper import FREE_SHARED_MEMORY, ROWS, STEP, device

TABLES = pathlib.Path(__file__).parent / "tuning"


@dataclasses.dataclass(frozen=True)
class Config:
    """The tile that a block of threads, with two warpgroups that compute, works on at a time. Raises ValueError for a
    tile that the kernels cannot take.

    columns   columns of the output for each warpgroup; divides 128, so that all have the same block of b's scales
    split     the axis that the two warpgroups divide: "m" makes tiles of 128 × columns, "n" of 64 × 2 · columns
    stages    steps of K in shared memory
    minor     the axis, m (0) or n (1), along which tiles follow each other first, in strips of `width`, so that their
              operands stay in the L2 cache
    width     the width of a strip, in tiles
    """

    columns: int = 128
    split: str = "m"
    stages: int = 4
    minor: int = 0
    width: int = 8

    def __post_init__(self):
        if (
            self.columns not in (16, 32, 64, 128)
            or self.split not in ("m", "n")
            or self.minor not in (0, 1)
            or min(self.stages, self.width) < 1
        ):
            raise ValueError(f"{self}: columns 16, 32, 64 or 128, split m or n, minor 0 or 1, stages and width from 1")
        if self.tile_n < 32:
            raise ValueError(
                f"{self}: tiles of 32 columns or more, whose scales fill 128 bytes, as copies to shared memory are "
                "aligned"
            )

    @property
    def tile_m(self) -> int:
        return ROWS * (2 if self.split == "m" else 1)

    @property
    def tile_n(self) -> int:
        return self.columns * (2 if self.split == "n" else 1)

    def fitting(self, out_dtype: jnp.dtype) -> "Config":
        """The same tile with as many stages as shared memory holds next to the output's tile, at most eight."""
        stage = (self.tile_m + self.tile_n) * (STEP + 4)  # values, and a float32 scale for each row
        free = FREE_SHARED_MEMORY - self.tile_m * self.tile_n * jnp.dtype(out_dtype).itemsize
        return dataclasses.replace(self, stages=min(8, free // stage))


def choose_config(operation: str, m: int, n: int, k: int, out_dtype: jnp.dtype, groups: int = 1) -> Config:
    """The tile for `groups` products [m, k] · [n, k]ᵀ; if groups differ in size, m or k is their mean."""
    kind, cores = device()
    measured = _table(kind).get(operation, {}).get(f"{m}x{n}x{k}")
    return Config(**measured) if measured else rule(m, n, cores, groups).fitting(out_dtype)


def rule(m: int, n: int, cores: int, groups: int = 1) -> Config:
    """The tile with which the busiest core reads the fewest rows of a and b. Up to 64 rows, where reading b takes most
    of the time, tiles are wide rather than tall."""
    split = "n" if m <= ROWS else "m"
    tiles = lambda config: groups * pl.cdiv(m, config.tile_m) * pl.cdiv(n, config.tile_n)
    reads = lambda config: pl.cdiv(tiles(config), cores) * (config.tile_m + config.tile_n)
    return min(
        (Config(columns, split) for columns in ((128, 64, 32) if split == "m" else (128, 64, 32, 16))), key=reads
    )


def table_path(kind: str) -> pathlib.Path:
    """The file of a kind of GPU, named after its first two words: nvidia_h200.json for "NVIDIA H200 141GB HBM3e"."""
    return TABLES / ("_".join(kind.lower().split()[:2]) + ".json")


@functools.cache
def _table(kind: str) -> dict[str, dict[str, dict]]:
    """The fields of Config that `kernels_pallas.bench.tune` measured, by operation and "MxNxK"."""
    path = table_path(kind)
    return json.loads(path.read_text()) if path.exists() else {}
