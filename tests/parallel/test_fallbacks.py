"""Fallbacks are logged once, with the reason and a way to avoid them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import CONFIG, mesh_ops, on, variables

from deepseek_jax.model.attention_core import Tokens, self_attention
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Block, Transformer
from deepseek_jax.parallel.arrays import variables_sharding
from deepseek_jax.parallel.dual_batch import DualBatchBlock, dual_batch_block
from deepseek_jax.parallel.rules import divide
from deepseek_jax.precision import get_precision
from kernels_pallas import trust


@pytest.fixture(autouse=True)
def said(monkeypatch, caplog):
    """-> the notes so far."""
    monkeypatch.setattr(trust, "_said", set())
    return lambda: [record.getMessage() for record in caplog.records if record.name == trust.log.name]


def attend(device, heads=2, grouped=1, length=128, precision="bfloat16", width=64):
    q, kv = (jax.ShapeDtypeStruct((1, length, heads, *g, width), jnp.bfloat16) for g in ((grouped,), ()))
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    ops = Ops(precision, target=device)
    return str(jax.make_jaxpr(lambda q, k, v, s: self_attention(ops, 0.1, q, s, (k, v)))(q, kv, kv, segments))


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"grouped": 4}, "takes one query head to each key head, not 4"),
        ({"length": 100}, "takes lengths that are multiples of 128, not 100 and 100"),
        ({"width": 48}, "takes heads of multiples of 64 up to 256, not 48 and 48"),
        ({"precision": "float32"}, "attends in bfloat16, not float32"),
    ],
)
def test_attention_says_why_its_scores_lie_in_memory(changes, why, said):
    for _ in range(2):
        assert "pallas_call" not in attend("tpu", **changes)
    (note,) = said()
    assert (
        note.startswith("attention: mosaic_tpu ")
        and why in note
        and "The scores lie in memory instead" in note
        and "avoid it" in note
    )


def test_attention_with_a_kernel_or_where_there_is_none_for_anybody_says_nothing(said):
    assert "pallas_call" in attend("tpu")
    assert "pallas_call" not in attend("cpu", grouped=4) and "pallas_call" not in attend("sm80")
    assert not said()


@pytest.mark.parametrize(
    "device, told", [("sm80", True), ("sm100", True), ("cpu", False), ("tpu", False), ("sm90", False)]
)
def test_fp8_says_where_it_is_emulated(device, told, said):
    for _ in range(2):
        get_precision("fp8_deepseek").has_kernels(device)
    assert len(said()) == told
    assert not told or (
        f"this device, {device}, has no FP8 kernels, so XLA emulates" in said()[0]
        and "config.precision=bfloat16" in said()[0]
    )


class Other(Block):
    """A block of an ablation's own."""

    @nn.compact
    def __call__(self, x_BTD, tokens, cache_entry, expert_ids_BTK):
        y_BTD, rest = super().__call__(x_BTD, tokens, cache_entry, expert_ids_BTK)
        return 2 * y_BTD, rest


def through(block, rows):
    """The block on some sequences, wrapped for a mesh and as it is."""
    ops = mesh_ops({"fsdp": 2, "expert": 2, "tensor": 2}, dual_batch=True)
    positions = jnp.broadcast_to(jnp.arange(12), (rows, 12))
    x, tokens = (
        jax.random.normal(jax.random.key(0), (rows, 12, CONFIG.hidden_size)),
        Tokens(positions, jnp.ones_like(positions)),
    )
    params = {"params": jax.tree.map(lambda w: w[0], variables()["params"]["dense_layers"])}
    call = lambda block, ops: block(CONFIG, ops, None).apply(params, x, tokens, None, None)[0]
    return call(ops.wrap_layer(block), ops), call(block, Ops())


def test_dual_batch_runs_the_block_it_is_given(said):
    halves, plain = through(Other, 8)
    np.testing.assert_allclose(halves, plain, rtol=1e-5, atol=1e-5)
    assert (
        dual_batch_block(Block) is DualBatchBlock
        and dual_batch_block(Other) is dual_batch_block(Other)
        and dual_batch_block(Other).of is Other
    )
    assert not said()


def test_dual_batch_that_cannot_halve_says_so(said):
    halves, plain = through(Block, 4)
    np.testing.assert_allclose(halves, plain, rtol=1e-5, atol=1e-5)
    (note,) = said()
    assert "4 sequences do not make two halves on each of the 4 devices" in note and "multiples of 8 avoid it" in note


def test_a_dimension_that_stays_whole_is_said(said):
    for _ in range(2):
        variables_sharding(on({"fsdp": 4, "tensor": 2}, Transformer(CONFIG.replace(vocab_size=41, hidden_size=18))))
    (note,) = said()
    assert "embed of 18 by fsdp of 4" in note and "vocab of 41 by tensor of 2" in note and "ffn" not in note
    variables_sharding(on({"fsdp": 4, "tensor": 2}))  # divides evenly
    assert len(said()) == 1


def test_a_dimension_is_divided_as_far_as_what_is_left_of_it_divides():
    whole = set()
    assert divide({"embed": ("fsdp", "expert")}, {"fsdp": 4, "expert": 2}, ("embed",), (12,), whole=whole) == (
        ("fsdp",),
    )
    assert whole == {"embed of 12 by fsdp and expert of 8"}
