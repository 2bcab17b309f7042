"""The benchmark's tables, and the tuner, whose choice the products take up."""

import json

import jax.numpy as jnp
import pytest
from hopper import compiles

from kernels_pallas import QTensor
from kernels_pallas.bench import __main__ as bench
from kernels_pallas.bench import machine_code, measure, tune
from kernels_pallas.bench.shapes import LINEARS, Shape, deepgemm, shapes
from kernels_pallas.matmul import tuning_sm90
from kernels_pallas.matmul.tuning_sm90 import Config


def test_shapes_are_those_of_v3():
    assert LINEARS["q_a and kv_a"] == (1536 + 512 + 64, 7168) and LINEARS["q_b"] == (128 * 192, 1536) and LINEARS["o"] == (7168, 128 * 128)
    all_shapes = shapes()
    assert len(all_shapes) == len(set(all_shapes)) == 4 * 7 + 7 + 4 + 4
    assert deepgemm(Shape("dense", "o", 4096, 7168, 16384)) == 1358 and deepgemm(Shape("dense", "o", 1, 7168, 16384)) is None
    one = Shape("grouped", "down", 8, 4, 2, groups=3)
    assert one.flops == 3 * 2 * 8 * 4 * 2 and one.bytes == 3 * ((8 + 4) * 2 + 8 * 4 * 2)


def test_it_runs_where_there_is_no_gpu(tmp_path):
    """On small shapes; what it prints are ratios to what was measured beside it."""
    rows = bench.main(["--small", "--only=weight gradient, down", f"--json={tmp_path / 'rows.json'}"])
    assert rows == json.loads((tmp_path / "rows.json").read_text())
    products = [row for row in rows if "product" in row]
    assert [row["product"] for row in products] == ["weight gradient, down", *2 * ["grouped weight gradient, down"]]
    assert all(row["× bfloat16"] > 0 and row["of ceiling"] > 0 for row in products)
    others = {row["operation"] for row in rows if "operation" in row}
    assert {"quantize_tile", "requantize_transposed", "swiglu_quantize", "attention, forward"} < others and len(others) == 7
    assert {row["verdict"] for row in rows} == {"right"}


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("fp8_grouped_weight_gradient", "grouped weight gradient, down"),
        ("quantize_transposed", "quantize_transposed"),
        ("attention", "attention, forward"),
    ],
)
def test_wrong_results_are_reported(name, wrong, monkeypatch, capsys):
    """Every row is printed all the same."""
    right = getattr(measure, name)

    def planted(*arguments, **options):
        result = right(*arguments, **options)
        if name == "fp8_grouped_weight_gradient":
            return jnp.roll(result, 1, axis=-1)
        if name == "quantize_transposed":  # a scale off by one tile
            return QTensor(result.values, jnp.roll(result.scales, options["implementation"] is None, axis=1), result.tile)
        return result if options["implementation"] == "xla" else 1.1 * result

    monkeypatch.setattr(measure, name, planted)
    with pytest.raises(SystemExit, match=f"wrong, by calc_diff: .*{wrong}"):
        bench.main(["--small", "--only=grouped weight gradient, down"])
    assert "swiglu_quantize" in capsys.readouterr().out


def test_calc_diff_of_nan_is_wrong():
    assert measure.verdict(float(measure.calc_diff(jnp.ones(3), jnp.array([1, jnp.nan, 1]))), 1.0) == "WRONG"


@compiles
def test_machine_code():
    (row,) = bench.main(["--aot", "--only=dense, down"])[-1:]
    assert row["shape"] == "4096 × 7168 × 2048" and row["spilled bytes"] == 0 and row["matrix instructions"] % 4 == 0 < row["matrix instructions"]
    assert row["blocks per core"] >= 1
    others = list(machine_code.bfloat16_rows("H200"))
    assert len(others) == 6 and all(row["spilled bytes"] == 0 < row["matrix instructions"] for row in others)


def test_the_fastest_configuration_is_taken_up(tmp_path, monkeypatch):
    wanted = Config(64, "n", minor=1, width=16).fitting(jnp.bfloat16)
    shape = Shape("dense", "down", 64, 256, 128)
    operation, config, best = tune.fastest(shape, lambda run, a, b: 1.0 if run.args == (wanted,) else 2.0)
    assert (operation, config, best) == ("fp8_matmul", wanted, 1.0)
    monkeypatch.setattr(tuning_sm90, "TABLES", tmp_path)
    monkeypatch.setattr(tuning_sm90, "device", lambda: ("NVIDIA TEST card", 132))
    tuning_sm90.table_path("NVIDIA TEST card").write_text(json.dumps({operation: {"64x256x128": vars(config)}}))
    tuning_sm90._table.cache_clear()
    assert tuning_sm90.choose_config("fp8_matmul", 64, 256, 128, jnp.bfloat16) == wanted
    assert tuning_sm90.choose_config("fp8_matmul", 64, 512, 128, jnp.bfloat16) != wanted
    tuning_sm90._table.cache_clear()


def test_candidates_fit_and_differ():
    for dtype in (jnp.bfloat16, jnp.float32):
        configs = list(tune.candidates(dtype))
        assert len(set(configs)) == len(configs) == 42 and all(config.stages >= 2 for config in configs)


def test_the_table_is_measured_on_a_hopper_gpu(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "the table is measured on an NVIDIA Hopper GPU" in capsys.readouterr().err
