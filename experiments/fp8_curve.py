"""A small network of V3's shape in FP8 as V3 trains (V3 §3.3, Appendix B.1); the base of
experiments/sweeps/fp8_curve.py.

    python -m deepseek_jax --config=experiments/fp8_curve.py
    python -m deepseek_jax --config=experiments/fp8_curve.py --config.precision.name=bfloat16      the curve it is compared with

2,830,088 parameters, heads as wide as V3's. Hardware: one CPU core; 8 minutes in FP8, 3.5 in bfloat16. What is
measured: experiments/sweeps/fp8_curve.py.
"""

from ml_collections import ConfigDict

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig


def get_config() -> ConfigDict:
    model = ModelConfig(
        vocab_size=272,
        hidden_size=256,
        num_layers=2,
        intermediate_size=512,
        attention=MLAConfig(
            num_heads=2, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=256, num_shared_experts=1, routed_scaling_factor=2.5),
        first_k_dense=1,
        rope=RopeConfig(theta=10_000.0),
        mtp_depth=0,
        init_std=0.03,
    )
    return ConfigDict(
        {
            "model": model.to_dict(),
            "precision": {"name": "fp8_deepseek"},
            "tokenizer": "byte",
            "mesh": {},
            "seed": 0,
            "stages": ("pretrain",),
            "outliers": {"kind": "outliers", "channels": 4, "factor": 64.0},
            "pretrain": {
                "kind": "pretrain",
                "data": {"sources": ({"name": "stdlib"},)},
                "seq_len": 128,
                "batch_size": 32,
                "train": {
                    "steps": 240,
                    "microbatch": 0,
                    "optimizer": {
                        "learning_rate": {"kind": "cosine", "peak": 2e-4, "warmup_steps": 20},
                        "b1": 0.9,
                        "b2": 0.95,
                        "weight_decay": 0.1,
                        "clip_norm": 1.0,
                        "moment_dtype": "bfloat16",
                    },
                    "objective": {"mtp_weight": 0.0, "balance_alpha": 1e-4},
                    "bias_update_speed": 0.001,
                    "log_every": 1,
                    "eval_every": 0,
                    "eval_batches": 4,
                    "checkpoint_every": 0,
                },
            },
        }
    )
