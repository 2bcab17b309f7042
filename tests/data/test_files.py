"""Local files of every format: the same records from each, places in messages, files that change, splits by
question."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deepseek_jax.data import sources
from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.documents import Documents, Tokenize
from deepseek_jax.data.files import suffixes
from deepseek_jax.data.loader import build_loader
from deepseek_jax.data.sources import open_source
from deepseek_jax.errors import DataError

RECORDS = [{"prompt": f'question {i},\n"quoted"\tand žluťoučký', "completion": f"answer {i}"} for i in range(12)]


def packed(data, suffix):
    compress = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda raw: pyarrow.compress(raw, "zstd", asbytes=True),
    }
    return compress[suffix](data) if suffix in compress else data


def content(records, suffix):
    """A file's bytes in the format of a suffix."""
    if suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(records[0]), delimiter="," if suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode()
    if suffix == ".parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), buffer, row_group_size=5)
        return buffer.getvalue()
    if suffix == ".json":
        return json.dumps(records, indent=1, ensure_ascii=False).encode()
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write(path, records, suffix=".jsonl", outer=""):
    path.write_bytes(packed(content(records, suffix), outer))
    return str(path)


@pytest.mark.parametrize(
    "name", [suffix for suffix in suffixes() if ".txt" not in suffix] + [".JSONL", ".Csv", ".JSON.GZ"]
)
def test_every_suffix_gives_the_same_records(tmp_path, name):
    inner, outer = (*name.lower().lstrip(".").split("."), "")[:2]
    path = write(tmp_path / f"a.b{name}", RECORDS, f".{inner}", outer and f".{outer}")
    records = open_source(SourceConfig(path, format="completion", validation_fraction=0.0), "train")
    assert [records[i] for i in range(len(records))] == RECORDS
    assert [records[i] for i in (11, 0, 5)] == [RECORDS[i] for i in (11, 0, 5)]


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbf%s", b"%s"], ids=["byte order mark", "plain"])
@pytest.mark.parametrize("ending", [b"\r\n", b"\n"])
def test_byte_order_marks_and_line_ends(tmp_path, raw, ending):
    lines = [b'{"text": "first"}', b"", b'{"text": "last"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw % ending.join(lines))
    records = open_source(SourceConfig(str(path), validation_fraction=0.0), "train")
    assert [records[i] for i in range(len(records))] == [{"text": "first"}, {"text": "last"}]
    assert records.where(1) == f"{path} line 3"
    for name, text in (
        ("b.json", b'{"text": "first"}\n{"text": "last"}'),
        ("c.json", b' [{"text": "first"},\n{"text": "last"}]\n'),
        ("d.csv", b"text\nfirst\nlast\n"),
    ):
        (tmp_path / name).write_bytes(raw % text.replace(b"\n", ending))
        records = open_source(SourceConfig(str(tmp_path / name), validation_fraction=0.0), "train")
        assert [records[i]["text"] for i in range(len(records))] == ["first", "last"], name
    (tmp_path / "e.txt").write_bytes(raw % b"one" + ending + b"two")
    assert open_source(SourceConfig(str(tmp_path / "e.txt"), validation_fraction=0.0), "train")[0] == {
        "text": "one\ntwo"
    }


@pytest.mark.parametrize(
    "name, raw, message",
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b',
            r"line 2: not valid JSON .*the file ends in the middle of this line: copy it again, or remove the line",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"line 2: not valid JSON \(byte 13 is not UTF-8 text\)"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"line 1: this is UTF-16; convert it first"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), r"line 1: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"line 1: not valid JSON \(it is nested too deeply\)"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"line 1: not valid JSON \(Exceeds the limit"),
        ("a.json", b'[{"text": "a"},\n {"text": "b"}', r"line 2: not valid JSON \(the file ends before the array does"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', r"line 2: not valid JSON \(Expecting value, column 11\)"),
        ("a.json", b'[{"text": "a"}\n {"text": "b"}]', r"line 2: not valid JSON \(',' or '\]' expected, found '\{'\)"),
        ("a.json", b'[{"text": "a"},\n]', r"line 2: not valid JSON"),
        ("a.json", b'[{"text": "a"}]\n[]', r"line 2: text behind the end of the array"),
        ("a.json", b'[{"text": "a"},\n\n "b"]', r"line 3: expected an object with fields text, found str"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"line 1: no field 'text'; the fields are: data"),
        ("a.json", "[]".encode("utf-16"), r"a.json line 1: this is UTF-16"),
        ("a.csv", b"text,id\na,1\nb\n", r"line 3: 1 columns, and the first line names 2"),
        ("a.csv", b'text\n"a\nb"\n"c', r"line 4: not a table that can be read \(unexpected end of data\)"),
        ("a.csv", b"text,text\na,b\n", r"line 1: every column needs a name of its own"),
        ("a.csv", b"body;id\na;1\n", r"line 2: no field 'text'; the fields are: body;id"),
        ("a.csv", b"text\ncaf\xe9\n", r"a.csv is not UTF-8 text \(byte 8\) on line 2"),
        ("a.txt", "text".encode("utf-16"), r"a.txt line 1: this is UTF-16"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], r"a.jsonl.gz is not a complete .gz file"),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a.jsonl.gz is not a complete .gz file \(Not a gzipped file"),
        ("a.jsonl.bz2", bz2.compress(b'{"text": "a"}\n')[:-9], r"a.jsonl.bz2 is not a complete .bz2 file"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n')[:-9], r"a.jsonl.xz is not a complete .xz file"),
        ("a.jsonl.zst", packed(b'{"text": "a"}\n', ".zst")[:-3], r"a.jsonl.zst is not a complete .zst file"),
        ("a.gz", gzip.compress(b"a", mtime=0), r"a.gz: .*allowed: .*\.jsonl\.gz"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        open_source(SourceConfig(str(tmp_path / name)), "train")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_plain_text_has_no_chats(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_text("messages\n")
    with pytest.raises(
        DataError, match=f"a{suffix}: a {suffix} file holds plain text; format 'messages' needs .jsonl or .parquet"
    ):
        open_source(SourceConfig(str(tmp_path / f"a{suffix}"), format="messages"), "train")


def test_a_path_that_exists_is_that_file(tmp_path):
    folder = tmp_path / "corpus [v1]*?"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write(folder / name, [{"text": name}])
    records = open_source(SourceConfig(str(folder / "a.jsonl"), validation_fraction=0.0), "train")
    assert [records[i]["text"] for i in range(len(records))] == ["a.jsonl"]
    (tmp_path / "plain" / "empty.jsonl").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "plain" / name, [{"text": name}])
    records = open_source(SourceConfig(str(tmp_path / "plain" / "*"), validation_fraction=0.0), "train")
    assert [records[i]["text"] for i in range(len(records))] == ["a.jsonl", "b.jsonl"], (
        "a pattern does not match folders"
    )


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "HuggingFaceFW/fineweb",
            r"no file matches 'HuggingFaceFW/fineweb'; data from the Hugging Face Hub has to be downloaded first",
        ),
        ("tfds:HuggingFaceFW/fineweb", r"unknown TFDS dataset 'HuggingFaceFW/fineweb': .*has to be downloaded first"),
        ("tfds:mnist/none", r"TFDS cannot open 'mnist/none': .*BuilderConfig none not found"),
        ("tfds:mnist:9.9.9", r"TFDS cannot open 'mnist:9.9.9': .*only: 3.0.1"),
        ("tfds:", r"TFDS cannot open ''"),
        ("tfds:a b", r"TFDS cannot open 'a b'"),
        ("data/", r"no file matches 'data/'"),
    ],
)
def test_names_that_mean_nothing(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(SourceConfig(name), "train", str(tmp_path))


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_file_that_changes_under_a_run(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content([{"text": "x" * 2000} for _ in range(40)], suffix))
    records = open_source(SourceConfig(str(path), validation_fraction=0.0), "train")
    last, expected = len(records) - 1, records[len(records) - 1]
    os.utime(path)
    if suffix == ".jsonl":
        with path.open("a") as file:
            file.write('{"text": "more"}\n')
    assert records[last] == expected, "what was there is as it was"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"x", b"y"))  # of the same size
    with pytest.raises(DataError, match=rf"data{suffix}.*: the file has changed since it was opened"):
        records[last]
    path.write_bytes(b"short")
    with pytest.raises(DataError, match=rf"data{suffix}.*: the file has changed since it was opened"):
        records[last]


def test_a_changed_file_ends_the_loader_with_its_name(tmp_path, byte_tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content([{"text": "x" * 2000} for _ in range(400)], ".jsonl"))
    loader = build_loader(
        DataConfig(sources=(SourceConfig(str(path), validation_fraction=0.0),), prefetch_sequences=2),
        byte_tokenizer,
        64,
        2,
    )
    next(loader)
    path.write_text('{"text": "a mended copy"}\n')
    with pytest.raises(DataError, match=r"data.jsonl line \d+: the file has changed"):
        loader.take(20_000)


def test_a_file_is_read_once_for_both_splits(tmp_path, monkeypatch):
    path, opened = write(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(50)]), []
    read = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda *arguments: opened.append(arguments) or read(*arguments))
    kept = [open_source(SourceConfig(path), split) for split in ("train", "validation", "validation")]
    assert len(opened) == 1 and len(kept[0]) + len(kept[1]) == 50
    write(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(60)])
    now = [open_source(SourceConfig(path), split) for split in ("train", "validation")]
    assert len(now[0]) + len(now[1]) == 60
    changed = os.stat(path).st_mtime_ns + 10**9
    write(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in reversed(range(60))])
    os.utime(path, ns=(changed, changed))  # a file of the same name and size, opened while the old one is in use
    assert open_source(SourceConfig(path, validation_fraction=0.0), "train")[0] == {"text": "59"}


