"""The policy fp8_deepseek: what it multiplies in FP8, what it keeps, and how a file changes it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Transformer, abstract_variables, init_variables
from deepseek_jax.precision import FP8Precision, get_precision
from kernels_pallas import PreQuantized, QTensor, dequantize, quantize_block

ALL_ROLES = ["linear", "attention_output", "experts", "mtp_projection"]
CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_layers=2,
    intermediate_size=48,
    attention=MLAConfig(
        num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=24
    ),
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=16, num_shared_experts=1),
    first_k_dense=1,
    mtp_depth=1,
    init_std=0.1,
)
ONE_LAYER = CONFIG.replace(num_layers=1, first_k_dense=0, mtp_depth=0)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab_size)
VARIABLES = init_variables(Transformer(ONE_LAYER), jax.random.key(0))


@functools.cache
def loss_and_gradients(precision):
    model = Transformer(ONE_LAYER, Ops(precision))

    def loss(params, expert_ids):
        variables = VARIABLES | {"params": params}
        hidden = model.apply(variables, TOKENS, expert_ids_LBTK=expert_ids).hidden_BTD
        log_probs = jax.nn.log_softmax(model.apply(variables, hidden, method="unembed"))
        return -jnp.mean(jnp.take_along_axis(log_probs, TOKENS[..., None], axis=-1))

    # expert 2 gets nothing
    ids = jnp.tile(jnp.array([0, 3]), (1, *TOKENS.shape, 1)).at[:, :, ::2].set(jnp.array([1, 3]))
    return jax.jit(jax.value_and_grad(loss), compiler_options={"xla_backend_optimization_level": 0})(
        VARIABLES["params"], ids
    )


def test_gradients_stand_a_little_further_off_than_those_of_bfloat16():
    """E4M3 has 3 fraction bits and bfloat16 has 7: two dozen tokens average little of the difference away."""
    (exact, exact_grads), (half, half_grads), (eight, eight_grads) = (
        loss_and_gradients(get_precision(name)) for name in ("float32", "bfloat16", "fp8_deepseek")
    )

    def apart(grads):
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True)
        return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs]

    assert all(grad.dtype == jnp.float32 for grad in jax.tree.leaves(eight_grads))
    assert abs(eight - exact) / exact < 5e-3
    ratio = np.median(apart(eight_grads)) / np.median(apart(half_grads))
    assert abs(half - exact) < abs(eight - exact) and 4 < ratio < 32 and max(apart(eight_grads)) < 0.45


def test_without_any_role_it_is_bfloat16():
    eight = loss_and_gradients(get_precision({"name": "fp8_deepseek", "high_precision": ALL_ROLES}))
    half = loss_and_gradients(get_precision("bfloat16"))
    jax.tree.map(np.testing.assert_array_equal, eight, half)


def eight_bit_casts(spec) -> int:
    """Casts to E4M3 in the forward pass: two for each product, but that routed experts' gate and up read the same rows;
    and one in each attention for the latents that a cache keeps, which the compiler drops where there is none."""
    model = Transformer(CONFIG, Ops(get_precision(spec)))
    program = jax.make_jaxpr(lambda v: model.apply(v, TOKENS, mtp=True).mtp_hidden)(
        abstract_variables(Transformer(CONFIG))
    )
    return len(re.findall(r"new_dtype=float8_e4m3fn", str(program)))


def test_weights_that_stay_are_not_rounded_where_their_gradients_are_summed():
    """Above the product the gradient of a rounded weight would be summed over devices in bfloat16."""
    r, w = get_precision("fp8_deepseek"), jnp.ones((256, 128))
    assert r.weight(w, "mtp_projection", w.shape) is w
    assert isinstance(r.weight(w, "linear", (32, 128)), PreQuantized)
    assert r.weight(w, "linear", (4, 128)) is w  # crumbs of a block
    assert (
        get_precision({"name": "fp8_deepseek", "quantization": {"products": ("forward",)}}).weight(w, "linear", w.shape)
        is w
    )


def test_every_linear_and_expert_runs_in_fp8_and_nothing_else():
    """In a layer: q_a, q_b, kv_a, kv_b, o; gate, up, down of the dense layer; and three of the experts' and the shared
    expert's."""
    attention, dense, moe = 5, 3, 6
    layers = (attention + dense) + (attention + moe) + (attention + moe)  # a dense layer, a MoE layer, the MTP module's
    shared, latents = 2, 3  # of two MoE layers; of three attentions
    assert eight_bit_casts("fp8_deepseek") == 2 * layers - shared + latents
    assert (
        eight_bit_casts({"name": "fp8_deepseek", "high_precision": ["experts", "mtp_projection"]})
        == 2 * (layers - 6) + latents
    )
    without_output = {"name": "fp8_deepseek", "high_precision": ["attention_output", "mtp_projection"]}
    assert eight_bit_casts(without_output) == 2 * (layers - 3) - shared + latents
    assert eight_bit_casts({"name": "fp8_deepseek", "high_precision": []}) == 2 * (layers + 1) - shared + latents
    assert eight_bit_casts("bfloat16") == 0


