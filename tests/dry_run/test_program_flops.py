"""FLOPs of traced programs against counts by hand and against XLA's own count of loop-free programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from deepseek_jax.accounting.flops import forward_flops_per_token
from deepseek_jax.dry_run import hlo
from deepseek_jax.dry_run.branches import compiled_branches
from deepseek_jax.dry_run.program_flops import FlopAssumptions, jaxpr_flops, traced_flops
from deepseek_jax.errors import ConfigError
from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer, abstract_variables
from deepseek_jax.parallel.sharding import MeshOps
from kernels_pallas import fp8_grouped_linear, fp8_linear
from kernels_pallas._compat import plgpu


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(fn, *args, **kwargs) -> int:
    return traced_flops(fn, *args, **kwargs).total()


@pytest.mark.parametrize(
    "spec, shapes",
    [
        ("md,df->mf", [(6, 8), (8, 10)]),
        ("btd,btf->bdf", [(2, 3, 4), (2, 3, 5)]),
        ("bthk,bshk->bhts", [(2, 6, 3, 8), (2, 5, 3, 8)]),
    ],
)
def test_products_as_xla_counts_them(spec, shapes):
    args = [f32(*shape) for shape in shapes]
    fn = lambda *x: jnp.einsum(spec, *x)
    assert count(fn, *args) == jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    """Every output element is a dot product over the kernel's window and the input features of its group."""
    images, kernel = f32(2, 4, 9, 9), f32(6, 4 // groups, 3, 3)
    fn = lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "VALID", feature_group_count=groups)
    assert count(fn, images, kernel) == 2 * (2 * 6 * 7 * 7) * (4 // groups * 9)


def test_grouped_product_forward_and_backward():
    """One product forward; two backward, each as large: the weights' gradient and the rows'."""
    rows, width, features, groups = 24, 8, 10, 3
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    args = (f32(rows, width), f32(groups, width, features), sizes)
    forward = 2 * rows * width * features
    assert count(lax.ragged_dot, *args) == forward
    loss = lambda x, w, n: jnp.sum(lax.ragged_dot(x, w, n) ** 2)
    assert count(jax.grad(loss, argnums=(0, 1)), *args) == 3 * forward
    assert count(lax.ragged_dot, *args, assumptions=FlopAssumptions(ragged_fill=0.25)) == forward // 4


def test_loops_count_as_often_as_they_run():
    x = f32(4, 4)
    once = 2 * 4**3
    assert count(lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=7)[0], x) == 7 * once
    assert count(lambda x: lax.fori_loop(0, 5, lambda i, c: c @ c, x), x) == 5 * once
    loop = lambda x: lax.while_loop(lambda c: jnp.sum(c) < 1, lambda c: c @ c, x)
    assert count(loop, x) == once
    assert count(loop, x, assumptions=FlopAssumptions(while_trips=9)) == 9 * once
    nested = lambda x: lax.scan(
        lambda c, _: (lax.scan(lambda d, _: (d @ d, None), c, None, length=3)[0], None), x, None, length=2
    )[0]
    assert count(nested, x) == 6 * once


def test_branches():
    x = f32(4, 4)
    fn = lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
    assert count(fn, x) == 2 * 2 * 4**3
    assert count(fn, x, assumptions=FlopAssumptions(branch="least")) == 2 * 4**3


def test_a_branch_is_compared_at_its_worst():
    """A slow path that may do nothing is still the slow path."""
    x = f32(4, 4)

    def slow(x):
        return lax.scan(lambda c, _: (lax.cond(c[0, 0] > 0, lambda c: c @ c, lambda c: c, c), None), x, None, length=4)[
            0
        ]

    fn = lambda x: lax.cond(x[0, 0] > 0, slow, lambda x: x @ x, x)
    assert count(fn, x, assumptions=FlopAssumptions(branch="least")) == 2 * 4**3
    assert count(fn, x) == 4 * 2 * 4**3


def quick(x, w):
    return jnp.tanh(x @ w[0]) @ w[1]


@jax.checkpoint
def slow(x, w):
    """Three times the same work in a loop, nothing of it kept for the backward pass."""
    return lax.scan(lambda c, _: (quick(c, w), None), x, None, length=3)[0]