QUESTIONS = {
    "text": lambda question, answer: {"text": question, "id": answer},
    "completion": lambda question, answer: {"prompt": question, "completion": answer},
    "messages": lambda question, answer: {
        "messages": [
            {"role": "system", "content": f"no. {answer}"},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    },
    "turns": lambda question, answer: {
        "messages": [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant") * 2, (question, answer, f"and {answer}?", "yes"), strict=True)
        ]
    },
    "tokens": lambda question, answer: {
        "tokens": [257, *question.encode(), *answer.encode()],
        "loss_mask": [0] * (1 + len(question)) + [1] * len(answer),
    },
    "ids": lambda question, answer: {"prompt": list(question.encode()), "completion": list(answer.encode())},
}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_one_question_is_on_one_side_of_the_split_whatever_its_answers(tmp_path, kind):
    form = {"turns": "messages", "ids": "completion"}.get(kind, kind)
    records = [QUESTIONS[kind](f"question {i % 40}", f"{i} is the answer") for i in range(160)]
    source = SourceConfig(write(tmp_path / "a.jsonl", records), format=form, validation_fraction=0.3)
    sides = {}
    for split in ("train", "validation"):
        opened = open_source(source, split)
        for i in range(len(opened)):
            number = records.index(opened[i])
            sides.setdefault(number % 40, []).append(split)
    assert all(len(found) == 4 and len(set(found)) == 1 for found in sides.values()) and len(sides) == 40
    held_out = sum(found[0] == "validation" for found in sides.values())
    assert 5 <= held_out <= 20, "questions fall on both sides: 12 of 40 expected"


def test_documents_that_are_trained_on_from_the_start_are_split_by_all_their_tokens(tmp_path):
    records = [
        {"tokens": [257, *f"text {i}".encode(), 258], "loss_mask": [0] + [1] * len(f"text {i}.")} for i in range(60)
    ]
    source = SourceConfig(write(tmp_path / "a.jsonl", records), format="tokens", validation_fraction=0.3)
    assert 9 <= len(open_source(source, "validation")) <= 27


BAD_IDS = [
    ([257, -100], r"tokens\[1\] is -100, outside 0 … 271.*has loss_mask 0"),
    ([257, 272], r"tokens\[1\] is 272, outside 0 … 271"),
    ([257, 3_000_000_000], r"tokens\[1\] is 3000000000, outside"),
    ([257, 2**70], r"tokens holds 1180591620717411303424, which is too large"),
    ([257.0, 65.0], r"tokens\[0\] is 257.0; token ids are integers"),
    ([257, 65.7], r"tokens\[1\] is 65.7; token ids are integers"),
    ([257, None], r"tokens\[1\] is None"),
    ([257, "a"], r"tokens\[1\] is 'a'"),
    ([True, 1], r"tokens\[0\] is True"),
    ([[1, 2], [3, 4]], r"tokens\[0\] is \[1, 2\]"),
    (None, r"tokens holds NoneType, not a list"),
    ("abc", r"tokens holds str, not a list"),
    ({"a": 1}, r"tokens holds dict, not a list"),
]


@pytest.mark.parametrize("tokens, message", BAD_IDS)
@pytest.mark.parametrize("field", ["tokens", "prompt", "completion"])
def test_ids_that_are_none_are_refused_with_file_and_line(tmp_path, byte_tokenizer, tokens, message, field):
    if field != "tokens" and not isinstance(tokens, list):
        tokens, message = [1.5], r"tokens\[0\] is 1.5"  # text would be a prompt
    good = {"tokens": [1, 2, 271]} if field == "tokens" else {"prompt": [1, 0], "completion": [2]}
    bad = good | {field: tokens}
    source = SourceConfig(
        write(tmp_path / "a.jsonl", [good] * 3 + [bad]),
        format="tokens" if field == "tokens" else "completion",
        validation_path="x",
    )
    with pytest.raises(DataError, match=r"a.jsonl line 4: " + message.replace("tokens", field, 1)):
        open_source(source, "train", vocab_size=272)
    with pytest.raises(DataError, match=message.replace("tokens", field, 1)):
        Tokenize(source, byte_tokenizer)(bad)


@pytest.mark.parametrize(
    "array", [np.array([1.0, 2.0]), np.array([True]), np.array([[1]]), np.array(["a"]), np.array([-1]), np.array([272])]
)
def test_arrays_that_are_no_ids(byte_tokenizer, array):
    with pytest.raises(DataError, match="tokens"):
        Tokenize(SourceConfig("x", format="tokens"), byte_tokenizer)({"tokens": array})


@pytest.mark.parametrize(
    "mask, message",
    [
        ([1, 2, 0], r"loss_mask\[1\] is 2"),
        ([1, -1, 0], r"loss_mask\[1\] is -1"),
        ([1, 0.5, 0], r"loss_mask\[1\] is 0.5"),
        ([1, None, 0], r"loss_mask\[1\] is None"),
        ([1, "1", 0], r"loss_mask\[1\] is '1'"),
        ([1, 0], r"3 tokens and 2 values of loss_mask"),
        ("101", r"loss_mask holds str"),
        (None, r"loss_mask holds NoneType"),
    ],
)
def test_masks_that_are_none_are_refused(tmp_path, mask, message):
    path = write(tmp_path / "a.jsonl", [{"tokens": [1, 2, 3]}, {"tokens": [1, 2, 3], "loss_mask": mask}])
    with pytest.raises(DataError, match="a.jsonl line 2: .*" + message):
        open_source(SourceConfig(path, format="tokens", validation_fraction=0.0), "train")


def test_masks_may_be_booleans_and_whole_floats(byte_tokenizer):
    tokenize = Tokenize(SourceConfig("x", format="tokens"), byte_tokenizer)
    for mask in ([False, True, True], [0.0, 1.0, 1.0], np.array([False, True, True]), np.float32([0, 1, 1])):
        assert tokenize({"tokens": [97, 98, 99], "loss_mask": mask})[:, 1].tolist() == [0, 1, 1]


def test_the_ids_of_a_larger_model_are_allowed(tmp_path, byte_tokenizer):
    config = DataConfig(
        sources=(
            SourceConfig(
                write(tmp_path / "a.jsonl", [{"tokens": [299] * 9}] * 9), format="tokens", validation_fraction=0.0
            ),
        )
    )
    assert next(build_loader(config, byte_tokenizer, 8, 2, vocab_size=300))["tokens"].max() == 299
    with pytest.raises(DataError, match="a.jsonl line 1: .*299, outside 0 … 271"):
        build_loader(config, byte_tokenizer, 8, 2)


def chat(*roles):
    return {"messages": [{"role": role, "content": "text"} for role in roles]}


class Refusing:
    """A tokenizer whose template takes no system prompt, and counts."""

    vocab_size, pad_id = 272, 256

    def __init__(self, tokenizer):
        self._tokenizer, self.chats = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def turn(self, messages):
        self.chats += 1
        if messages[0]["role"] == "system":
            raise DataError("the template takes no system prompt")
        return self._tokenizer.turn(messages)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".jsonl.gz"])
