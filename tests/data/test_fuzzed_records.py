"""Damaged files of records, and of metrics, are read or refused in words; nothing else comes out."""

import json
import random

import pytest
from test_files import content, packed

from deepseek_jax.data.config import SourceConfig
from deepseek_jax.data.documents import Documents, Tokenize
from deepseek_jax.data.sources import open_source
from deepseek_jax.errors import UserError
from deepseek_jax.report import read_evaluation
from deepseek_jax.training.metrics import read_metrics

RECORDS = {
    "text": {"text": "some text"},
    "completion": {"prompt": "question", "completion": "<think>a</think> b"},
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    "tokens": {"tokens": [257, 97, 98, 258], "loss_mask": [0, 1, 1, 1]},
}
STRANGE = (None, True, -1, 2**70, 1e400, "", "\ud800", [], {}, [[]], {"role": 1}, [None], "x" * 300, {"content": None})


def damaged(chance, value):
    """A JSON value with one of its parts replaced, removed or repeated."""
    if chance.random() < 0.25 or not isinstance(value, list | dict) or not value:
        return chance.choice(STRANGE)
    value = dict(value) if isinstance(value, dict) else list(value)
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if chance.random() < 0.2:
        del value[key]
    else:
        value[key] = damaged(chance, value[key])
    return value


def damaged_bytes(chance, raw):
    raw = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(raw)) if raw else 0
        raw[at : at + chance.choice((0, 1, 1, 5))] = bytes(chance.choices(range(256), k=chance.choice((0, 1, 1, 3))))
    return bytes(raw[: chance.randrange(len(raw) + 1)] if chance.random() < 0.2 else raw)


def try_records(chance, folder, tokenizer):
    form = chance.choice(list(RECORDS))
    suffixes = (".jsonl", ".json", ".parquet") + ((".csv", ".tsv") if form in ("text", "completion") else ())
    inner, outer = chance.choice(suffixes), chance.choice(("", "", ".gz", ".bz2", ".xz", ".zst"))
    records = [RECORDS[form]] * 3
    if inner in (".jsonl", ".json") and chance.random() < 0.6:
        bad = damaged(chance, RECORDS[form])
        lines = [RECORDS[form], bad]
        raw = (
            json.dumps(lines).encode()
            if inner == ".json"
            else "".join(json.dumps(line) + "\n" for line in lines).encode()
        )
    else:
        raw = damaged_bytes(chance, content(records, inner))
    raw = packed(raw, outer)
    path = folder / f"a{inner}{outer}"
    path.write_bytes(damaged_bytes(chance, raw) if chance.random() < 0.2 else raw)
    source = SourceConfig(str(path), format=form, validation_fraction=0.0)
    documents = Documents(open_source(source, "train", vocab_size=272), Tokenize(source, tokenizer))
    for index in range(len(documents)):
        documents[index]


def try_files_of_a_run(chance, folder, tokenizer):
    del tokenizer
    line = {"step": 3, "loss": 2.5, "list": [1.0], "samples": [{"prompt": "p", "completion": "c", "right": True}]}
    value = damaged(chance, line) if chance.random() < 0.5 else line
    raw = json.dumps(value).encode() + b"\n"
    raw = damaged_bytes(chance, raw) if chance.random() < 0.5 else raw
    for name in ("metrics.jsonl", "evaluation.json"):
        (folder / name).write_bytes(raw)
    assert all(isinstance(line["step"], int) for line in read_metrics(folder))
    read_evaluation(folder / "evaluation.json")


@pytest.mark.parametrize("attempt", [try_records, try_files_of_a_run])
@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_damaged_files_are_read_or_refused(tmp_path, byte_tokenizer, attempt, count):
    outcomes = {"read": 0, "refused": 0}
    for seed in range(count):
        try:
            attempt(random.Random(seed), tmp_path, byte_tokenizer)
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > count / 20, outcomes
