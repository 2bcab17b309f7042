"""The table of a dry run's figures."""

from typing import Any

from rich import box
from rich.table import Table

from deepseek_jax.accounting.chips import CHIPS, Chip
from deepseek_jax.accounting.report import quantity
from deepseek_jax.dry_run.roofline import unit

GIB = 2**30


def dry_run_table(figures: dict[str, Any]) -> Table:
    """A rich table of `dry_run`'s figures."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in figures["mesh"].items()) or "one device"
    title = f"{figures['experiment']}, {figures['program']}, on {figures['topology']}"
    title += f" ({figures['num_chips']:,} chips, {mesh})"
    view = Table(
        title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", show_header=False
    )
    view.add_column(no_wrap=True)
    view.add_column(justify="right", no_wrap=True)
    view.add_column(no_wrap=True)
    if figures["mesh_assumed"]:
        view.add_row("The experiment names no mesh", "", "taken as config.mesh={'fsdp': -1}")
    _memory_rows(view, figures)
    _flop_rows(view, figures)
    if figures["roofline"]:
        _traffic_rows(view, figures)
        _bound_rows(view, figures)
    view.add_section()
    view.add_row(
        "Compiled in", f"{figures['compile_seconds']:,.0f} s", f"host memory {figures['peak_host_bytes'] / GIB:.1f} GiB"
    )
    for loop in figures["assumed_loops"]:
        view.add_row("  loop without a known end", f"{figures['assumptions']['while_trips']:,} times", loop[-60:])
    return view


def _section(view: Table, title: str, note: str = "") -> None:
    view.add_section()
    view.add_row(f"[bold]{title}[/bold]", "", note)


def _memory_rows(view: Table, figures: dict[str, Any]) -> None:
    _section(view, "Memory per device, GiB")
    memory, capacity = figures["memory_bytes_per_device"], figures["hbm_capacity"]
    for name, size in memory.items():
        if size is not None and name != "total":
            view.add_row(f"  {name}", f"{size / GIB:,.2f}")
    total = memory["total"]
    if figures["fits"]:
        note = f"of {capacity / GIB:,.2f}: fits, {(capacity - total) / GIB:,.2f} to spare"
    else:
        note = f"of {capacity / GIB:,.2f}: does not fit" + (
            "" if total is None else f", {(total - capacity) / GIB:,.2f} too much"
        )
    view.add_row("  total", "at least the capacity" if total is None else f"[bold]{total / GIB:,.2f}[/bold]", note)


def _flop_rows(view: Table, figures: dict[str, Any]) -> None:
    _section(view, "FLOPs per step, the whole mesh")
    total = sum(figures["flops"].values())
    for number_format, count in figures["flops"].items():
        view.add_row(
            f"  {number_format}", f"{count:.4g}", _rate(number_format, CHIPS[figures["topology"].partition(":")[0]])
        )
    useful = figures["model_flops"]
    view.add_row(
        "  useful, by the closed formula", f"{useful:.4g}", f"{useful / total:.1%} of what is computed" if total else ""
    )


def _rate(number_format: str, chip: Chip) -> str:
    """The rate at which products run for which the matrix unit lacks a mode."""
    format_of_unit = unit(number_format)
    missing = getattr(chip, format_of_unit) is None or (format_of_unit == "bf16" and number_format != "bfloat16")
    return f"counted at the bfloat16 rate of {chip.name}" if missing else ""


def _traffic_rows(view: Table, figures: dict[str, Any]) -> None:
    _section(view, "Bytes per step and device, GiB", "collectives: on the wire, one way")
    view.add_row("  main memory", f"{figures['hbm_bytes'] / GIB:,.2f}")
    for axes, kinds in figures["collective_bytes"].items():
        for kind, size in kinds.items():
            if size >= GIB / 100:
                view.add_row(f"  {kind}", f"{size / GIB:,.2f}", f"along {axes}")


def _bound_rows(view: Table, figures: dict[str, Any]) -> None:
    bound = figures["roofline"]
    _section(view, "Roofline, seconds per step")
    for term in ("compute", "hbm", "links", "host_network"):
        note = "binds" if bound["binding"] == term else ""
        view.add_row(f"  {term.replace('_', ' ')}", f"{bound[f'{term}_seconds']:,.3g}", note)
    view.add_row("  one after another", f"{bound['seconds_without_overlap']:,.3g}")
    _section(view, "At most")
    view.add_row("  model FLOPs utilization", f"{figures['mfu_upper_bound']:.1%}", "of the bfloat16 peak")
    view.add_row(
        "  tokens per second",
        f"{figures['tokens_per_second_upper_bound']:,.0f}",
        f"{figures['tokens_per_step']:,} a step",
    )
    _price_rows(view, figures)


def _price_rows(view: Table, figures: dict[str, Any]) -> None:
    price, chip = figures["dollars_per_chip_hour"], figures["topology"].partition(":")[0]
    if price is None:
        _section(view, "At least", f"no price known for {chip}: pass --dollars_per_hour")
    else:
        _section(view, "At least", f"at ${price:g} an hour and chip ({figures['price_source']})")
    if figures["hours_lower_bound"] is not None:
        tokens = quantity(figures["steps"] * figures["tokens_per_step"])
        _time_row(view, f"  {figures['steps']:,.0f} steps, {tokens} tokens", figures)
    if (bill := figures["v3_bill"]) is not None:
        view.add_row("  V3's own bill", f"{bill['h800_hours']:,} H800-hours", f"${bill['dollars']:,.0f}")


def _time_row(view: Table, label: str, figures: dict[str, Any]) -> None:
    dollars = figures["dollars_lower_bound"]
    view.add_row(label, f"{figures['hours_lower_bound']:,.1f} hours", "" if dollars is None else f"${dollars:,.0f}")
