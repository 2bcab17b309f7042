"""A V3-style size ladder from a laptop to a pod: loss against compute.

    python -m deepseek_jax.launch --sweep=experiments/sweeps/v3_ladder.py --plan          every rung, nothing started
"""

from v3_style_tiny import tiny, v3_style

from deepseek_jax.launch import Resources, Rung, Sweep, ladder


def laptop(name: str, sizes: tuple[int, int, int, int], steps: int, learning_rate: float) -> Rung:
    return Rung(name, tiny(*sizes), seq_len=128, batch_size=16, steps=steps, learning_rate=learning_rate, warmup_steps=steps // 10)


def published(name: str, model, batch_size: int, steps: int, learning_rate: float, topology: str, mesh: dict[str, int], microbatch: int) -> Rung:
    """A recipe at its published size. C4 stands in for the corpus, and bytes for the tokenizer until `tokenizer` names a V3 folder."""
    overrides = {f"mesh.{axis}": size for axis, size in mesh.items()} | {
        "precision": "bfloat16",
        "pretrain.data.sources": ({"name": "tfds:c4/en"},),
        "pretrain.train.microbatch": microbatch,
        "pretrain.train.eval_every": 1000,
        "pretrain.train.checkpoint_every": 1000,
    }
    return Rung(name, model, 4096, batch_size, steps, learning_rate, 2000, Resources(topology), overrides)


RUNGS = (
    laptop("0.2m", (3, 24, 16, 2), 400, 1e-2),
    laptop("0.4m", (3, 32, 24, 2), 650, 1e-2),
    laptop("1m", (4, 48, 32, 3), 1650, 1e-2),
    # tokens and learning rate are the published rungs' trend: 64 tokens for each active parameter, N^-0.4
    published("0.3b", v3_style(8, 512, 320, 8, head_dim=64, kv_lora_rank=256, remat="full"), 64, 26_000, 1.7e-3, "v5e:2x2", {"fsdp": 4}, 16),
    # 3B: one node of 8 H100
    published("3b", v3_style(12, 1280, 896, 16, remat="full"), 320, 30_000, 8.6e-4, "v5e:4x4", {"fsdp": 2, "expert": 8}, 32),
    # 9B: four nodes of 8 H100
    published("9b", v3_style(18, 1920, 1280, 24, remat="full"), 512, 50_000, 5.9e-4, "v5p:4x4x4", {"fsdp": 8, "expert": 8}, 256),
    # 27B: 32 nodes of 8 H100
    published("27b", v3_style(30, 2560, 1536, 32, num_experts=72, remat="full"), 1280, 50_000, 4.0e-4, "v5p:8x8x8", {"fsdp": 32, "expert": 8, "tensor": 2}, 1280),
)


def get_sweep() -> Sweep:
    return Sweep("experiments/v3_style_tiny.py", ladder(RUNGS))
