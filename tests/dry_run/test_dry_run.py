"""Dry runs of the real training step against golden figures, and what is wrong with wrong requests.

The default run compiles one layer for every TPU generation and for NVIDIA; the published networks take minutes each:
`pytest tests/dry_run -m big_dry_run`.
"""

import json

import pytest
from dry_run_cases import BIG, CASES, GOLDEN, ONE_LAYER, figures

from deepseek_jax import cli
from deepseek_jax.dry_run.compiled import memory_bytes, needed_bytes
from deepseek_jax.dry_run.dry_run import dry_run
from deepseek_jax.dry_run.table import dry_run_table
from deepseek_jax.errors import ConfigError
from deepseek_jax.experiment import read_flags


def chip(case: str) -> str:
    return CASES[case][0].partition(":")[0]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=[pytest.mark.aot(chip=chip(case)), *([pytest.mark.big_dry_run] if case in BIG else [])]
        )
        for case in CASES
    ],
)
def test_golden_figures(case):
    """Memory, FLOPs and traffic, one by one: a sharding that changed shows as a number. FLOPs are exact, what XLA
    decides may move by a few percent."""
    stored, now = json.loads((GOLDEN / f"{case}.json").read_text()), figures(case)
    for name in ("num_devices", "num_chips", "mesh", "tokens_per_step", "steps", "flops", "model_flops", "fits"):
        assert now[name] == stored[name], name
    for name in {"parameters", "optimizer", "cache"} & set(stored["memory_bytes_per_device"]):
        assert now["memory_bytes_per_device"][name] == stored["memory_bytes_per_device"][name], name
    assert now["memory_bytes_per_device"]["total"] == pytest.approx(
        stored["memory_bytes_per_device"]["total"], rel=0.05
    )
    assert now["collective_bytes"].keys() == stored["collective_bytes"].keys()
    for axes, kinds in stored["collective_bytes"].items():
        assert sum(now["collective_bytes"][axes].values()) == pytest.approx(sum(kinds.values()), rel=0.05), axes
    assert dry_run_table(now | {"compile_seconds": 1.0, "peak_host_bytes": 2**30}).row_count > 10


def test_decoding_computes_what_the_closed_formula_says():
    """Absorbed attention over the cache, one token a row: nothing is computed twice, on any device. (Hopper's experts
    multiply whole tiles of rows.)"""
    stored = json.loads((GOLDEN / "small_decode_v5p.json").read_text())
    assert sum(stored["flops"].values()) == pytest.approx(stored["model_flops"], rel=0.01)


@pytest.mark.parametrize(
    "case, microbatches, layers, tokens, width, id_bytes",
    [("small_v5p", 1, 1, 512, 512, 512), ("small_h100", 1, 1, 512, 512, 4), ("v3_v5p", 15, 58 + 1, 4096, 7168, 512)],
)
def test_every_expert_exchange_is_counted(case, microbatches, layers, tokens, width, id_bytes):
    """By hand, on one device: its tokens go to 8 experts each and come back, forward and again before the backward
    pass, and their gradients once in each direction, in bfloat16; each expert's number goes along with its token, 4
    bytes that a TPU pads to 512. All but its own part leaves it."""
    stored = json.loads((GOLDEN / f"{case}.json").read_text())
    rows, peers = 8 * tokens, stored["mesh"]["expert"]
    moved = 6 * rows * width * 2 + 2 * rows * id_bytes
    assert (
        stored["collective_bytes"]["expert"]["ragged-all-to-all"]
        == microbatches * layers * moved * (peers - 1) // peers
    )


def test_v3_on_a_pod():
    """Figures that were worked out apart from this program: 2.01e19 FLOPs without the recomputation of the routed
    experts, and with it 2 x 3 x 7168 x 2048 FLOPs more for each of 8 experts of 59 layers and every token."""
    stored = json.loads((GOLDEN / "v3_v5p.json").read_text())
    total, useful = sum(stored["flops"].values()), stored["model_flops"]
    assert total == pytest.approx(20.125e18 + 6 * 7168 * 2048 * 8 * 59 * stored["tokens_per_step"], rel=1e-3)
    assert total == pytest.approx(2.27e19, rel=5e-3) and useful / total == pytest.approx(0.72, abs=5e-3)
    assert stored["roofline"]["binding"] == "compute" and stored["step_seconds_lower_bound"] == pytest.approx(
        48.4, rel=5e-3
    )
    assert stored["tokens_per_second_upper_bound"] == pytest.approx(1.30e6, rel=5e-3)


