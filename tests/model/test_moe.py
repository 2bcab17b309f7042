"""Tokens sorted by expert, and both ways through the experts against a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import jit, random_like, tiny_config, tiny_moe

from deepseek_jax.model.config import MoEConfig
from deepseek_jax.model.moe import Experts, MoE
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.permute import permute, sort_by_expert, unpermute
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.precision import Precision, get_precision

E, K, D, F = 4, 2, 5, 3
CHOICES = {
    "random": lambda n: np.argsort(np.random.default_rng(n).random((n, E)), axis=1)[:, :K],
    "all to two experts": lambda n: np.tile([2, 1], (n, 1)),
    "all to one expert": lambda n: np.tile([3, 3], (n, 1)),  # a replayed choice may repeat an expert
}


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_pair_has_its_own_slot_in_its_experts_group(alignment, choice):
    ids = CHOICES[choice](33).astype(np.int32)
    order, sizes = sort_by_expert(jnp.asarray(ids), E, alignment)
    slots, pairs, sizes = np.asarray(order.slots_NK).reshape(-1), np.asarray(order.pairs_R), np.asarray(sizes)
    assert len(set(slots)) == ids.size  # no two share a slot: nothing is dropped
    np.testing.assert_array_equal(pairs[slots], np.arange(ids.size))
    assert np.sum(pairs == ids.size) == len(pairs) - ids.size  # all other slots are padding
    assert np.all(sizes % alignment == 0) and sizes.sum() <= len(pairs) and len(pairs) % alignment == 0
    np.testing.assert_array_equal(sizes, -(-np.bincount(ids.reshape(-1), minlength=E) // alignment) * alignment)
    group_of_slot = np.repeat(np.arange(E), sizes)
    np.testing.assert_array_equal(group_of_slot[slots], ids.reshape(-1))


def test_permuting_and_unpermuting():
    ids = CHOICES["random"](7).astype(np.int32)
    order, _ = sort_by_expert(jnp.asarray(ids), E, 8)
    x = np.random.default_rng(0).normal(size=(7, D)).astype(np.float32)
    permuted = np.asarray(permute(jnp.asarray(x), order))
    np.testing.assert_array_equal(unpermute(jnp.asarray(permuted), order), np.repeat(x[:, None], K, axis=1))
    padded = np.asarray(order.pairs_R) == ids.size
    assert not permuted[padded].any()


class Ragged(Precision):
    """The policy as it is on TPU: no padding to blocks."""

    def alignment(self, tokens, num_groups, device):
        return 1


float32 = get_precision("float32")
PRECISIONS = {
    "dense": float32,
    "grouped": float32,
    "ragged": Ragged("ragged", *(jnp.dtype("float32"),) * 2, float32.matmul_precision),
}


def experts_call(implementation):
    """Compiled (params, x, ids, gates, dy) -> (y, gradients of params, x and gates)."""
    runtime = RuntimeConfig(experts="dense" if implementation == "dense" else "grouped")
    module = Experts(tiny_config(moe=MoEConfig(E, K, F)), Ops(PRECISIONS[implementation], runtime))

    def call(params, x, ids, gates, dy):
        y, pull = jax.vjp(
            lambda p, x, g: module.apply({"params": p}, x[None], ids[None], g[None])[0][0], params, x, gates
        )
        return y, pull(dy)

    return jit(call)


@pytest.mark.parametrize("n", [1, 7, 64])
def test_dense_and_grouped_equal_a_loop_over_tokens(n):
    rng = np.random.default_rng(n)
    params = {"gate": rng.normal(size=(E, D, F)), "up": rng.normal(size=(E, D, F)), "down": rng.normal(size=(E, F, D))}
    x, gates, dy = rng.normal(size=(n, D)), rng.random((n, K)), rng.normal(size=(n, D))
    arguments = jax.tree.map(jnp.float32, (params, x, gates, dy))
    calls = {name: experts_call(name) for name in (("dense", "grouped", "ragged") if n == 7 else ("dense", "grouped"))}

    def expert(e, x_D):
        gate = x_D @ params["gate"][e]
        return (gate / (1 + np.exp(-gate)) * (x_D @ params["up"][e])) @ params["down"][e]

    for choose in CHOICES.values():
        ids = choose(n)
        expected = np.stack([sum(gates[t, k] * expert(ids[t, k], x[t]) for k in range(K)) for t in range(n)])
        gate_gradient = np.stack([[dy[t] @ expert(ids[t, k], x[t]) for k in range(K)] for t in range(n)])
        reference = None
        for name, call in calls.items():
            y, gradients = call(arguments[0], arguments[1], jnp.int32(ids), *arguments[2:])
            np.testing.assert_allclose(y, expected, atol=1e-4, rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(gradients[2], gate_gradient, atol=1e-4, rtol=1e-5, err_msg=name)
            reference = reference or gradients
            for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(reference), strict=True):
                np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max() + 1e-7, err_msg=name)


@pytest.mark.parametrize(("precision", "apart"), [("bfloat16", 0.01), ("fp8_deepseek", 0.04)])
def test_dense_and_grouped_agree_in_narrow_formats(precision, apart):
    """As far as rounding goes: grouped keeps SwiGLU's inputs in E4M3, dense its result. Neither is more than one
    rounding from the other."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    params = {"params": {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}}
    x, ids, gates = (
        jnp.bfloat16(rng.normal(size=(1, 9, D))),
        jnp.int32(rng.integers(0, E, (1, 9, K))),
        jnp.float32(rng.random((1, 9, K))),
    )

    def gradients(implementation):
        ops = Ops(precision, RuntimeConfig(experts=implementation))
        module = Experts(tiny_config(moe=MoEConfig(E, K, F)), ops)
        loss = lambda params, x: jnp.sum(module.apply(params, x, ids, gates)[0].astype(jnp.float32) ** 2)
        return jax.tree.leaves(jit(jax.grad(loss, (0, 1)))(params, x))

    for dense, grouped in zip(gradients("dense"), gradients("grouped"), strict=True):
        dense, grouped = np.float32(dense), np.float32(grouped)
        assert 0 < np.linalg.norm(dense - grouped) < apart * np.linalg.norm(grouped)


