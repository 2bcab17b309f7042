"""Shared by the benchmarks: the network, its twin in transformers, fair timing, and the table."""

import argparse
import dataclasses
import json
import os
import platform
import runpy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig

R1_TINY = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "r1_tiny.py"))["get_config"]()


def _wide(hidden_size: int, num_layers: int, vocab_size: int, num_heads: int, num_experts: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=3 * hidden_size,
        attention=MLAConfig(
            num_heads=num_heads,
            q_lora_rank=hidden_size // 2,
            kv_lora_rank=hidden_size // 4,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
        ),
        moe=MoEConfig(
            num_experts=num_experts,
            top_k=4,
            intermediate_size=hidden_size // 2,
            num_shared_experts=1,
            num_groups=4,
            topk_groups=2,
            routed_scaling_factor=2.5,
        ),
        first_k_dense=1,
        init_std=0.02,
    )


# Every piece of V3 except MTP, which transformers does not train. "r1_tiny" is the main job's network.
SIZES = {
    "r1_tiny": ModelConfig.from_dict(R1_TINY.model.to_dict()).replace(mtp_depth=0),
    "small": _wide(hidden_size=128, num_layers=4, vocab_size=272, num_heads=4, num_experts=16),
    "medium": _wide(hidden_size=256, num_layers=6, vocab_size=4096, num_heads=8, num_experts=32),
}


def our_ops(config: ModelConfig) -> Ops:
    """All layers in one step of the scan, which is fastest at these sizes."""
    return Ops(runtime=RuntimeConfig(scan_unroll=config.num_layers))


# the ways transformers has; the fastest is what we compare with
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def flags(doc: str, experts: str, **defaults: int) -> argparse.Namespace:
    """Command line: the benchmark's own sizes, then what all have. Pins the process to `--cores` cores before jax and
    torch start."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="r1_tiny")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--experts", default=experts, help=f"transformers' ways, by comma, of {', '.join(EXPERTS_IMPLEMENTATIONS)}"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds; ours and theirs take turns")
    parser.add_argument("--breakdown", action="store_true", help="also print where our time goes")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="time on the processor, not the wall clock: with --cores=1, for a machine that is not quiet",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parsed = parser.parse_args()
    parsed.experts = parsed.experts.split(",")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = str(parsed.cores)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: parsed.cores])
    return parsed


def twin(config: ModelConfig, variables: dict[str, Any], experts_implementation: str = "grouped_mm"):
    """transformers' DeepseekV3ForCausalLM with the same float32 weights, through the exporter."""
    import torch
    import transformers

    from deepseek_jax.interop import export_folder

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    with tempfile.TemporaryDirectory() as folder:
        export_folder(config, variables, Path(folder) / "model", dtype="float32")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32, experts_implementation=experts_implementation
        )
    model.generation_config.eos_token_id = None  # every row makes every token
    model.generation_config.pad_token_id = 0
    return model


@dataclasses.dataclass
class Timing:
    first_s: float  # compilation included
    rounds_s: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.rounds_s)


def interleave(
    candidates: dict[str, Callable[[], Any]],
    flags: argparse.Namespace,
    check: Callable[[dict[str, list]], None],
    warm_up: int = 2,
) -> dict[str, Timing]:
    """Runs every candidate once (compile), `warm_up` times more, hands what they returned to `check`, and only then
    times `--repeats` rounds in turns, so that a busy moment hits all alike."""
    clock = time.process_time if flags.cpu_time else time.perf_counter
    timings, returned = {}, {}
    for name, run in candidates.items():
        start = clock()
        returned[name] = [run()]
        timings[name] = Timing(clock() - start, [])
        returned[name] += [run() for _ in range(warm_up)]
    check(returned)
    for _ in range(flags.repeats):
        for name, run in candidates.items():
            start = clock()
            run()
            timings[name].rounds_s.append(clock() - start)
    return timings


def describe(config: ModelConfig, flags: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions and the network, for the report."""
    from deepseek_jax.accounting import count_parameters

    counts = count_parameters(config)
    return {
        "machine": f"{platform.machine()}, {flags.cores} threads on {flags.cores} cores, "
        f"Python {platform.python_version()}",
        "clock": "processor" if flags.cpu_time else "wall",
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "torch", "transformers")},
        "parameters": counts.total,
        "activated": counts.activated(),
        "size": flags.size,
    }


def print_ratios(
    title: str, setting: dict[str, Any], timings: dict[str, Timing], tokens: int, ours: str, json_path: Path | None
) -> None:
    """Tokens/s of every candidate and how many times faster `ours` is; `tokens` is the work of one run."""
    mine = timings[ours].median_s
    fastest_peer = min((name for name in timings if not name.startswith(ours)), key=lambda name: timings[name].median_s)
    table = Table(title=title, title_justify="left")
    for column in ("", "tokens/s", "median", "min-max", "first call", "ours is faster by"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    figures = {}
    for name, timing in timings.items():
        ratio = timing.median_s / mine
        figures[name] = {
            "tokens_per_s": tokens / timing.median_s,
            "rounds_s": timing.rounds_s,
            "first_call_s": timing.first_s,
            "ours_faster_by": ratio,
        }
        spread = f"{1e3 * min(timing.rounds_s):.1f}-{1e3 * max(timing.rounds_s):.1f} ms"
        mark = " (fastest peer)" if name == fastest_peer else ""
        table.add_row(
            name + mark,
            f"{tokens / timing.median_s:,.0f}",
            f"{1e3 * timing.median_s:.1f} ms",
            spread,
            f"{timing.first_s:.2f} s",
            f"{ratio:.2f}x",
        )
    console = Console(width=150)
    console.print(table)
    console.print("; ".join(f"{key}: {value}" for key, value in setting.items()), markup=False)
    headline = timings[fastest_peer].median_s / mine
    console.print(f"[bold]{headline:.2f}x[/bold] the fastest of transformers' implementations ({fastest_peer})")
    if json_path:
        report = {"title": title, "setting": setting, "timings": figures, "ratio_to_fastest_peer": headline}
        json_path.write_text(json.dumps(report, indent=2))
