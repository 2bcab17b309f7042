"""The report on one network: all its figures, as plain data and as a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from deepseek_jax.accounting import cost, flops, memory
from deepseek_jax.accounting.counts import COMPONENTS, count_parameters
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.rope import softmax_scale, yarn_correction_range, yarn_mscale
from deepseek_jax.training.optimizer import updated_by

DEFAULT_TOKENS = 1e12


@dataclasses.dataclass(frozen=True)
class CostAssumptions:
    """Assumptions of the cost figures.

    `seq_len` None is that of the experiment's first stage, 4096 without an experiment; `tokens` None is as many as its
    stages train on, 1T without one.
    """

    seq_len: int | None = None
    tokens: float | None = None
    sustained_tflops: float = cost.V3_SUSTAINED_TFLOPS
    dollars_per_hour: float = cost.DOLLARS_PER_GPU_HOUR


def network_report(
    config: ModelConfig, assumptions: CostAssumptions = CostAssumptions(), stages: Mapping[str, cost.Work] = {}
) -> dict[str, Any]:
    """Attention, parameters, FLOPs per token, memory in bytes, YaRN constants and training cost, with names for JSON.

    The cost is that of the experiment's `stages`. Given `assumptions.tokens`, or without stages, it is that of
    pre-training on that many tokens.
    """
    counts = count_parameters(config)
    length = assumptions.seq_len or next((work.seq_len for work in stages.values()), 4096)
    training = flops.training_flops_per_token(config, length)
    tokens = assumptions.tokens
    if stages and tokens is None:
        tokens, total = sum(work.tokens for work in stages.values()), sum(work.flops for work in stages.values())
    else:
        tokens, stages = DEFAULT_TOKENS if tokens is None else tokens, {}
        total = training * tokens
    hours = cost.gpu_hours(total, assumptions.sustained_tflops)
    return {
        "attention": dataclasses.asdict(config.attention),
        "parameters": {
            "main": dict(counts.main),
            "total": counts.total,
            "activated_with_embedding_and_head": counts.activated(embedding=True, head=True),
            "activated_with_head": counts.activated(),
            "activated_with_neither": counts.activated(embedding=False, head=False),
            "mtp": dict(counts.mtp),
            "mtp_total": counts.mtp_total,
            "mtp_activated": counts.mtp_activated,
        },
        "flops_per_token": {
            "seq_len": length,
            "training": training,
            "training_with_mtp": flops.training_flops_per_token(config, length, mtp=True),
            "forward": flops.forward_flops_per_token(config, length),
            "decoding": flops.decode_flops_per_token(config, length),
        },
        "memory_bytes": {
            "cache_elements_per_token": memory.cache_elements_per_token(config.num_layers, config.attention),
            "cache_per_token": memory.cache_bytes_per_token(config),
            "weights_bfloat16": 2 * (counts.total + counts.mtp_total),
            "training_state": memory.training_state_bytes(counts),
            "training_state_bfloat16_moments": memory.training_state_bytes(counts, "bfloat16"),
            "training_state_muon": memory.training_state_bytes(counts, single_moment=muon_parameters(config)),
        },
        "yarn": _yarn(config),
        "cost": {
            "stages": {name: dataclasses.asdict(work) for name, work in stages.items()},
            "tokens": tokens,
            "flops": total,
            "sustained_tflops": assumptions.sustained_tflops,
            "gpu_hours": hours,
            "dollars_per_hour": assumptions.dollars_per_hour,
            "dollars": cost.dollars(hours, assumptions.dollars_per_hour),
        },
    }


def muon_parameters(config: ModelConfig) -> int:
    """Parameters that Muon updates, the MTP modules' among them; AdamW updates the others."""
    return sum(updated_by("muon", config)["muon"].values())


def _yarn(config: ModelConfig) -> dict[str, Any] | None:
    yarn, attention = config.rope.yarn, config.attention
    if yarn is None or not attention.rotary_dim:
        return None
    return {
        "mscale": yarn_mscale(yarn.factor, yarn.mscale),
        "softmax_scale": softmax_scale(config.rope, attention.qk_head_dim),
        "correction_range": list(yarn_correction_range(yarn, attention.rotary_dim, config.rope.theta)),
    }


