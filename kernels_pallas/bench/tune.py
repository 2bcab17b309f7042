"""python -m kernels_pallas.bench.tune [--only=TEXT]

Measures the tiles of the Hopper products on DeepSeek-V3's shapes, and writes the fastest for each shape to the table of
this kind of GPU, kernels_pallas/tuning/<kind>.json. The products read it; shapes that are not in it follow a rule.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.bench.flags import check_only
from kernels_pallas.bench.measure import case, error
from kernels_pallas.bench.shapes import Shape, shapes
from kernels_pallas.bench.timing import seconds
from kernels_pallas.grouped import mosaic_gpu_sm90 as grouped
from kernels_pallas.hopper_tuning import Config, table_path
from kernels_pallas.matmul import mosaic_gpu_sm90 as dense
from kernels_pallas.matmul.accumulation import Accumulation


def candidates(out_dtype: jnp.dtype) -> Iterator[Config]:
    """Every tile with the most stages that fit, in every order of tiles."""
    tiles = [*itertools.product((128, 64, 32), ("m", "n")), (16, "n")]
    for (columns, split), minor, width in itertools.product(tiles, (0, 1), (1, 8, 16)):
        yield Config(columns, split, minor=minor, width=width).fitting(out_dtype)


def product(shape: Shape) -> tuple[str, jnp.dtype, Callable]:
    """The operation's name in the table, the dtype of its result, and a function of a configuration and the
    operands."""
    if shape.operation in ("dense", "weight gradient"):
        out_dtype = jnp.float32 if "gradient" in shape.operation else jnp.bfloat16
        return "fp8_matmul", out_dtype, lambda config, a, b: dense.matmul(a, b, Accumulation(), out_dtype, config)
    sizes = jnp.full((shape.groups,), shape.k if "gradient" in shape.operation else shape.m, jnp.int32)
    if shape.operation == "grouped":
        run = lambda config, a, b: grouped.grouped_matmul(a, b, sizes, 128, Accumulation(), jnp.bfloat16, config)
        return "fp8_grouped_matmul", jnp.bfloat16, run
    run = lambda config, a, b: grouped.grouped_weight_gradient(a, b, sizes, 128, Accumulation(), jnp.float32, config)
    return "fp8_grouped_weight_gradient", jnp.float32, run


def fastest(
    shape: Shape, measure: Callable[..., float] = seconds, off: Callable[..., float] = error
) -> tuple[str, Config, float]:
    """The operation, its fastest configuration for this shape among those that are right, and its seconds. Raises
    ValueError if none is right."""
    operation, out_dtype, run = product(shape)
    both = case(shape, "xla")
    runs = [(functools.partial(run, config), config) for config in candidates(out_dtype)]
    timed = [
        (measure(run, *both.fp8_arguments), config) for run, config in runs if off(shape, both, run) <= both.allowed
    ]
    if not timed:
        raise ValueError(
            f"{operation} {shape.text}: no configuration computes what it should; python -m kernels_pallas.bench shows "
            "by how much they are off"
        )
    best, config = min(timed, key=lambda pair: pair[0])
    return operation, config, best


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "kernels_pallas.bench.tune", description="Measures the tiles of the Hopper products.", allow_abbrev=False
    )
    parser.add_argument("--only", default="", help="products whose name contains this")
    flags = parser.parse_args(argv)
    check_only(parser, flags.only, (shape.title for shape in shapes()))
    device = jax.devices()[0]
    if getattr(device, "compute_capability", "") != "9.0":
        parser.error(f"this is {device.device_kind}; the table is measured on an NVIDIA Hopper GPU")
    path = table_path(device.device_kind)
    table = json.loads(path.read_text()) if path.exists() else {}
    for shape in shapes():
        if flags.only in shape.title:
            operation, config, best = fastest(shape)
            print(
                f"{operation} {shape.m}x{shape.n}x{shape.k}: {config}, {shape.flops / best / 1e12:.0f} TFLOP/s",
                flush=True,
            )
            table.setdefault(operation, {})[f"{shape.m}x{shape.n}x{shape.k}"] = dataclasses.asdict(config)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(table, indent=1) + "\n")
            partial.replace(path)


if __name__ == "__main__":
    main()