def test_one_chat_of_each_shape_is_rendered_when_the_data_is_opened(tmp_path, byte_tokenizer, suffix):
    inner, outer = (suffix.removesuffix(".gz"), ".gz" if suffix.endswith(".gz") else "")
    good, longer, bad = (
        chat("user", "assistant"),
        chat("user", "assistant", "user", "assistant"),
        chat("system", "user", "assistant"),
    )
    tokenizer = Refusing(byte_tokenizer)
    config = DataConfig(
        sources=(
            SourceConfig(
                write(tmp_path / f"a{suffix}", [good] * 90 + [longer] * 9, inner, outer),
                format="messages",
                validation_fraction=0.0,
            ),
        )
    )
    build_loader(config, tokenizer, 8, 1)
    assert tokenizer.chats < 10
    config = DataConfig(
        sources=(
            SourceConfig(
                write(tmp_path / f"b{suffix}", [good] * 150 + [bad] + [good] * 9, inner, outer),
                format="messages",
                validation_fraction=0.0,
            ),
        )
    )
    place = {".jsonl": "line 151", ".json": r"line \d+", ".parquet": "row 150", ".jsonl.gz": "line 151"}[suffix]
    with pytest.raises(DataError, match=f"b{suffix} {place}: the template takes no system prompt"):
        build_loader(config, tokenizer, 8, 1)


