"""Curves, tables and folded completions."""

import io
import math
import subprocess
import sys

import matplotlib.image
import pytest
from rich.console import Console

from deepseek_jax import report
from deepseek_jax.errors import DataError
from deepseek_jax.report import (
    PANELS,
    TaggedText,
    _curves,
    comparison_table,
    optimizer_table,
    plot_curves,
    read_evaluation,
    samples_table,
)


def panels(records):
    return {
        label: {name: points for name, points, _ in _curves(records, curves)}
        for label, curves in PANELS.items()
        if _curves(records, curves)
    }


def test_whatever_rewards_there_are_are_drawn_and_what_is_no_number_is_not():
    records = [
        {"step": 0, "held_out_accuracy": 0.25, "held_out_pass@16": 0.5},
        {"step": 1, "reward_mean": 1.0, "reward_std": 9.0, "reward_my_rewards:brevity": 0.25, "length_mean": math.nan},
        {"step": 2, "reward_mean": None, "reward_my_rewards:brevity": 0.5, "length_mean": "x", "kl": 1.0},
        {"step": 3, "length_mean": True, "held_out_length": 1e300},
    ]
    assert panels(records) == {
        "reward": {"total": [(1, 1.0)], "my rewards:brevity": [(1, 0.25), (2, 0.5)]},
        "accuracy": {"held out, greedy": [(0, 0.25)], "held out, pass@16": [(0, 0.5)]},
    }
    pretraining = panels(
        [
            {"step": 5, "cross_entropy": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "max_violation_max": 0.5},
            {"step": 5, "held_out_loss": 2.1},
        ]
    )
    assert list(pretraining) == ["loss (nats per token)", "gradient norm", "learning rate", "MaxVio"]
    assert pretraining["loss (nats per token)"] == {"training": [(5, 2.0)], "held out": [(5, 2.1)]}


@pytest.mark.parametrize(
    "records", [[], [{"step": 1, "grad_norm": 0.0}], [{"step": 1, "grad_norm": 1e308, "cross_entropy": -1.0}] * 2]
)
def test_a_figure_is_drawn_whatever_there_is(tmp_path, records):
    plot_curves(records, tmp_path / "curves.png", "title")
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[1] > 400 and not list(tmp_path.glob("*.partial*"))


def test_lines_markers_and_axes(tmp_path, monkeypatch):
    """A curve of one point has a marker, or nothing would be seen; zero has no place on a logarithmic axis."""
    figures = []

    class Kept(report.Figure):
        def savefig(self, *arguments, **keywords):
            figures.append(self)
            super().savefig(*arguments, **keywords)

    monkeypatch.setattr(report, "Figure", Kept)
    plot_curves([{"step": 1, "grad_norm": 0.0, "cross_entropy": 1.0}], tmp_path / "one.png", "one")
    plot_curves([{"step": step, "grad_norm": 0.5, "held_out_loss": 1.0} for step in (1, 2)], tmp_path / "b.png", "two")
    lines = [[panel.get_lines()[0] for panel in figure.axes if panel.get_lines()] for figure in figures]
    assert [[line.get_marker() for line in panels] for panels in lines] == [["o", "o"], ["o", "None"]]
    assert [[panel.get_yscale() for panel in figure.axes] for figure in figures] == [2 * ["linear"], ["linear", "log"]]


