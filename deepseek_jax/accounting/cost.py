"""Cost: tokens, FLOPs and GPU-hours."""

import dataclasses

# V3 report, Table 1: H800 hours of the final run. Research and ablations before it are not in there.
V3_GPU_HOURS = {"pre-training": 2_664_000, "context extension": 119_000, "post-training": 5_000}
V3_TOKENS = 14.8e12
DOLLARS_PER_GPU_HOUR = 2.0  # the rental price V3 assumes for an H800
V3_SUSTAINED_TFLOPS = 385.0  # per H800, causal attention ("Insights into DeepSeek-V3", Table 4)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a stage: `tokens` that it trains on, padding included, or draws (RL), the useful `flops`,
    recomputation not counted, and the length of a sequence."""

    tokens: int
    flops: float
    seq_len: int


def gpu_hours(flops: float, sustained_tflops: float = V3_SUSTAINED_TFLOPS) -> float:
    """GPU-hours for `flops`, at `sustained_tflops` TFLOP/s of useful work per GPU."""
    return flops / (sustained_tflops * 1e12) / 3600


def dollars(hours: float, dollars_per_hour: float = DOLLARS_PER_GPU_HOUR) -> float:
    return hours * dollars_per_hour