def layers(branches, remat):
    """The gradient of three layers with a conditional, and its arguments: n x d, two matrices for each layer."""

    def layer(x, w):
        return x + lax.cond(jnp.sum(x) > 0, *branches, x, w)

    layer = jax.checkpoint(layer) if remat else layer
    loss = lambda x, w: jnp.sum(lax.scan(lambda x, w: (layer(x, w), None), x, w)[0] ** 2)
    return jax.grad(loss, argnums=(0, 1)), (f32(8, 16), (f32(3, 16, 16), f32(3, 16, 16)))


@pytest.mark.parametrize("branches", [(slow, quick), (quick, slow)])
@pytest.mark.parametrize("remat, products", [(False, 6), (True, 7)])
def test_conditionals_of_one_predicate_take_the_same_branch(remat, products, branches):
    """Quick: two products forward, four backward, and the first one again under remat. The slow branch computes three
    times as much forward, again before the backward pass, and backward; it keeps nothing, so that where the layer is
    computed again it would be the cheaper one."""
    gradient, args = layers(branches, remat)
    product = 3 * 2 * 8 * 16 * 16
    assert count(gradient, *args, assumptions=FlopAssumptions(branch="least")) == products * product
    assert count(gradient, *args, assumptions=FlopAssumptions(branch="most")) == 3 * (2 + 2 + 4) * product


@pytest.mark.parametrize("branch, index", [("least", 0), ("most", 1)])
def test_the_compiled_program_is_asked_about_the_same_branches(branch, index):
    """By the place where the conditional was written: forward, computed again and backward. JAX has the branch of False
    first."""
    gradient, args = layers((slow, quick), True)
    taken = jaxpr_flops(jax.make_jaxpr(gradient)(*args).jaxpr, FlopAssumptions(branch=branch))[1]
    module = hlo.parse(jax.jit(gradient).lower(*args).compile().as_text())
    conditionals = [
        i for c in module.computations.values() for i in c.instructions.values() if i.opcode == "conditional"
    ]
    assert len(conditionals) == 3
    assert {module.place(i).file for i in conditionals} == {__file__}
    assert [taken[module.place(i), 2] for i in conditionals] == [index] * 3
    # The other measures would choose otherwise; they follow.
    runs, _ = compiled_branches(
        module, "least" if branch == "most" else "most", lambda scope: len(scope.computation.instructions), 1, taken
    )
    assert list(runs.values()) == [index] * 3


@pytest.mark.parametrize("first, rounds", [(2, 1), (2, 4), (6, 1), (6, 4)])
def test_one_predicate_at_two_places(first, rounds):
    """Each conditional has a cheaper branch, not the same one. Products of False and True: `first` and 1 in the first
    one, 1 and 3 in each round of the second, whose rounds decide."""
    x = f32(4, 4)
    times = lambda n: lambda x: lax.fori_loop(0, n, lambda _, c: c @ c, x)

    def fn(x):
        positive = x[0, 0] > 0
        y = lax.cond(positive, times(1), times(first), x)
        return lax.scan(
            lambda c, _: (lax.switch(positive.astype(jnp.int32), (times(1), times(3)), c), None), y, None, length=rounds
        )[0]

    together = (first + rounds * 1, 1 + rounds * 3)
    assert count(fn, x, assumptions=FlopAssumptions(branch="least")) == min(together) * 2 * 4**3
    assert count(fn, x) == max(together) * 2 * 4**3


def test_predicates_apart():
    """Two conditionals of different predicates in one line, and one in a loop whose predicate moves with it, each
    choose alone."""
    x = f32(4, 4)
    fn = lambda x: (
        lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)
        + lax.cond(x[1, 1] > 0, lambda x: x, lambda x: x @ x @ x, x)
    )
    assert count(fn, x, assumptions=FlopAssumptions(branch="least")) == 0
    assert count(fn, x) == 3 * 2 * 4**3

    def body(carry):
        x, positive = carry
        return lax.cond(positive, lambda x: x, lambda x: x @ x, x), ~positive

    def moving(loop, x):
        positive = x[0, 0] > 0
        x = loop((x, positive))[0]
        return lax.cond(positive, lambda x: x @ x, lambda x: x, x)

    loops = (
        lambda carry: lax.scan(lambda carry, _: (body(carry), None), carry, None, length=3)[0],
        lambda carry: lax.while_loop(lambda carry: jnp.sum(carry[0]) < 1, body, carry),
    )
    for loop in loops:
        assert count(functools.partial(moving, loop), x, assumptions=FlopAssumptions(branch="least")) == 0