def test_a_place_without_a_panel_stays_empty(tmp_path):
    """Five panels are drawn as three and two."""
    record = {
        "cross_entropy": 1.0,
        "grad_norm": 1.0,
        "learning_rate": 1.0,
        "max_violation_mean": 1.0,
        "reward_mean": 1.0,
    }
    plot_curves([{"step": step} | record for step in (1, 2)], tmp_path / "a.png", "five")
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    height, width = pixels.shape[:2]
    places = [
        pixels[height * row // 2 + 40 : height * (row + 1) // 2, width * column // 3 : width * (column + 1) // 3]
        for row in (0, 1)
        for column in (0, 1, 2)
    ]
    assert [bool((place == 1).all()) for place in places] == [False] * 5 + [True]


def test_importing_changes_no_backend():
    code = (
        "import matplotlib; matplotlib.use('pdf'); import deepseek_jax.report as r; "
        "assert matplotlib.get_backend() == 'pdf'; assert 'matplotlib.pyplot' not in __import__('sys').modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


LONG = "<think>" + "0110" * 30 + "</think><answer>1</answer> and some words"


@pytest.mark.parametrize("width", [12, 20, 37, 80])
def test_text_is_folded_at_spaces_and_never_inside_a_tag(width):
    lines = TaggedText(LONG).fold(width)
    assert all(len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == LONG.replace(" ", "")
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert any(tag in line for line in lines)
    assert TaggedText("one two three").fold(8) == ["one two", "three"]
    assert TaggedText("one two three").fold(7) == ["one two", "three"]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_tables_break_no_tag_and_cut_no_number(width, stages):
    sample = {"prompt": "01101" * 4, "completion": LONG, "right": True}
    evaluations = {
        f"stage_{i}": {"greedy_accuracy": 0.12345, "count": 12, "nan": None, "samples": [sample] * 3}
        for i in range(stages)
    }
    console = Console(width=width, file=io.StringIO())
    console.print(comparison_table(evaluations, "title [x]"))
    console.print(samples_table(evaluations, 2))
    shown = console.file.getvalue()
    assert all(len(line) <= width for line in shown.splitlines()) and "title [x]" in shown
    assert (
        shown.count("0.123") == stages
        and shown.count("</answer>") == shown.count("</think>") == 2 * stages
        and shown.count("right") == 2 * stages
    )


def test_a_problem_is_shown_once_and_its_answers_are_right_or_wrong():
    def row(prompt, right):
        return {"prompt": prompt, "completion": "c", "right": right}

    evaluations = {
        "before": {"samples": [row("first", False), row("second", True)]},
        "after": {"samples": [row("first", True), row("third", False)]},
    }
    console = Console(width=100, file=io.StringIO())
    console.print(samples_table(evaluations, 2))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    shown = [[word for word in line if word.isalpha()] for line in lines if "c" in line]
    assert shown == [
        ["first", "before", "c", "wrong"],
        ["after", "c", "right"],
        ["second", "before", "c", "right"],
        ["third", "after", "c", "wrong"],
    ]


def test_the_plan_says_which_rule_updates_which_parameters():
    """A tensor of several stacks once, norms together."""
    muon = {"moe_layers/attn/kv_a/kernel": 600, "mtp_0/block/attn/kv_a/kernel": 200, "moe_layers/ffn/experts/up": 800}
    rules = {"muon": muon | {"mtp_0/proj/kernel": 400}, "adamw": {"embed/embedding": 30, "final_norm/scale": 4}}

    def lines(rules):
        console = Console(width=100, file=io.StringIO())
        console.print(optimizer_table(rules))
        return [line.split() for line in console.file.getvalue().splitlines() if "," in line]

    assert lines(rules) == [
        ["muon", "2,000", "attn/kv_a,", "ffn/experts/up,", "proj"],
        ["adamw", "34", "embed,", "norms"],
    ]
    assert lines({"adamw": muon}) == [["adamw", "1,600", "all"]]


def test_a_damaged_evaluation_is_refused(tmp_path):
    path = tmp_path / "after" / "evaluation.json"
    path.parent.mkdir()
    for text in ('{"samples": 3}', '{"samples": [{"prompt": "a"}]}', "[]", "{"):
        path.write_text(text)
        with pytest.raises(
            DataError, match="evaluation.json is damaged .*remove it and start again: after is then evaluated anew"
        ):
            read_evaluation(path)
    path.write_text('{"greedy_accuracy": NaN}')
    assert read_evaluation(path) == {"greedy_accuracy": None}
