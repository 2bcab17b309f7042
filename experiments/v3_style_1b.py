"""A network of V3's design with one billion parameters, for one GPU: compressed queries, groups of experts, bias
balancing and MTP, in FP8.

    python -m deepseek_jax --config=experiments/v3_style_1b.py

980,922,592 parameters and 123,677,984 of MTP. It has never been run. Compiled for one H200
(python -m deepseek_jax.dry_run --topology=h200:1), a step of 131,072 tokens: 28 GiB, at least 0.42 s of products and
0.39 s of memory traffic; in bfloat16 23 GiB, 0.56 s and 0.35 s.
"""

from ml_collections import ConfigDict

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig


def get_config() -> ConfigDict:
    attention = MLAConfig(
        num_heads=16, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    moe = MoEConfig(
        num_experts=32,
        top_k=4,
        intermediate_size=512,
        num_shared_experts=1,
        num_groups=4,
        topk_groups=2,
        routed_scaling_factor=2.5,
    )
    model = ModelConfig(
        vocab_size=32_768,
        hidden_size=2048,
        num_layers=8,
        intermediate_size=4608,
        first_k_dense=1,
        mtp_depth=1,
        attention=attention,
        moe=moe,
    )
    return ConfigDict(
        {
            "seed": 0,
            "model": model.to_dict(),
            "runtime": {"remat": "full", "attention_chunk": 512},
            "precision": "fp8_deepseek",
            "tokenizer": "byte",
            "mesh": {},
            "stages": ("pretrain",),
            "pretrain": {
                "kind": "pretrain",
                "seq_len": 4096,
                "batch_size": 32,
                "data": {"sources": [{"name": "stdlib"}]},
                "train": {
                    "steps": 2000,
                    "microbatch": 8,
                    "optimizer": {
                        "learning_rate": {
                            "kind": "step_decay",
                            "peak": 4e-4,
                            "warmup_steps": 100,
                            "at": (0.8, 0.9),
                            "factor": 0.316,
                        },
                        "b1": 0.9,
                        "b2": 0.95,
                        "weight_decay": 0.1,
                        "moment_dtype": "bfloat16",
                    },
                    "objective": {
                        "mtp_weight": 0.3,
                        "balance": "sequence",
                        "balance_alpha": 1e-4,
                        "loss_chunk": 32_768,
                    },
                    "bias_update_speed": 0.001,
                    "eval_every": 0,
                    "checkpoint_every": 500,
                },
            },
        }
    )
