"""The studies find what the paper claims of accumulation and of tiles for gradients, and the notebook that shows them
is complete."""

import ast
import importlib
import json
import math
import pathlib

import numpy as np
import pytest

from kernels_pallas.studies.accumulation import ACCUMULATIONS, DEFINITIONS, accumulation_errors
from kernels_pallas.studies.gradient_tiles import OUTLIERS, imbalanced, loss, quantization_losses

NOTEBOOK = pathlib.Path(__file__).parents[2] / "notebooks" / "fp8.ipynb"


@pytest.mark.parametrize("accumulator", ["hopper_fp22", "fp22_register"])
@pytest.mark.parametrize(("distribution", "definition"), [("uniform(0, 1)", 0), ("uniform(0, 1)", 1), ("normal", 1)])
def test_promotion_cures_the_growth_of_the_error(accumulator, distribution, definition):
    """Errors are relative to the largest number: normal numbers near zero have any error relative to themselves."""
    narrow, promoted = (
        accumulation_errors(distribution, ACCUMULATIONS[f"{accumulator}, {how}"], depths=(256, 4096), size=16)[
            :, definition
        ]
        for how in ("never promoted", "promoted every 128")
    )
    assert narrow[1] > 4 * narrow[0]
    assert promoted[1] < 1.5 * promoted[0]
    assert narrow[1] > 5 * promoted[1]


def test_the_papers_two_per_cent_lies_between_the_emulations():
    exact_steps, aligned = (
        accumulation_errors("uniform(0, 1)", ACCUMULATIONS[f"{name}, never promoted"], depths=(4096,), size=16)[0, 0]
        for name in ("fp22_register", "hopper_fp22")
    )
    assert exact_steps < 0.02 < aligned


def test_float32_needs_no_promotion():
    errors = accumulation_errors("uniform(0, 1)", ACCUMULATIONS["float32"], depths=(256, 4096), size=16)
    assert errors.shape == (2, len(DEFINITIONS)) and np.all(errors < 1e-6)


def losses(kind, ratio=1e5):
    """(array, product) by tile and by block."""
    return [
        quantization_losses(OUTLIERS[kind], scope, ratio, tokens=128, channels=256, width=64)
        for scope in ("tile", "block")
    ]


def test_outlier_tokens_need_tiles():
    for by_tile, by_block in zip(*losses("gradients"), strict=True):
        assert by_tile.error_per_token < 0.05
        assert by_block.error_per_token > 5 * by_tile.error_per_token
        assert by_block.error < 1.2 * by_tile.error  # which is why the whole array's error does not show it
    (tile, _), (block, _) = losses("gradients")
    assert tile.underflow == 0 and block.underflow > 0.3
    (_, tile), (_, block) = losses("gradients", ratio=1e7)
    assert tile.underflow == 0 and block.underflow > 0.9  # the input gradient of all but the outliers is gone


def test_outlier_channels_need_them_less():
    for by_tile, by_block in zip(*losses("activations"), strict=True):
        assert by_block.error_per_token < 2 * by_tile.error_per_token < 0.1
        assert by_block.error < 2 * by_tile.error


def test_without_outliers_blocks_do_as_well():
    for kind in OUTLIERS:
        for by_tile, by_block in zip(*losses(kind, ratio=1.0), strict=True):
            assert by_block.error_per_token < 1.1 * by_tile.error_per_token and by_block.underflow < 1e-3


def test_outliers_lie_where_they_are_said_to():
    plain, tokens, channels = (
        imbalanced(np.random.default_rng(0), 64, 96, *how) for how in (("token", 1.0), ("token", 8.0), ("channel", 8.0))
    )
    np.testing.assert_array_equal(np.unique(np.nonzero(tokens != plain)[0]), [0, 32])
    np.testing.assert_array_equal(np.unique(np.nonzero(channels != plain)[1]), [0, 32, 64])
    np.testing.assert_array_equal(tokens[32], 8 * plain[32])


def test_losses_by_hand():
    got = loss(np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([[0.0, 4.0], [0.0, 0.0]]))
    assert (
        math.isclose(got.error, math.sqrt(10 / 26))
        and math.isclose(got.error_per_token, (3 / 5 + 1) / 2)
        and math.isclose(got.underflow, 2 / 3)
    )


def test_the_notebook_is_whole_and_was_run_from_top_to_bottom():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for statement in ast.parse("".join(cell["source"])).body:
            if isinstance(statement, ast.ImportFrom) and statement.module.startswith("kernels_pallas"):
                module = importlib.import_module(statement.module)
                assert all(hasattr(module, alias.name) for alias in statement.names), statement.module
        assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in cell["outputs"])
    figures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    drawn = sum("plt.subplots(" in "".join(cell["source"]) for cell in code)
    assert len(figures) == drawn > 0