def test_unknown_branch_is_refused():
    with pytest.raises(ConfigError, match="most"):
        FlopAssumptions(branch="mots")
    with pytest.raises(ConfigError, match="from 0 to 1"):
        FlopAssumptions(ragged_fill=2.0)


@pytest.mark.parametrize("remat, products", [(False, 6), (True, 7)])
def test_recomputation_is_work(remat, products):
    """Two products forward and four backward; recomputing needs the first one again, of the second only its input."""
    n, d = 8, 16

    def layer(x, w):
        return x + jnp.tanh(x @ w[0]) @ w[1]

    layer = jax.checkpoint(layer) if remat else layer
    loss = lambda x, w: jnp.sum(lax.scan(lambda x, w: (layer(x, w), None), x, w)[0] ** 2)
    args = (f32(n, d), (f32(3, d, d), f32(3, d, d)))
    assert count(jax.grad(loss, argnums=(0, 1)), *args) == 3 * products * 2 * n * d * d


def test_custom_derivatives():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    args = (f32(4, 6), f32(6, 8))
    assert count(product, *args) == 2 * 4 * 6 * 8
    assert count(jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2), argnums=(0, 1)), *args) == 3 * 2 * 4 * 6 * 8


def test_what_nothing_depends_on_is_not_counted():
    assert count(jax.grad(lambda x, w: jnp.sum(x @ w), argnums=1), f32(4, 6), f32(6, 8)) == 2 * 4 * 6 * 8


@pytest.mark.parametrize("spec, repeated", [(P("data", None), 1), (P(None, None), 4)])
def test_shard_map_counts_every_device(spec, repeated):
    """Rows divided among 4 of 8 devices; the other axis repeats the work, and so do equal rows on all of them."""
    mesh = AbstractMesh((4, 2), ("data", "model"))
    fn = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    assert count(fn, f32(16, 8), f32(8, 8)) == 2 * 16 * 8 * 8 * 2 * repeated


def test_shard_map_over_some_axes():
    """Axes that stay automatic divide the work of the body among them, and count once."""
    mesh = AbstractMesh((4, 2), ("data", "model"))
    fn = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
    )
    assert count(fn, f32(16, 8), f32(8, 8)) == 2 * 16 * 8 * 8


