"""Results of the kernels inside a checked `shard_map` differ along the mesh axes along which their operands do. Traced
only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import SM90
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp
from kernels_pallas._compat import plgpu, varying_axes

pytestmark = pytest.mark.skipif(
    plgpu is None, reason="needs jax.experimental.pallas.mosaic_gpu (jax 0.10: install absl-py)"
)
X, W = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 512), jnp.float32)
ORDER = (SM90, "xla")  # what V3 keeps in E5M6 is quantized without a kernel


def operations(x, up, w):
    q, b = kp.quantize_tile(x, implementation=SM90), kp.quantize_block(w, implementation=SM90)
    yield q
    yield kp.quantize_transposed(x, implementation=SM90)
    yield kp.requantize_transposed(q, implementation=SM90)
    yield kp.swiglu_quantize(x, up, implementation=SM90)
    yield kp.fp8_matmul(q, b.mT, implementation=SM90)
    y, pull_back = jax.vjp(lambda x, up, w: kp.fp8_swiglu_linear(x, up, w, implementation=ORDER), x, up, w)
    yield y
    yield pull_back(y)[:2]


def test_outputs_vary_as_their_operands_do():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("rows", "other"))
    seen = []

    def body(x, up, w):
        seen.extend(varying_axes(leaf) for result in operations(x, up, w) for leaf in jax.tree.leaves(result))
        return x

    jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=(P("rows"), P("rows"), P()), out_specs=P("rows")), X, X, W)
    assert len(seen) == 12 and set(seen) == {frozenset({"rows"})}
