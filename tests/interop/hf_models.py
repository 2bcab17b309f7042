"""Tiny random DeepSeek models of transformers, for the parity tests and for the script that stores their outputs. Needs
torch."""

import numpy as np
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

# Sizes that differ from one another, so that a shape names its axes.
COMMON = dict(
    vocab_size=96, hidden_size=32, intermediate_size=40, moe_intermediate_size=12, num_attention_heads=4,
    num_key_value_heads=4, kv_lora_rank=14, qk_nope_head_dim=10, qk_rope_head_dim=16, v_head_dim=6, n_routed_experts=8,
    num_experts_per_tok=3, first_k_dense_replace=1, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
YARN = dict(type="yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1)
torch.set_num_threads(1)  # the models are far too small for more

CASES = {
    # DeepSeek-V3: every piece on.
    "v3": dict(
        num_hidden_layers=3, q_lora_rank=18, n_shared_experts=1, n_group=4, topk_group=2, norm_topk_prob=True,
        routed_scaling_factor=2.5, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    ),
    # Moonlight: no query latent, no YaRN, one group, another epsilon; and no shared expert, unnormalized gates.
    "v3_plain": dict(
        num_hidden_layers=2, q_lora_rank=None, n_shared_experts=0, n_group=1, topk_group=1, norm_topk_prob=False,
        routed_scaling_factor=2.446, rope_theta=50_000.0, rms_norm_eps=1e-3,
    ),
    # Rotary dimensions in halves and a stronger mscale than mscale_all_dim, which scales cos and sin.
    "v3_halves": dict(
        num_hidden_layers=2, q_lora_rank=18, n_shared_experts=2, n_group=2, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=1.0, rope_interleave=False, rope_scaling=YARN | dict(mscale=1.3, mscale_all_dim=0.6),
    ),
    # DeepSeek-V2.
    "v2": dict(
        num_hidden_layers=2, q_lora_rank=18, n_shared_experts=2, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", routed_scaling_factor=4.0,
        rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
    ),
    # DeepSeek-V2-Lite.
    "v2_lite": dict(num_hidden_layers=2, q_lora_rank=None, n_shared_experts=2, topk_method="greedy",
                    routed_scaling_factor=1.0),
}  # fmt: skip


def build(case: str, seed: int):
    """A float32 model whose every tensor matters: weights of the size of 1/sqrt(width), norms and router biases far
    from their initial 1 and 0."""
    version = (
        (DeepseekV3Config, DeepseekV3ForCausalLM)
        if case.startswith("v3")
        else (DeepseekV2Config, DeepseekV2ForCausalLM)
    )
    model = version[1](version[0](**COMMON, **CASES[case])).eval()
    rng = np.random.default_rng(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("inv_freq") or not tensor.numel():
            continue
        if name.endswith("e_score_correction_bias"):
            # One seed in three has negative biased scores too: groups must be masked with -inf, not 0.
            value = rng.normal(0.0 if seed % 3 == 2 else 3.0, 0.7, tensor.shape)
        elif tensor.ndim == 1:
            value = rng.normal(1.0, 0.3, tensor.shape)
        elif name.endswith("mlp.gate.weight"):
            value = rng.normal(0.0, 0.5, tensor.shape)
        else:
            value = rng.normal(0.0, 1.0 if "embed" in name else 1.4 * tensor.shape[-1] ** -0.5, tensor.shape)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(value))
    return model


def logits(model, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long()).logits.numpy()


def greedy(model, prompts_BP: np.ndarray, new_tokens: int) -> np.ndarray:
    """The next `new_tokens` tokens of every prompt through transformers' own cache."""
    tokens, cache, out = torch.from_numpy(prompts_BP).long(), None, []
    with torch.no_grad():
        for _ in range(new_tokens):
            result = model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = result.past_key_values, result.logits[:, -1:].argmax(-1)
            out.append(tokens.numpy())
    return np.concatenate(out, axis=1)
