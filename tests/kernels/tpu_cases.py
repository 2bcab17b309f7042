"""Helpers of the TPU kernels' tests: exact operands, interpreters, the chips to compile for, and the kernels' text."""

import base64
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.dry_run.topologies import topology
from kernels_pallas import QTensor

# What the matrix unit is to be given, in the kernel's text.
MULTIPLIED = {"v5e:2x4": "bf16", "v5p:2x2x1": "bf16", "v6e:2x4": "bf16", "tpu7x:2x2x1": "f8E4M3FN"}
on_every_chip = pytest.mark.parametrize(
    "topology", [pytest.param(name, marks=pytest.mark.aot(chip=name.partition(":")[0])) for name in MULTIPLIED]
)
# copies, memory that was never written, reads past an end: everything a TPU does, slowly
SIMULATED = pltpu.InterpretParams()
EVALUATED = True  # block by block, three times as fast


def run(function, *args, interpreter=EVALUATED):
    """function(*args) with its TPU kernels interpreted, as NumPy arrays."""
    with pltpu.force_tpu_interpret_mode(interpreter):
        return jax.tree.map(np.asarray, jax.jit(function)(*args))


def whole_numbers(seed: int, shape: tuple[int, ...], tile: tuple[int, int]) -> QTensor:
    """Small whole numbers with scales of 1/2, 1 or 2: every sum of products of a thousand is exact in float32, in any
    order."""
    random = np.random.default_rng(seed)
    scales = (*shape[:-2], *(-(-size // part) for size, part in zip(shape[-2:], tile, strict=True)))
    values = jnp.asarray(random.integers(-4, 5, shape), jnp.float8_e4m3fn)
    return QTensor(values, jnp.asarray(2.0 ** random.integers(-1, 2, scales), jnp.float32), tile)


def normal(seed: int, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def described(shape: tuple[int, ...], tile: tuple[int, int]) -> QTensor:
    """A QTensor's shapes and dtypes."""
    scales = (*shape[:-2], *(-(-size // part) for size, part in zip(shape[-2:], tile, strict=True)))
    return QTensor(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(scales, jnp.float32), tile)


def lower(name: str, function, *specs, sharded: int = 0) -> jax.stages.Lowered:
    """Lowers `function` as it runs on each device of the topology `name`, in a `shard_map` that checks what varies. The
    first `sharded` arguments and the result are split along their first axis; the shapes given are a device's."""
    devices = np.array(topology(name).devices)
    mesh = jax.sharding.Mesh(devices, ("data",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("data",), ()))

    def place(spec, index):
        rows = (spec.shape[0] * devices.size, *spec.shape[1:]) if index < sharded else spec.shape
        return jax.ShapeDtypeStruct(rows, spec.dtype, sharding=split if index < sharded else whole)

    specs = [jax.tree.map(lambda spec, index=index: place(spec, index), arg) for index, arg in enumerate(specs)]
    in_specs = tuple(split.spec if index < sharded else whole.spec for index in range(len(specs)))
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=split.spec if sharded else whole.spec)
    ).lower(*specs)


def kernel_texts(lowered: jax.stages.Lowered) -> list[str]:
    """The Mosaic module of each kernel in a lowered program."""
    from jax._src.lib import tpu
    from jaxlib.mlir import ir

    context = ir.Context()
    tpu.register_dialect(context)
    context.allow_unregistered_dialects = True
    bodies = re.findall(r"body\\22: \\22([A-Za-z0-9+/=]+)", lowered.as_text())
    return [str(ir.Module.parse(base64.b64decode(body), context)) for body in bodies]


def multiplied(lowered: jax.stages.Lowered) -> set[str]:
    """Element types of the operands of every product on the matrix unit."""
    operands = re.findall(r'tpu\.matmul"\(.*: \(vector<([^>]*)>, vector<([^>]*)>,', "\n".join(kernel_texts(lowered)))
    return {vector.rpartition("x")[2] for pair in operands for vector in pair}