def test_number_formats_apart():
    def fn(x, y):
        return x @ x, lax.dot_general(y, y, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    fp8 = jax.ShapeDtypeStruct((4, 4), jnp.float8_e4m3fn)
    assert dict(traced_flops(fn, jax.ShapeDtypeStruct((8, 8), jnp.bfloat16), fp8)) == {
        "bfloat16": 2 * 8**3,
        "float8_e4m3fn": 2 * 4**3,
    }


def test_kernels_count_their_grid():
    from jax.experimental import pallas as pl

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    def fn(x, w):
        block = pl.BlockSpec((8, 16), lambda i: (i, 0))
        return pl.pallas_call(
            kernel, grid=(4,), in_specs=[block, pl.BlockSpec((16, 16), lambda i: (0, 0))], out_specs=block, out_shape=x
        )(x, w)

    assert count(fn, f32(32, 16), f32(16, 16)) == 2 * 32 * 16 * 16


@pytest.mark.parametrize("mtp", [False, True])
def test_the_network_computes_what_the_closed_formula_says(mtp):
    """V3's layers at a tenth of their width. The formula's parameters include those of norms and the correction biases,
    which are in no product, its attention sees half the sequence, where the program masks the other half, and it leaves
    out the sum of a token's expert results, weighted by the gates: three exact terms."""
    config = ModelConfig(
        vocab_size=500,
        hidden_size=96,
        num_layers=3,
        intermediate_size=192,
        attention=MLAConfig(
            num_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
        ),
        moe=MoEConfig(num_experts=16, top_k=4, intermediate_size=32, num_shared_experts=1, num_groups=4, topk_groups=2),
        first_k_dense=1,
        mtp_depth=1,
    )
    model, length = Transformer(config, Ops("bfloat16", target="tpu")), 64

    def forward(variables, tokens_BT):
        output = model.apply(variables, tokens_BT, mtp=mtp)
        return [model.apply(variables, hidden, method="unembed") for hidden in (output.hidden_BTD, *output.mtp_hidden)]

    counted = count(forward, abstract_variables(model), jax.ShapeDtypeStruct((2, length), jnp.int32))
    layers, moe_layers, modules = config.num_layers + mtp, config.num_moe_layers + mtp, int(mtp)
    masked = layers * config.attention.pair_flops * length // 2
    norms = layers * (2 * 96 + 48 + 32) + 96 + modules * 3 * 96
    in_no_product = 2 * (norms + moe_layers * 16)
    gates = 2 * moe_layers * 4 * 96
    assert counted == 2 * length * (forward_flops_per_token(config, length, mtp=mtp) + masked + gates - in_no_product)


def test_routed_experts_on_an_expert_mesh_are_computed_again():
    """Of a rematerialized MoE layer each routed product counts four times: forward, again, and twice backward; without
    remat three times. So it does in the round that serves a balanced load, whose receive buffers are half full. Experts
    twice as wide show what they alone take."""
    tokens, width, top_k, peers = (8, 64), 64, 2, 8
    mesh = Mesh(
        np.array(jax.devices()[:peers]).reshape(1, 1, peers, 1, 1), ("data", "fsdp", "expert", "context", "tensor")
    )

    def gradient_flops(intermediate_size: int, remat: str) -> int:
        moe = MoEConfig(num_experts=16, top_k=top_k, intermediate_size=intermediate_size, num_shared_experts=0)
        attention = MLAConfig(
            num_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
        )
        config = ModelConfig(
            vocab_size=500,
            hidden_size=width,
            num_layers=1,
            intermediate_size=96,
            attention=attention,
            moe=moe,
            first_k_dense=0,
        )
        model = Transformer(config, MeshOps("bfloat16", RuntimeConfig(remat=remat), target="tpu", mesh=mesh))
        loss = lambda params, rest, tokens_BT: jnp.sum(model.apply({"params": params, **rest}, tokens_BT).hidden_BTD)
        variables = abstract_variables(Transformer(config))
        params = variables.pop("params")
        return count(
            jax.grad(loss),
            params,
            variables,
            jax.ShapeDtypeStruct(tokens, jnp.int32),
            assumptions=FlopAssumptions(branch="least", ragged_fill=0.5),
        )

    wider = 128
    product = 2 * tokens[0] * tokens[1] * top_k * width * wider
    for remat, times in (("none", 3), ("full", 4)):
        assert gradient_flops(2 * wider, remat) - gradient_flops(wider, remat) == times * 3 * product, remat


@pytest.mark.parametrize(
    "implementation, number_format", [("mosaic_gpu_sm90", "float8_e4m3fn"), ("mosaic_tpu", "bfloat16")]
)
def test_kernels_count_what_they_multiply(implementation, number_format):
    """Their loops end where data say, and their tiles may be masked: neither changes the count."""
    if implementation == "mosaic_gpu_sm90" and plgpu is None:
        pytest.skip("jax.experimental.pallas.mosaic_gpu does not import: needs absl-py")
    rows, width, features, groups, batch = 200, 256, 384, 3, 2
    linear = functools.partial(fp8_linear, implementation=implementation)
    grouped = functools.partial(fp8_grouped_linear, implementation=implementation)
    forward = 2 * rows * width * features
    x, w, sizes = f32(rows, width), f32(width, features), jax.ShapeDtypeStruct((groups,), jnp.int32)
    assert traced_flops(linear, x, w) == {number_format: forward}
    assert traced_flops(jax.vmap(linear, (0, None)), f32(batch, rows, width), w) == {number_format: batch * forward}
    assert count(jax.grad(lambda *args: jnp.sum(linear(*args) ** 2), argnums=(0, 1)), x, w) == 3 * forward
    assert (
        count(grouped, x, f32(groups, width, features), sizes, assumptions=FlopAssumptions(branch="least")) == forward
    )
    assert (
        count(grouped, x, f32(groups, width, features), sizes, assumptions=FlopAssumptions(ragged_fill=0.25))
        == forward // 4
    )
