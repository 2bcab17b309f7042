"""The recipe of the V3-style size ladder (mHC, appendix A.1) at its smallest size: the base of
experiments/sweeps/v3_ladder.py.

    python -m deepseek_jax --config=experiments/v3_style_tiny.py

Sigmoid routing over 64 experts, of which 6 and 2 shared ones see a token, balanced without a loss; AdamW (0.9, 0.95,
weight decay 0.1, both epsilons 1e-20); the learning rate falls by 0.316 after 80% and again after 90% of the steps. The
source is the Python standard library, read byte by byte.

188,396 parameters, 48,236 active. Hardware: two CPU cores; 164 s while other work took most of both. Measured (seed 0,
jax 0.10.2): 3.104 bits per byte, held out. The learning rate of 1e-2 is the best of experiments/sweeps/v3_lr_batch.py.
"""

from ml_collections import ConfigDict

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig


def v3_style(
    num_layers: int,
    hidden_size: int,
    expert_size: int,
    num_heads: int,
    *,
    num_experts: int = 64,
    head_dim: int = 128,
    kv_lora_rank: int = 512,
    vocab_size: int = 129_280,
    init_std: float = 0.006,
    **fields,
) -> ModelConfig:
    """The recipe's shape at any size. The dense first layer is nine experts wide, as in V3; queries are not compressed:
    with both, the published sizes come out. 2.446 is Moonlight's factor for six sigmoid gates of 64."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=9 * expert_size,
        first_k_dense=1,
        rms_norm_eps=1e-20,
        init_std=init_std,
        attention=MLAConfig(
            num_heads=num_heads,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=head_dim,
            qk_rope_head_dim=head_dim // 2,
            v_head_dim=head_dim,
        ),
        moe=MoEConfig(
            num_experts=num_experts,
            top_k=6,
            intermediate_size=expert_size,
            num_shared_experts=2,
            routed_scaling_factor=2.446,
        ),
        rope=RopeConfig(theta=10_000.0),
        **fields,
    )


def tiny(num_layers: int, hidden_size: int, expert_size: int, num_heads: int) -> ModelConfig:
    """The shape for a laptop: heads of 16, a latent half as wide as the model, bytes."""
    return v3_style(
        num_layers, hidden_size, expert_size, num_heads,
        head_dim=16, kv_lora_rank=hidden_size // 2, vocab_size=272, init_std=0.05,
    )  # fmt: skip


def get_config() -> ConfigDict:
    model = tiny(3, 24, 16, 2)
    return ConfigDict(
        {
            "model": model.to_dict(),
            "runtime": {"scan_unroll": 2},
            "precision": "float32",
            "tokenizer": "byte",
            "mesh": {},
            "seed": 0,
            "stages": ("pretrain",),
            "pretrain": {
                "kind": "pretrain",
                "data": {"sources": ({"name": "stdlib"},)},
                "seq_len": 128,
                "batch_size": 16,
                "train": {
                    "steps": 400,
                    "microbatch": 0,
                    "optimizer": {
                        "learning_rate": {
                            "kind": "step_decay",
                            "peak": 1e-2,
                            "warmup_steps": 40,
                            "at": (0.8, 0.9),
                            "factor": 0.316,
                        },
                        "b1": 0.9,
                        "b2": 0.95,
                        "eps": 1e-20,
                        "weight_decay": 0.1,
                    },
                    "objective": {"mtp_weight": 0.0, "balance_alpha": 1e-4},
                    "bias_update_speed": 0.001,
                    "eval_every": 0,
                    "eval_batches": 16,
                    "checkpoint_every": 0,
                },
            },
        }
    )
