"""The benchmark's tables and flags, and the tuner, whose table the products read."""

import json
import sys
import types

import jax.numpy as jnp
import pytest
from hopper import compiles

from kernels_pallas import Accumulation, QTensor, accuracy, hopper_tuning, quantize_transposed
from kernels_pallas.bench import __main__ as bench
from kernels_pallas.bench import measure, operations, timing, tune
from kernels_pallas.bench.shapes import LINEARS, Shape, deepgemm, shapes
from kernels_pallas.hopper_tuning import Config


def test_shapes_are_those_of_v3():
    assert (
        LINEARS["q_a and kv_a"] == (1536 + 512 + 64, 7168)
        and LINEARS["q_b"] == (128 * 192, 1536)
        and LINEARS["o"] == (7168, 128 * 128)
    )
    all_shapes = shapes()
    assert len(all_shapes) == len(set(all_shapes)) == 4 * 7 + 7 + 4 + 4
    assert (
        deepgemm(Shape("dense", "o", 4096, 7168, 16384)) == 1358
        and deepgemm(Shape("dense", "o", 1, 7168, 16384)) is None
    )
    one = Shape("grouped", "down", 8, 4, 2, groups=3)
    assert one.flops == 3 * 2 * 8 * 4 * 2 and one.bytes == 3 * ((8 + 4) * 2 + 8 * 4 * 2)


@pytest.mark.parametrize(
    "only, names",
    [
        ("weight gradient, down", ["weight gradient, down", *2 * ["grouped weight gradient, down"]]),
        (
            "quantize",
            ["quantize_tile", "quantize_block", "quantize_transposed", "requantize_transposed", "swiglu_quantize"],
        ),
        ("attention", ["attention, forward", "attention, forward and gradients"]),
    ],
)
def test_it_runs_where_there_is_no_gpu(only, names, tmp_path):
    """On small shapes; the table shows ratios to bfloat16 and to the device's measured ceilings."""
    rows = bench.main(["--small", f"--only={only}", f"--json={tmp_path / 'rows.json'}"])
    assert rows == json.loads((tmp_path / "rows.json").read_text())
    assert [row["operation"] for row in rows] == names
    assert {row["verdict"] for row in rows} == {"right"} and all(row["us"] > 0 for row in rows)
    assert all(row["× bfloat16"] > 0 and row["of ceiling"] > 0 for row in rows if "gradient, " in row["operation"])


SMALL = Shape("weight gradient", "down", 256, 256, 256)
LIMITS = measure.Ceilings(8192, 1.0, 1.0, 1.0)


def fast(monkeypatch):
    for module in (measure, operations):
        monkeypatch.setattr(module, "seconds", lambda *_: 1.0)


@pytest.mark.parametrize(
    "planted",
    [
        lambda y: jnp.roll(y, 1, axis=-1),
        lambda y: 1.02 * y,
        lambda y: y.at[128:, :128].set(0),
        lambda y: y.at[3, 5].set(jnp.nan),
    ],
)
def test_a_wrong_product_is_reported(planted, monkeypatch):
    """Columns moved by one, numbers 2% too large, a tile of zeros, and one NaN."""
    fast(monkeypatch)
    assert measure.product_row(SMALL, LIMITS, "xla")["verdict"] == "right"
    right = measure.fp8_matmul
    monkeypatch.setattr(measure, "fp8_matmul", lambda *x, **fields: planted(right(*x, **fields)))
    row = measure.product_row(SMALL, LIMITS, "xla")
    assert row["verdict"] == "WRONG" and row["off by"] > accuracy.SUMMED


def test_a_product_without_promotion_is_reported(monkeypatch):
    """Sums as Hopper's tensor cores make them, emulated, with promotion and without."""
    fast(monkeypatch)
    right, deep = measure.fp8_matmul, Shape("weight gradient", "down", 8, 8, 4096)
    for promote_every, verdict in ((128, "right"), (None, "WRONG")):
        accumulation = Accumulation(promote_every, "hopper_fp22")
        monkeypatch.setattr(
            measure,
            "fp8_matmul",
            lambda *x, accumulation=accumulation, **fields: right(*x, accumulation=accumulation, **fields),
        )
        assert measure.product_row(deep, LIMITS, "xla")["verdict"] == verdict


def test_a_scale_off_by_one_tile_is_reported(monkeypatch):
    fast(monkeypatch)
    right = quantize_transposed

    def planted(x, implementation):
        q = right(x, implementation="xla")
        return q if implementation == "xla" else QTensor(q.values, jnp.roll(q.scales, 1, axis=1), q.tile)

    monkeypatch.setitem(operations.QUANTIZERS, "quantize_transposed", (planted, 1, 3))
    assert operations.quantizer_row("quantize_transposed", LIMITS, True, None)["verdict"] == "WRONG"


def test_wrong_attention_is_reported(monkeypatch):
    fast(monkeypatch)
    right = operations.attention
    planted = lambda *x, implementation, **fields: (
        right(*x, implementation="xla", **fields) * (1.05 if implementation is None else 1)
    )
    monkeypatch.setattr(operations, "attention", planted)
    assert operations.attention_row("attention, forward", True, None)["verdict"] == "WRONG"


