"""A language model of real text, without a download: V3's layer at laptop size reads Python's standard library.

    python -m deepseek_jax --config=experiments/pretrain_stdlib.py

Hardware: two CPU cores.
"""

from ml_collections import ConfigDict

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig


def get_config() -> ConfigDict:
    model = ModelConfig(
        vocab_size=272,
        hidden_size=128,
        num_layers=4,
        intermediate_size=384,
        first_k_dense=1,
        mtp_depth=1,
        init_std=0.02,
        attention=MLAConfig(
            num_heads=4, q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=MoEConfig(
            num_experts=16,
            top_k=4,
            intermediate_size=64,
            num_shared_experts=1,
            num_groups=4,
            topk_groups=2,
            routed_scaling_factor=2.5,
        ),
        rope=RopeConfig(theta=10_000.0),
    )
    return ConfigDict(
        {
            "model": model.to_dict(),
            "runtime": {"scan_unroll": 3},
            "precision": "float32",
            "tokenizer": "byte",
            "mesh": {},
            "seed": 0,
            "stages": ("pretrain",),
            "pretrain": {
                "kind": "pretrain",
                "data": {"sources": [{"name": "stdlib"}]},
                "seq_len": 256,
                "batch_size": 32,
                "train": {
                    "steps": 500,
                    "optimizer": {"learning_rate": {"kind": "deepseek_v3", "peak": 3e-3, "warmup_steps": 50}},
                    "objective": {"mtp_weight": {"kind": "deepseek_v3_mtp_weight"}, "balance_alpha": 1e-4},
                    "bias_update_speed": {"kind": "deepseek_v3_bias_speed"},
                    "eval_every": 100,
                    "eval_batches": 8,
                    "checkpoint_every": 100,
                },
            },
        }
    )