def test_state_is_divided_among_all_devices():
    """Weights in float32, both moments in bfloat16: 8 bytes a parameter, over the devices of the mesh but for what does
    not divide."""
    stored = json.loads((GOLDEN / "small_h100.json").read_text())
    memory = stored["memory_bytes_per_device"]
    assert memory["optimizer"] == pytest.approx(memory["parameters"], rel=1e-5)


def test_v3s_bill_stands_beside_v3_alone():
    stored = {
        case: json.loads((GOLDEN / f"{case}.json").read_text()) for case in ("v3_h100", "v2_lite_v6e", "small_h100")
    }
    assert stored["v3_h100"]["v3_bill"] == {"h800_hours": 2_788_000, "dollars": 5_576_000.0}
    assert stored["v2_lite_v6e"]["v3_bill"] is stored["small_h100"]["v3_bill"] is None


@pytest.mark.parametrize(
    "changes, price",
    [
        ({}, "at $4.2 an hour and chip (Google Cloud on demand, 2026-11-28)"),
        (
            {
                "topology": "tpu7x:4x8x8",
                "dollars_per_chip_hour": None,
                "price_source": None,
                "dollars_lower_bound": None,
            },
            "no price known for tpu7x: pass --dollars_per_hour",
        ),
    ],
)
def test_the_table_says_whose_price_it_is(changes, price, capsys, monkeypatch):
    """Whole on a narrow terminal: every number that is not cut."""
    monkeypatch.setenv("COLUMNS", "60")
    stored = (
        json.loads((GOLDEN / "v3_v5p.json").read_text()) | {"compile_seconds": 1.0, "peak_host_bytes": 2**30} | changes
    )
    cli.show(dry_run_table(stored))
    printed = capsys.readouterr().out
    assert price in printed and "14.8T tokens" in printed and "…" not in printed
    assert (
        f"{stored['hours_lower_bound']:,.1f} hours" in printed
        and f"{stored['tokens_per_second_upper_bound']:,.0f}" in printed
    )
    if stored["dollars_lower_bound"] is not None:
        assert f"${stored['hours_lower_bound'] * stored['num_chips'] * 4.2:,.0f}" in printed


@pytest.mark.aot(chip="h100")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"program": "trian"}, "did you mean 'train'"),
        ({"program": "grpo"}, "no stage of kind grpo"),
        ({"stage": "sft"}, "pretrain"),
        ({"sequences": 8}, "--sequences is for --program=decode"),
        ({"program": "decode", "stage": "pretrain"}, "belongs to no stage"),
        ({"program": "decode", "sequences": 0}, "--sequences=0: must be at least 1"),
        ({"program": "decode", "sequences": 9}, "give a multiple"),
        ({"program": "decode", "context": 1}, "--context=1: must be at least 2"),
        ({"dollars_per_chip_hour": float("nan")}, "must be above 0"),
        ({"dollars_per_chip_hour": -1.0}, "must be above 0"),
    ],
)
def test_wrong_requests_are_refused_before_compiling(options, message):
    config, name, *_ = read_flags(ONE_LAYER)
    with pytest.raises(ConfigError, match=message):
        dry_run(config, name, "h100:8", **options)


@pytest.mark.parametrize(
    "message, size",
    [
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (1.50G) exceeds available HBM (15.25G).",
            3 * 2**29,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.00G of 31.25G hbm.", 40 * 2**30),
        ("something else", None),
    ],
)
def test_need_of_what_does_not_fit(message, size):
    assert needed_bytes(message) == size


def test_the_table_says_what_was_assumed(capsys):
    stored = json.loads((GOLDEN / "small_v5p.json").read_text()) | {"compile_seconds": 1.0, "peak_host_bytes": 2**30}
    cli.show(dry_run_table(stored | {"flops": {"bfloat16": 1, "float32": 2, "float8_e4m3fn": 3}}))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "rate" not in lines["bfloat16"]
    assert (
        all("counted at the bfloat16 rate of v5p" in lines[name] for name in ("float32", "float8_e4m3fn"))
        and "The" not in lines
    )
    cli.show(dry_run_table(stored | {"mesh_assumed": True}))
    assert "taken as config.mesh={'fsdp': -1}" in capsys.readouterr().out


def test_memory_adds_up():
    class Analysis:
        argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes = 100, 70, 60
        temp_size_in_bytes, generated_code_size_in_bytes = 30, 5

    assert memory_bytes(Analysis, {"parameters": 80}) == {
        "parameters": 80,
        "other arguments": 20,
        "outputs": 10,
        "temporaries": 30,
        "code": 5,
        "total": 145,
    }
