"""The table of equations: every link leads to a line marked as that equation, and every marker has a row."""

import equations
import pytest

TEXT = equations.TABLE.read_text(encoding="utf-8")
OTHERS = {
    "YaRN: range", "YaRN: ramp", "YaRN: frequencies", "YaRN: temperature",
    "GRPO: ratio", "GRPO: clip", "GRPO: mean", "GRPO: KL", "GRPO: advantage", "GRPO: loss",
    "FP8: Fprop", "FP8: Dgrad", "FP8: Wgrad", "FP8: tile", "FP8: block", "FP8: promotion",
}  # fmt: skip


def test_every_equation_has_a_row():
    assert {f"eq. {number}" for number in range(1, 26)} | OTHERS == set(equations.rows(TEXT))


def test_links_lead_to_the_marked_lines():
    assert equations.with_links(TEXT) == TEXT, "run python tests/model/equations.py"
    assert all(links.startswith("[") for _, links in equations.rows(TEXT).values())


def test_every_marker_of_the_code_is_in_the_table():
    assert set(equations.marked_lines()) == set(equations.rows(TEXT))


@pytest.mark.parametrize(
    "line, markers", [("x = 1  # eqs. 2, 4, 5", ["eq. 2", "eq. 4", "eq. 5"]), ("y  # eq. 12", ["eq. 12"])]
)
def test_a_line_may_be_several_equations(line, markers):
    assert equations._markers(equations.MARKER.search(line)[1]) == markers