def test_a_record_that_fails_later_is_named(tmp_path, byte_tokenizer):
    class Moody(Refusing):
        def encode(self, text, **options):
            if text == "bad":
                raise DataError("cannot encode")
            return self._tokenizer.encode(text, **options)

    path = write(tmp_path / "a.jsonl", [{"text": "good enough"}] * 30 + [{"text": "bad"}])
    config = DataConfig(
        sources=(SourceConfig(path, validation_fraction=0.0),), shuffle=False, prefetch_sequences=0, num_epochs=1
    )
    loader = build_loader(config, Moody(byte_tokenizer), 8, 2)
    with pytest.raises(DataError, match="a.jsonl line 31: cannot encode"):
        list(loader)


def test_text_is_trained_on_up_to_the_end_of_text(byte_tokenizer):
    """<bos> is nobody's target; every byte and <eos> are."""
    document = Tokenize(SourceConfig("x"), byte_tokenizer)({"text": "né"})
    assert document.tolist() == [[257, 0, 0], [110, 1, 0], [195, 1, 1], [169, 1, 1], [258, 1, 1]]
    memory = {"x": {"train": [{"text": "abc"}, {"text": "d"}], "validation": [{"text": "abc"}, {"text": "d"}]}}
    for split, packing in (("train", "split"), ("train", "whole"), ("validation", "split")):
        config = DataConfig(sources=(SourceConfig("x"),), packing=packing, shuffle=False, num_epochs=1)
        batch = next(build_loader(config, byte_tokenizer, 8, 1, split, in_memory=memory))
        assert batch["tokens"][0].tolist() == [257, 97, 98, 99, 258, 257, 100, 258]
        assert batch["loss_mask"][0].tolist() == [0, 1, 1, 1, 1, 0, 1, 1]


def test_documents_know_their_length_and_places(tmp_path, byte_tokenizer):
    source = SourceConfig(write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "bc"}]), validation_fraction=0.0)
    documents = Documents(open_source(source, "train"), Tokenize(source, byte_tokenizer))
    assert [len(documents[i]) for i in range(len(documents))] == [3, 4]