def test_latents_that_no_cache_keeps_are_not_rounded():
    model = Transformer(ONE_LAYER, Ops("fp8_deepseek"))
    casts = []
    for what in (lambda out: out.hidden_BTD, lambda out: (out.hidden_BTD, out.latents)):
        compiled = jax.jit(lambda v, what=what: what(model.apply(v, TOKENS))).lower(VARIABLES).compile()
        casts.append(len(re.findall(r"convert\(", compiled.as_text())))
    assert casts[0] < casts[1]


def kept(function, *arguments) -> list[str]:
    """The residuals of the backward pass, as dtype[shape]."""
    _, pull_back = jax.vjp(function, *arguments)
    return sorted(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(pull_back))


def test_what_is_kept_for_the_backward_pass():
    r, x, w = get_precision("fp8_deepseek"), jnp.ones((8, 256), jnp.bfloat16), jnp.ones((256, 128))
    assert kept(lambda x: r.linear(x, w), x) == ["float32[256, 128]", "float32[8, 2]", "float8_e4m3fn[8, 256]"]
    # the attention's output in E5M6, which bfloat16 holds
    assert kept(lambda x: r.linear(x, w, "attention_output"), x) == [
        "bfloat16[8, 256]",
        "float32[256, 128]",
        "float32[8, 2]",
    ]
    gate_and_up = ["float32[256, 128]", *2 * ["float32[8, 2]"], *2 * ["float8_e4m3fn[8, 256]"]]
    assert kept(lambda gate, up: r.swiglu_linear(gate, up, w), x, x) == gate_and_up
    sizes = jnp.array([3, 5])
    grouped = kept(lambda x: r.grouped_swiglu_linear(x, x, jnp.stack([w, w]), sizes, 1), x)
    assert [name for name in grouped if "float8" in name] == 2 * ["float8_e4m3fn[8, 256]"]
    assert not any(name == "bfloat16[8, 256]" for name in grouped)


def test_scales_of_the_attention_output_are_powers_of_two():
    r = get_precision("fp8_deepseek")
    _, pull_back = jax.vjp(
        lambda x: r.linear(x, jnp.ones((256, 128)), "attention_output"),
        jax.random.normal(jax.random.key(0), (8, 256), jnp.bfloat16),
    )
    scales = next(x for x in jax.tree.leaves(pull_back) if x.shape == (8, 2))
    np.testing.assert_array_equal(np.frexp(np.asarray(scales))[0], 0.5)


def test_released_weights_are_multiplied_as_they_are():
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(6, 160), (160, 192)]))
    q, r = quantize_block(w.T).mT, get_precision("fp8_deepseek")
    assert isinstance(q, QTensor)
    y = r.linear(x.astype(jnp.bfloat16), q)
    np.testing.assert_allclose(
        y.astype(jnp.float32), r.linear(x.astype(jnp.bfloat16), w).astype(jnp.float32), atol=0.05
    )
    assert jnp.linalg.norm(y - x @ dequantize(q)) < 0.04 * jnp.linalg.norm(y)


def test_a_file_changes_single_choices():
    changed = get_precision(
        {
            "name": "fp8_deepseek",
            "quantization": {"gradient": {"dtype": "float8_e5m2"}, "accumulation": {"promote_every": None}},
        }
    )
    assert changed.quantization.gradient.dtype == "float8_e5m2" and changed.quantization.gradient.scope == "tile"
    assert changed.quantization.gradient.min_amax == get_precision("fp8_deepseek").quantization.gradient.min_amax
    assert (
        changed.quantization.accumulation.promote_every is None
        and changed.attention_output == get_precision("fp8_deepseek").attention_output
    )
    assert (
        get_precision(
            {"name": "fp8_deepseek", "quantization": {"residual": {"dtype": "e5m6"}}}
        ).quantization.residual.dtype
        == "e5m6"
    )
    assert hash(changed) != hash(get_precision("fp8_deepseek")) and isinstance(changed, FP8Precision)
    assert get_precision({"name": "fp8_deepseek"}) == get_precision("fp8_deepseek")
    assert dataclasses.replace(changed, quantization=get_precision("fp8_deepseek").quantization) == get_precision(
        "fp8_deepseek"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fp8", "config.precision='fp8': allowed: bfloat16, float32, fp8_deepseek, or your own as package.module"),
        ({"name": "fp8_deepseek", "quantisation": {}}, "config.precision.quantisation: did you mean 'quantization'"),
        (
            {"name": "fp8_deepseek", "quantization": {"gradient": {"scop": "tile"}}},
            "config.precision.quantization.gradient.scop: did you mean 'scope'",
        ),
        (
            {"name": "fp8_deepseek", "quantization": {"gradient": {"scope": "row"}}},
            "config.precision.quantization.gradient: scope='row': one of tile, block, tensor",
        ),
        (
            {"name": "fp8_deepseek", "quantization": {"products": ["backward"]}},
            "'backward' is none of forward, input_gradient, weight_gradient",
        ),
        (
            {"name": "fp8_deepseek", "high_precision": ["head"]},
            "'head' is none of linear, attention_output, experts, mtp_projection",
        ),
        ({"name": "bfloat16", "compute_dtype": "float16"}, "unknown field config.precision.compute_dtype"),
    ],
)
def test_what_a_recipe_cannot_be(spec, message):
    with pytest.raises(ConfigError, match=message):
        get_precision(spec)