def test_a_kernel_that_raises_costs_its_own_row(monkeypatch, tmp_path, capsys):
    fast(monkeypatch)
    monkeypatch.setitem(operations.QUANTIZERS, "quantize_block", (lambda x, implementation: 1 / 0, 1, 3))
    with pytest.raises(SystemExit, match=r"^quantize_block \(FAILED\)$"):
        bench.main(["--small", "--only=quantize", f"--json={tmp_path / 'rows.json'}"])
    verdicts = {row["operation"]: row["verdict"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert verdicts.pop("quantize_block") == "FAILED" and set(verdicts.values()) == {"right"}
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_difference_is_that_of_the_worst_piece():
    x = jnp.ones((2, 256, 256))
    y = x.at[1, 200, 200].set(2.0)
    assert accuracy.difference(x, y) == pytest.approx(1 / (2 * 128**2 + 3), rel=1e-5)
    assert (
        accuracy.difference(x, x) == 0
        and accuracy.difference(0 * x, 0 * x) == 0
        and accuracy.difference(x, x.at[0, 0, 0].set(jnp.nan)) == jnp.inf
    )


def test_the_cache_is_emptied_right_before_what_is_timed(monkeypatch):
    calls = []

    class Counter:
        _cupti_init = staticmethod(lambda: calls.append("counting"))
        _cupti_get_timings = staticmethod(lambda finalize: calls.append("counted") or [("one", 1.5), ("two", 0.5)])

    profiler = types.SimpleNamespace(mosaic_gpu_lib=types.SimpleNamespace(_mosaic_gpu_ext=Counter))
    monkeypatch.setitem(sys.modules, "jax.experimental.mosaic.gpu", types.SimpleNamespace(profiler=profiler))
    monkeypatch.setattr(timing.jnp, "zeros", lambda *_: calls.append("flush") or 0)
    assert timing.kernel_seconds(lambda x: calls.append("run") or x, (1,)) == 0.002
    assert calls == ["flush", "counting", "run", "counted"]


@compiles
def test_machine_code():
    (row,) = bench.main(["--aot", "--only=dense, down"])[-1:]
    assert (
        row["shape"] == "4096 × 7168 × 2048"
        and row["spilled bytes"] == 0
        and row["matrix instructions"] % 4 == 0 < row["matrix instructions"]
    )
    assert row["blocks per core"] >= 1
    others = bench.main(["--aot", "--only=bfloat16"]) + bench.main(["--aot", "--only=attention"])
    assert len(others) == 6 and all(row["spilled bytes"] == 0 < row["matrix instructions"] for row in others)


def test_the_fastest_configuration_is_taken_up(tmp_path, monkeypatch):
    wanted = Config(64, "n", minor=1, width=16).fitting(jnp.bfloat16)
    shape = Shape("dense", "down", 64, 256, 128)
    operation, config, best = tune.fastest(
        shape, lambda run, a, b: 1.0 if run.args == (wanted,) else 2.0, lambda *_: 0.0
    )
    assert (operation, config, best) == ("fp8_matmul", wanted, 1.0)
    wrong = lambda shape, both, run: 1.0 if run.args == (wanted,) else 0.0
    assert tune.fastest(shape, lambda run, a, b: 1.0 if run.args == (wanted,) else 2.0, wrong)[1] != wanted
    with pytest.raises(ValueError, match="no configuration computes what it should"):
        tune.fastest(shape, lambda *_: 1.0, lambda *_: 1.0)
    monkeypatch.setattr(hopper_tuning, "TABLES", tmp_path)
    monkeypatch.setattr(hopper_tuning, "device", lambda: ("NVIDIA TEST card", 132))
    hopper_tuning.table_path("NVIDIA TEST card").write_text(json.dumps({operation: {"64x256x128": vars(config)}}))
    hopper_tuning._table.cache_clear()
    assert hopper_tuning.choose_config("fp8_matmul", 64, 256, 128, jnp.bfloat16) == wanted
    assert hopper_tuning.choose_config("fp8_matmul", 64, 512, 128, jnp.bfloat16) != wanted
    hopper_tuning._table.cache_clear()


def test_candidates_fit_and_differ():
    for dtype in (jnp.bfloat16, jnp.float32):
        configs = list(tune.candidates(dtype))
        assert len(set(configs)) == len(configs) == 42 and all(config.stages >= 2 for config in configs)


def test_the_table_is_measured_on_a_hopper_gpu(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "the table is measured on an NVIDIA Hopper GPU" in capsys.readouterr().err


def test_it_says_what_it_does_before_it_measures_and_is_small_on_a_cpu(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(bench, "ceilings", lambda small: said.append((small, capsys.readouterr().err)) or LIMITS)
    monkeypatch.setattr(bench, "quantizer_row", lambda *_, **__: {"verdict": "right"})
    assert bench.main(["--only=quantize_block"]) == [{"operation": "quantize_block", "verdict": "right"}]
    ((small, before),) = said
    assert small and "cpu, jax " in before and "a sixteenth of V3's" in before


NAMES = "The names are: xla; mosaic_gpu_sm90; mosaic_tpu"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--implementation=mosaic_gpu_sm80"], f"does not exist. Did you mean 'mosaic_gpu_sm90'? {NAMES}"),
        (
            ["--only=quantise_tile"],
            "is part of no operation's name. Did you mean 'quantize_tile'? The names are: dense,",
        ),
        (["--only=zzz"], "--only=zzz is part of no operation's name. The names are: dense, q_a and kv_a; "),
        (["--aot", "--only=swiglu_quantize"], "--only=swiglu_quantize is part of no operation's name"),
        (["--aot", "--implementation=xla"], "--implementation has no effect with --aot"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ceilings", lambda small: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_the_tuner_refuses_unknown_names(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--only=dense, gait and up"])
    assert "Did you mean 'dense, gate and up'?" in capsys.readouterr().err
