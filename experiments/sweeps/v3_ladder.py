"""A V3-style size ladder from a laptop to a pod: loss against compute. The recipes of mHC, appendix A.1, and the same
shape below them.

    python -m deepseek_jax.launch --sweep=experiments/sweeps/v3_ladder.py --plan
    python -m deepseek_jax.launch --sweep=experiments/sweeps/v3_ladder.py
    python -m deepseek_jax.launch --sweep=experiments/sweeps/v3_ladder.py --launcher=skypilot --bucket=gs://NAME \\
        --only='0.3b,3b'

The first command prints hours, cost and memory of every rung and starts nothing. The second runs the three rungs for a
laptop, the third two rungs in a cloud.

    rung   parameters      active          tokens   sequences a step   peak      for
    0.2m   188,396         48,236          0.82M    16 × 128           1e-2      two CPU cores
    0.4m   359,824         83,856          1.33M    16 × 128           1e-2      two CPU cores
    1m     1,028,304       213,456         3.38M    16 × 128           1e-2      two CPU cores
    0.3b   372,648,896     106,900,416     6.8B     64 × 4096          1.7e-3    v5e:2x2
    3b     2,973,423,552   612,816,832     39.3B    320 × 4096         8.6e-4    v5e:4x4
    9b     9,179,192,768   1,661,394,368   105B     512 × 4096         5.9e-4    v5p:4x4x4
    27b    27,045,344,808  4,135,925,288   262B     1280 × 4096        4.0e-4    v5p:8x8x8

3b, 9b and 27b are the published rungs (2.97B, 9.18B and 27.0B; 612M, 1.66B and 4.14B active, which counts the head and
not the embedding). They read 64 tokens for each active parameter, the laptop's 16. The report leaves open the dense
layer's width, query compression and the gates' factor: see `v3_style`.

Measured before the balance loss was summed over layers, on two CPU cores (seed 0, one run at a time, most of both cores
taken by other work, jax 0.10.2), 20 minutes in all:

    rung                        0.2m      0.4m        1m
    training FLOPs           3.13e11   7.92e11   4.95e12
    held-out bits per byte     3.189     2.946     2.381
    seconds                      173       293       748
"""

from v3_style_tiny import tiny, v3_style

from deepseek_jax.launch import Resources, Rung, Sweep, ladder
from deepseek_jax.model.runtime import RuntimeConfig


def laptop(name: str, sizes: tuple[int, int, int, int], steps: int, learning_rate: float) -> Rung:
    return Rung(
        name,
        tiny(*sizes),
        seq_len=128,
        batch_size=16,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
        runtime=RuntimeConfig(scan_unroll=2),
    )


def published(
    name: str,
    model,
    batch_size: int,
    steps: int,
    learning_rate: float,
    topology: str,
    mesh: dict[str, int],
    microbatch: int,
) -> Rung:
    """A recipe at its published size. C4 stands in for the corpus, and bytes for the tokenizer until `tokenizer` names
    a V3 folder."""
    overrides = {f"mesh.{axis}": size for axis, size in mesh.items()} | {
        "precision": "bfloat16",
        "pretrain.data.sources": ({"name": "tfds:c4/en"},),
        "pretrain.train.microbatch": microbatch,
        "pretrain.train.eval_every": 1000,
        "pretrain.train.checkpoint_every": 1000,
    }
    return Rung(
        name,
        model,
        4096,
        batch_size,
        steps,
        learning_rate,
        2000,
        Resources(topology),
        RuntimeConfig(remat="full"),
        overrides,
    )


RUNGS = (
    laptop("0.2m", (3, 24, 16, 2), 400, 1e-2),
    laptop("0.4m", (3, 32, 24, 2), 650, 1e-2),
    laptop("1m", (4, 48, 32, 3), 1650, 1e-2),
    # tokens and learning rate are the published rungs' trend: 64 tokens for each active parameter, N^-0.4
    published(
        "0.3b", v3_style(8, 512, 320, 8, head_dim=64, kv_lora_rank=256), 64, 26_000, 1.7e-3, "v5e:2x2",
        {"fsdp": 4}, 16,
    ),
    # in place of its TPUs: one node of 8 H100, h100:8
    published(
        "3b", v3_style(12, 1280, 896, 16), 320, 30_000, 8.6e-4, "v5e:4x4",
        {"fsdp": 2, "expert": 8}, 32,
    ),
    # four nodes, h100:32
    published(
        "9b", v3_style(18, 1920, 1280, 24), 512, 50_000, 5.9e-4, "v5p:4x4x4",
        {"fsdp": 8, "expert": 8}, 256,
    ),
    # 32 nodes, h100:256
    published(
        "27b", v3_style(30, 2560, 1536, 32, num_experts=72), 1280, 50_000, 4.0e-4, "v5p:8x8x8",
        {"fsdp": 32, "expert": 8, "tensor": 2}, 1280,
    ),
)  # fmt: skip


def get_sweep() -> Sweep:
    return Sweep("experiments/v3_style_tiny.py", ladder(RUNGS))
