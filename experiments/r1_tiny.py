"""From random weights to a reasoning model: R1's road at a size that two CPU cores walk in minutes.

    python -m deepseek_jax --config=experiments/r1_tiny.py
"""

from ml_collections import ConfigDict

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig


def get_config() -> ConfigDict:
    model = ModelConfig(
        vocab_size=272,
        hidden_size=64,
        num_layers=3,
        intermediate_size=192,
        first_k_dense=1,
        mtp_depth=1,
        init_std=0.02,
        scan_unroll=2,
        attention=MLAConfig(num_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16),
        moe=MoEConfig(
            num_experts=8, top_k=2, intermediate_size=64, num_shared_experts=1, num_groups=4, topk_groups=2, routed_scaling_factor=2.5
        ),
        rope=RopeConfig(theta=1000.0),
    )
    text = {"name": "stdlib", "weight": 0.35, "max_bytes": 4_000_000}
    task = {"name": "task", "weight": 0.65, "format": "tokens"}
    objective = {"mtp_weight": 0.3, "balance_alpha": 1e-4}
    evaluation = {
        "kind": "eval",
        "eval": {"problems": 512, "sampled_problems": 128, "samples": 16},
        "data": {"sources": [text]},
        "seq_len": 128,
        "batch_size": 32,
        "eval_batches": 8,
    }
    return ConfigDict(
        {
            "model": model.to_dict(),
            "precision": "float32",
            "tokenizer": "byte",
            "task": {"name": "parity", "bits": 20, "cot_probability": 0.1},
            "mesh": {},
            "seed": 0,
            "stages": ("pretrain", "sft", "before", "grpo", "after"),
            "pretrain": {
                "kind": "pretrain",
                "data": {"sources": [text, task], "packing": "whole", "long_documents": "cut"},
                "task_documents": {"count": 32_768, "cot_probability": 0.7},
                "seq_len": 128,
                "batch_size": 48,
                "train": {
                    "steps": 280,
                    "optimizer": {"learning_rate": {"kind": "deepseek_v3", "peak": 3e-3, "warmup_steps": 40}},
                    "objective": objective,
                    "router_bias_rate": 0.01,
                    "checkpoint_every": 140,
                    "eval_batches": 8,
                },
            },
            "sft": {
                "kind": "sft",
                "data": {"sources": [task], "packing": "whole"},
                "task_documents": {"count": 8192, "cot_probability": 0.1},
                "seq_len": 128,
                "batch_size": 48,
                "train": {
                    "steps": 60,
                    "optimizer": {"learning_rate": {"kind": "cosine", "peak": 1e-3, "warmup_steps": 10}},
                    "objective": objective,
                    "router_bias_rate": 0.01,
                },
            },
            "before": evaluation,
            "grpo": {
                "kind": "grpo",
                "grpo": {
                    "group_size": 16,
                    "prompts_per_rollout": 16,
                    "num_minibatches": 2,
                    "steps": 60,
                    "learning_rate": 3e-4,
                    "warmup_steps": 5,
                    "clip_epsilon": (0.2, 0.28),
                    "kl_coefficient": 0.001,
                    "reference_refresh_every": 0,
                    "aggregation": "token_mean",
                    "rewards": {"accuracy": 1.0, "format": 1.0},
                },
                "loop": {"log_every": 1, "eval_every": 5, "checkpoint_every": 10},
            },
            "after": evaluation,
        }
    )
