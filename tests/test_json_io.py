"""One writer and one reader of JSON: strict, UTF-8, and no traceback for what a crash or another program left."""

import ast
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.errors import DataError
from deepseek_jax.json_io import read_json, read_json_lines, to_json

# These write no file of a run: messages between processes, positions compared in memory, keys, and what the formats of
# others prescribe.
OWN_DUMPS = {"data/loader_state.py", "data/loader.py", "data/documents.py", "data/files.py", "data/chat_template.py"}
OWN_DUMPS |= {
    "data/byte_tokenizer.py",
    "data/json_tokenizer.py",
    "data/tokenizer_settings.py",
    "interop/safetensors_io.py",
    "training/checkpoints.py",
    "launch/plan.py",
    "json_io.py",
    "workdir.py",
}


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_at_any_depth():
    value = {
        "a": math.nan,
        "b": [1.5, -math.inf, {"c": (np.float32("nan"), np.inf)}],
        "d": np.array([[1.0, np.nan]]),
        "e": jnp.float32(jnp.nan),
    }
    assert strict(to_json(value)) == {"a": None, "b": [1.5, None, {"c": [None, None]}], "d": [[1.0, None]], "e": None}
    assert strict(to_json({"x": np.int64(3), "y": np.bool_(True), "z": "é", "n": jnp.arange(2)}, indent=1)) == {
        "x": 3,
        "y": True,
        "z": "é",
        "n": [0, 1],
    }


def test_nothing_else_in_the_package_writes_json():
    root = Path(deepseek_jax.__file__).parent
    calls = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("dump", "dumps")
        and getattr(node.value, "id", "") == "json"
    ]
    assert "json_io.py" in calls and set(calls) <= OWN_DUMPS


def test_every_text_file_is_opened_with_an_encoding():
    """A machine's own encoding need not be UTF-8."""
    root, missing = Path(deepseek_jax.__file__).parent, []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            mode = [
                argument.value
                for argument in node.args
                if isinstance(argument, ast.Constant) and set(str(argument.value)) <= set("rwabt+x")
            ]
            text = name in ("read_text", "write_text") or (name == "open" and mode and "b" not in mode[0])
            # hosts.write_text
            ours = name == "write_text" and (
                isinstance(node.func, ast.Name) or getattr(node.func.value, "id", "") == "hosts"
            )
            if (
                text
                and not ours
                and not any(keyword.arg == "encoding" for keyword in node.keywords)
                and "os.devnull" not in ast.unparse(node)
            ):
                missing.append(f"{path.relative_to(root)}:{node.lineno}")
    assert not missing


def test_lines_that_cannot_be_read_are_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1}',
        b'{"step": "one"}',
        b"[1]",
        b"\0" * 20,
        b'{"step": 2, "x": "\xff"}',
        b"",
        b'{"step": 3, "loss": NaN}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 4, "lo')
    assert read_json_lines(path, lambda line: isinstance(line["step"], int)) == [{"step": 1}, {"step": 3, "loss": None}]
    assert "5 lines that this program did not write are left out, the first is line 2" in caplog.text
    assert read_json_lines(tmp_path / "none") == []
    caplog.clear()
    path.write_bytes(b'{"step": 1}\n{"st')
    assert read_json_lines(path) == [{"step": 1}] and not caplog.text, (
        "a killed run leaves a torn last line, which needs no warning"
    )
    with pytest.raises(DataError, match="cannot read .*: Is a directory"):
        read_json_lines(tmp_path)


@pytest.mark.parametrize(
    "raw, reason",
    [
        (b'{"a": ', "Expecting value"),
        (b"[1]", "it holds list"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"", "Expecting value"),
    ],
)
def test_a_damaged_object_is_refused_with_what_to_do(tmp_path, raw, reason):
    (tmp_path / "e.json").write_bytes(raw)
    with pytest.raises(DataError, match=f"e.json is damaged .*{reason}.*; remove it"):
        read_json(tmp_path / "e.json", "remove it")
