"""Parameters of the published models to the last digit, and of odd small ones against formulas written by hand."""

import pytest

from deepseek_jax.accounting import count_parameters
from deepseek_jax.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.presets import PRESETS, preset

# name: attention of one layer, one expert, total, activated with embedding and head, with head, with neither
PUBLISHED = {
    "v3_671b": (187_107_328, 44_040_192, 671_026_419_200, 37_552_297_472, 36_625_618_432, 35_698_939_392),
    "v2_236b": (149_227_520, 23_592_960, 235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320),
    "v2_lite_16b": (13_763_072, 8_650_752, 15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808),
    "deepseek_moe_16b": (16_777_216, 8_650_752, 16_375_728_128, 2_828_650_496, 2_618_935_296, 2_409_220_096),
    "moonlight_16b": (13_763_072, 8_650_752, 15_960_110_208, 2_914_776_192, 2_579_231_872, 2_243_687_552),
    "kimi_k2_1t": (101_124_096, 44_040_192, 1_026_408_232_448, 32_861_500_928, 31_687_095_808, 30_512_690_688),
}


def test_every_preset_has_published_counts():
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_counts(name):
    config = preset(name)
    attention, expert, total, with_both, with_head, with_neither = PUBLISHED[name]
    counts = count_parameters(config)
    assert counts.main["attention"] == attention * config.num_layers
    assert counts.main["routed experts"] == expert * config.moe.num_experts * config.num_moe_layers
    assert counts.main["shared experts"] == expert * config.moe.num_shared_experts * config.num_moe_layers
    assert counts.total == total
    assert counts.activated(embedding=True, head=True) == with_both
    assert counts.activated() == with_head
    assert counts.activated(embedding=False, head=False) == with_neither


def test_mtp_module_of_v3():
    counts = count_parameters(preset("v3_671b"))
    embedding, head = counts.main["embedding"], counts.main["head"]
    assert counts.mtp_total == 11_610_068_224
    assert counts.mtp["MTP projection"] == 102_760_448
    # README_WEIGHTS: 11.5B unique and 2.4B activated with the shared embedding and head, both without the projection.
    assert round((counts.mtp_total - counts.mtp["MTP projection"]) / 1e9, 1) == 11.5
    assert round((counts.mtp_activated - counts.mtp["MTP projection"] + embedding + head) / 1e9, 1) == 2.4
    # The files on Hugging Face hold embedding and head twice: "685B", of which 684,489,845,504 are parameters.
    assert counts.total + counts.mtp_total + embedding + head == 684_489_845_504


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "v3_671b"])
def test_other_presets_have_no_mtp(name):
    assert count_parameters(preset(name)).mtp_total == 0


def test_moonlight_without_embeddings():
    counts = count_parameters(preset("moonlight_16b"))
    assert counts.total - counts.main["embedding"] - counts.main["head"] == 15_289_021_568


# Counts by hand, from the papers' formulas: an oracle that shares nothing with the network's code.


def closed_attention(config: ModelConfig) -> int:
    d, a = config.hidden_size, config.attention
    if not isinstance(a, MLAConfig):
        return 2 * d * a.num_heads * a.head_dim + 2 * d * a.num_kv_heads * a.head_dim
    h, q, kv, n, r, v = a.num_heads, a.q_lora_rank, a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim
    queries = d * h * (n + r) if q is None else d * q + q + q * h * (n + r)
    return queries + d * (kv + r) + kv + kv * h * (n + v) + h * v * d


def closed_expert(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.moe.intermediate_size


def closed_moe_layer(config: ModelConfig, routed: int) -> int:
    """Router, correction bias, shared experts and `routed` of the routed ones; attention and norms are counted
    elsewhere."""
    moe = config.moe
    router = moe.num_experts * (config.hidden_size + moe.correction_bias)
    return router + (moe.num_shared_experts + routed) * closed_expert(config)


def closed_body(config: ModelConfig, routed: int) -> int:
    """All layers and the final norm, without embedding and head."""
    d = config.hidden_size
    layers = (
        config.num_layers * (closed_attention(config) + 2 * d)
        + config.num_dense_layers * 3 * d * config.intermediate_size
    )
    return layers + (config.num_moe_layers * closed_moe_layer(config, routed) if config.moe else 0) + d


def closed_total(config: ModelConfig) -> int:
    matrices = 1 if config.tie_embeddings else 2
    return (
        closed_body(config, config.moe.num_experts if config.moe else 0)
        + matrices * config.vocab_size * config.hidden_size
    )


def closed_mtp_module(config: ModelConfig, routed: int) -> int:
    """A block, its projection, and the norms of embedding, hidden state and output."""
    d = config.hidden_size
    feed_forward = closed_moe_layer(config, routed) if config.moe else 3 * d * config.intermediate_size
    return closed_attention(config) + 2 * d + feed_forward + 2 * d * d + 3 * d


MLA = MLAConfig(num_heads=3, kv_lora_rank=5, qk_nope_head_dim=7, qk_rope_head_dim=4, v_head_dim=6, q_lora_rank=9)
MOE = MoEConfig(num_experts=6, top_k=2, intermediate_size=11, num_shared_experts=2)
ODD = ModelConfig(
    vocab_size=37,
    hidden_size=10,
    num_layers=4,
    intermediate_size=13,
    attention=MLA,
    moe=MOE,
    first_k_dense=1,
    mtp_depth=2,
)
ODD_CONFIGS = {
    "all": ODD,
    "tied": ODD.replace(tie_embeddings=True),
    "no q-LoRA": ODD.replace(attention=MLAConfig(3, 5, 7, 4, 6)),
    "GQA": ODD.replace(attention=GQAConfig(num_heads=6, num_kv_heads=2, head_dim=4)),
    "no bias, no shared experts": ODD.replace(
        moe=MoEConfig(num_experts=6, top_k=3, intermediate_size=11, correction_bias=False)
    ),
    "dense": ODD.replace(moe=None),
    "no dense layer": ODD.replace(first_k_dense=0, mtp_depth=0),
}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_odd_configs_against_closed_form(name):
    config = ODD_CONFIGS[name]
    counts = count_parameters(config)
    top_k = config.moe.top_k if config.moe else 0
    table = config.vocab_size * config.hidden_size
    assert counts.total == closed_total(config)
    assert counts.mtp_total == config.mtp_depth * closed_mtp_module(config, config.moe.num_experts if config.moe else 0)
    assert counts.mtp_activated == config.mtp_depth * closed_mtp_module(config, top_k)
    assert counts.activated(embedding=False, head=False) == closed_body(config, top_k)
    assert counts.activated() == closed_body(config, top_k) + table
    assert counts.activated(embedding=True, head=True) == closed_body(config, top_k) + table * (
        1 if config.tie_embeddings else 2
    )
    assert counts.head_product == table