def network_table(name: str, figures: dict[str, Any]) -> Table:
    """A rich table of `network_report`'s figures."""
    view = Table(
        title=name, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", show_header=False
    )
    view.add_column(no_wrap=True)
    view.add_column(justify="right", no_wrap=True)
    view.add_column(justify="right", no_wrap=True)
    _parameter_rows(view, figures["parameters"], figures["attention"]["kind"])
    _flop_rows(view, figures["flops_per_token"])
    _memory_rows(view, figures["memory_bytes"])
    if figures["yarn"]:
        _section(view, "YaRN")
        view.add_row("  √t (mscale)", f"{figures['yarn']['mscale']:.6f}")
        view.add_row("  softmax scale", f"{figures['yarn']['softmax_scale']:.7f}")
        view.add_row("  correction range", "{}-{}".format(*figures["yarn"]["correction_range"]))
    _cost_rows(view, figures["cost"])
    return view


def _section(view: Table, title: str, note: str = "") -> None:
    view.add_section()
    view.add_row(f"[bold]{title}[/bold]", "", note)


def _parameter_rows(view: Table, parameters: dict[str, Any], attention_kind: str) -> None:
    total = parameters["total"]
    _section(view, "Parameters")
    for name in COMPONENTS:
        if name in parameters["main"]:
            share = parameters["main"][name] / total
            label = f"{name} ({attention_kind})" if name == "attention" else name
            view.add_row(f"  {label}", f"{parameters['main'][name]:,}", f"{share:.2%}")
    view.add_row("  total (main model)", f"[bold]{total:,}[/bold]", _billions(total))
    for label in ("with_embedding_and_head", "with_head", "with_neither"):
        n = parameters[f"activated_{label}"]
        view.add_row(f"  activated, {label.replace('_', ' ')}", f"{n:,}", _billions(n))
    if parameters["mtp_total"]:
        view.add_row("  MTP modules", f"{parameters['mtp_total']:,}", _billions(parameters["mtp_total"]))
        view.add_row(
            "  MTP modules, activated", f"{parameters['mtp_activated']:,}", _billions(parameters["mtp_activated"])
        )


def _flop_rows(view: Table, figures: dict[str, Any]) -> None:
    _section(view, "GFLOPs per token", f"{figures['seq_len']:,} tokens of context")
    view.add_row("  training", _giga(figures["training"]))
    if figures["training_with_mtp"] != figures["training"]:
        view.add_row("  training with MTP", _giga(figures["training_with_mtp"]))
    view.add_row("  forward", _giga(figures["forward"]))
    view.add_row("  decoding from the cache", _giga(figures["decoding"]))


def _memory_rows(view: Table, figures: dict[str, Any]) -> None:
    _section(view, "Memory")
    ours = figures["cache_per_token"]
    view.add_row("  KV elements per token", f"{figures['cache_elements_per_token']:,}")
    view.add_row("  KV bytes per token, bfloat16", f"{ours:,}")
    for name, (num_layers, attention) in memory.COMPARED_MODELS.items():
        theirs = 2 * memory.cache_elements_per_token(num_layers, attention)
        view.add_row(f"    {name}", f"{theirs:,}", f"{theirs / ours:.2f}x")
    view.add_row("  weights, bfloat16", _gigabytes(figures["weights_bfloat16"]))
    state, small = figures["training_state"], figures["training_state_bfloat16_moments"]
    view.add_row("  weights and gradients, float32", _gigabytes(state["weights"] + state["gradients"]))
    view.add_row("  AdamW moments, float32", _gigabytes(state["moments"]))
    view.add_row("  AdamW moments, bfloat16", _gigabytes(small["moments"]))
    view.add_row("  Muon moments, float32", _gigabytes(figures["training_state_muon"]["moments"]))


def _cost_rows(view: Table, bill: dict[str, Any]) -> None:
    _section(view, "Training, all stages" if bill["stages"] else f"Training on {quantity(bill['tokens'])} tokens")
    for name, work in bill["stages"].items():
        view.add_row(f"  {name}, FLOPs", f"{work['flops']:.3g}", f"{quantity(work['tokens'])} tokens")
    view.add_row("  FLOPs", f"{bill['flops']:.3g}", f"{quantity(bill['tokens'])} tokens")
    view.add_row(f"  H800-hours at {bill['sustained_tflops']:g} TFLOP/s", _rounded(bill["gpu_hours"]))
    view.add_row("  dollars", _rounded(bill["dollars"]), f"at ${bill['dollars_per_hour']:g} an hour")


def quantity(count: float) -> str:
    """A number of tokens in three digits: 14.8T, 819k."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def _rounded(number: float) -> str:
    """Rounds to a whole number from 100 on, to two digits below."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def _giga(n: int) -> str:
    return f"{n / 1e9:,.2f}" if n >= 1e9 else f"{n / 1e9:.3g}"


def _billions(n: int) -> str:
    return f"{n / 1e9:,.2f}B" if n >= 1e8 else f"{n / 1e6:,.2f}M"


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