def test_replay_of_a_permuted_choice_keeps_gates_and_router_gradient():
    """Gates are recomputed for the experts that are replayed, in their order; they never come out of a masked score."""
    config = tiny_moe()
    module = MoE(tiny_config(moe=config), Ops())
    x = jnp.float32(np.random.default_rng(0).normal(size=(1, 9, D)))
    valid = jnp.ones((1, 9), bool)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, valid, None))
    variables = random_like(shapes)

    def loss(params, ids):
        y, routing = module.apply({**variables, "params": params}, x, valid, ids)
        return jnp.sum(y * jnp.arange(D)), (y, routing.expert_ids_LBTK)

    own = jit(lambda params: loss(params, None)[1])
    replayed = jit(jax.value_and_grad(loss, has_aux=True))
    params = variables["params"]
    y, ids = own(params)
    reversed_ids = np.asarray(ids)[..., ::-1]
    (_, (y_reversed, kept)), _ = replayed(params, reversed_ids)
    np.testing.assert_array_equal(kept, reversed_ids)
    np.testing.assert_allclose(y, y_reversed, rtol=1e-5, atol=1e-6)  # the same experts in another order
    other_ids = (np.asarray(ids) + 1) % config.num_experts  # experts the router did not choose
    (_, (y_other, _)), gradient = replayed(params, other_ids)
    assert np.abs(np.asarray(y_other) - np.asarray(y)).max() > 1e-3
    assert np.abs(np.asarray(y_other)).min(axis=-1).max() > 0
    assert np.abs(gradient["router"]["kernel"]).max() > 1e-4
