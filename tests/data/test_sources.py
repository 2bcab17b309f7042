"""Every kind of source, its held-out split, and what it says when something is wrong with it."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from deepseek_jax.data import stdlib_text
from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.loader import build_loader
from deepseek_jax.data.sources import open_source
from deepseek_jax.errors import DataError

STDLIB = SourceConfig("stdlib", max_bytes=400_000)


def texts(records, field="text"):
    return [records[i][field] for i in range(len(records))]


def test_stdlib_splits_are_disjoint_real_files_under_the_cap(data_dir):
    train, held_out = (open_source(STDLIB, split, data_dir) for split in ("train", "validation"))
    train_paths, held_out_paths = set(texts(train, "path")), set(texts(held_out, "path"))
    assert train_paths and held_out_paths and not train_paths & held_out_paths
    size = sum(len(text.encode()) for text in texts(train) + texts(held_out))
    assert 350_000 < size <= 400_000
    root = Path(sysconfig.get_path("stdlib"))
    for record in (train[0], train[len(train) - 1], held_out[0]):
        assert record["text"] == (root / record["path"]).read_text(encoding="utf-8", errors="replace")
    assert not any(
        part in stdlib_text.SKIPPED_FOLDERS for path in train_paths | held_out_paths for part in Path(path).parts
    )


def test_stdlib_is_prepared_once_and_found_again(data_dir, monkeypatch):
    first = texts(open_source(STDLIB, "train", data_dir), "path")
    monkeypatch.setattr(stdlib_text.StdlibText, "_generate_examples", None)  # preparing again would fail
    assert texts(open_source(STDLIB, "train", data_dir), "path") == first


def test_stdlib_survives_another_process_preparing_it_first(tmp_path, monkeypatch):
    generate = stdlib_text.StdlibText._generate_examples

    def race(self, files):
        monkeypatch.setattr(stdlib_text.StdlibText, "_generate_examples", generate)
        stdlib_text.prepare(str(tmp_path), 50_000)
        return generate(self, files)

    monkeypatch.setattr(stdlib_text.StdlibText, "_generate_examples", race)
    assert len(open_source(SourceConfig("stdlib", max_bytes=50_000), "train", str(tmp_path)))
    assert not list(tmp_path.rglob("incomplete*"))


def test_an_interrupted_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, files):
        yield "a", {"path": "a", "text": "a"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stdlib_text.StdlibText, "_generate_examples", fail)
        with pytest.raises(KeyboardInterrupt):
            open_source(STDLIB, "train", str(tmp_path))
    assert len(open_source(STDLIB, "train", str(tmp_path))) > 10


class TinyQuotes(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset with a text feature under another name."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"quote": tfds.features.Text(), "year": np.int64})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            yield i, {"quote": f"čtvrt {i}", "year": 2000 + i}


def test_tfds_by_name_with_slices_as_splits(data_dir, byte_tokenizer):
    source = SourceConfig(
        "tfds:tiny_quotes", text_field="quote", train_split="train[:80%]", validation_split="train[80%:]"
    )
    train, held_out = (texts(open_source(source, split, data_dir), "quote") for split in ("train", "validation"))
    assert sorted(train + held_out) == [f"čtvrt {i}" for i in range(10)] and len(held_out) == 2
    batch = next(build_loader(DataConfig(sources=(source,), data_dir=data_dir, shuffle_window=1), byte_tokenizer, 8, 2))
    assert "čtvrt" in byte_tokenizer.decode(batch["tokens"].reshape(-1))


def test_tfds_errors_name_what_there_is(data_dir):
    with pytest.raises(DataError, match="unknown TFDS dataset 'imdb_review': did you mean imdb_reviews"):
        open_source(SourceConfig("tfds:imdb_review"), "train", data_dir)
    with pytest.raises(DataError, match="no field 'text'; the fields are: quote, year; set text_field"):
        open_source(SourceConfig("tfds:tiny_quotes"), "train", data_dir)
    with pytest.raises(DataError, match="no split 'validation': .*allowed: train; set train_split"):
        open_source(SourceConfig("tfds:tiny_quotes", text_field="quote"), "validation", data_dir)


def test_tfds_prepared_as_tfrecord_is_refused(tmp_path, data_dir):
    open_source(SourceConfig("tfds:tiny_quotes", text_field="quote"), "train", str(tmp_path))
    for file in (tmp_path / "tiny_quotes").rglob("dataset_info.json"):
        file.write_text(file.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match="needs TensorFlow to read; .*set data.data_dir to another folder"):
        open_source(SourceConfig("tfds:tiny_quotes", text_field="quote"), "train", str(tmp_path))


@pytest.fixture(params=["jsonl", "parquet", "txt"])
def files(request, tmp_path):
    """The same forty documents in each format, in two files (or forty), and the path that names them."""
    documents = [f"document {i}\nžluťoučký kůň" for i in range(40)]
    for part in range(2):
        mine = documents[part::2]
        if request.param == "jsonl":
            lines = [
                json.dumps({"body": text, "id": i}, ensure_ascii=bool(part)) + "\n\n" for i, text in enumerate(mine)
            ]
            (tmp_path / f"{part}.jsonl").write_text("".join(lines))
        elif request.param == "parquet":
            table = pyarrow.table({"id": list(range(len(mine))), "body": mine})
            pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=3)
        else:
            for i, text in enumerate(mine):
                (tmp_path / f"{part}_{i}.txt").write_text(text)
    return str(tmp_path / f"*.{request.param}"), documents


def test_local_files(files, byte_tokenizer):
    path, documents = files
    source = SourceConfig(path, text_field="body", validation_fraction=0.3)
    train, held_out = (texts(open_source(source, split), "body") for split in ("train", "validation"))
    assert sorted(train + held_out) == sorted(documents) and 4 < len(held_out) < 20
    everything = SourceConfig(path, text_field="body", validation_path=path)
    assert len(open_source(everything, "train")) == len(open_source(everything, "validation")) == 40
    loader = build_loader(DataConfig(sources=(source,), num_epochs=1, shuffle_window=1), byte_tokenizer, 50, 2)
    text = byte_tokenizer.decode(np.concatenate([batch["tokens"].reshape(-1) for batch in loader]))
    assert sorted(text.replace("<pad>", "").removeprefix("<bos>").removesuffix("<eos>").split("<eos><bos>")) == sorted(
        train
    )


def test_equal_texts_never_straddle_the_split(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"t{i % 7}", "id": i}) + "\n" for i in range(70)))
    source = SourceConfig(str(tmp_path / "a.jsonl"), validation_fraction=0.4)
    train, held_out = (set(texts(open_source(source, split))) for split in ("train", "validation"))
    assert train and held_out and not train & held_out


def test_completions_are_trained_on_behind_the_prompt(tmp_path, byte_tokenizer):
    reasoning = "<think>1+1</think><answer>2</answer>"
    question, answer = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": reasoning}
    context = [{"role": "user", "content": "<eos>"}, {"role": "assistant", "content": "what?"}]
    ids = {
        "prompt": byte_tokenizer.chat([question]),
        "completion": byte_tokenizer.encode(reasoning, eos=True, allow_special=True),
    }
    plain = byte_tokenizer.encode("<bos><user>1+1?<assistant>" + reasoning + "<eos>", allow_special=True)
    behind_context = [257, 263, *b"<eos>", 264, *b"what?", 258] + plain[1:]
    cases = {
        "completion": [({"prompt": "1+1?", "completion": reasoning}, plain), (ids, plain)],
        "messages": [
            ({"messages": [question, answer]}, plain),
            ({"messages": [*context, question, answer]}, behind_context),
        ],
    }
    for form, records in cases.items():
        file = tmp_path / f"{form}.jsonl"
        file.write_text("\n".join(json.dumps(record) for record, _ in records))
        source = SourceConfig(str(file), format=form, validation_fraction=0.0)
        loader = build_loader(
            DataConfig(sources=(source,), packing="whole", num_epochs=1, shuffle=False), byte_tokenizer, 31, 1
        )
        for batch, (_, expected) in zip(loader, records, strict=True):
            assert batch["tokens"][batch["segment_ids"] == 1].tolist() == expected
            assert byte_tokenizer.decode(batch["tokens"][batch["loss_mask"] == 1]) == reasoning + "<eos>"


def test_reasoning_opened_by_prompt_and_completion_is_refused(byte_tokenizer):
    source = SourceConfig("pairs", format="completion")
    records = [
        {"prompt": byte_tokenizer.encode("<bos>q<assistant><think>\n", allow_special=True), "completion": "<think>\na"}
    ]
    with pytest.raises(DataError, match="prompt already ends with <think>"):
        build_loader(DataConfig(sources=(source,)), byte_tokenizer, 4, 1, in_memory={"pairs": {"train": records}})


@pytest.mark.parametrize(
    "name, content, fields, message",
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', {}, r"a.jsonl line 3: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', {}, r"a.jsonl line 2: expected an object with fields text, found list"),
        (
            "a.jsonl",
            '{"body": "a", "id": 1}',
            {},
            r"a.jsonl line 1: no field 'text'; the fields are: body, id; set text_field",
        ),
        ("a.jsonl", '{"text": 5}', {}, r"a.jsonl line 1: field 'text' holds int, not text"),
        (
            "a.jsonl",
            '{"prompt": "a"}',
            {"format": "completion"},
            r"line 1: no field 'completion'; the fields are: prompt; format",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": 3}',
            {"format": "completion"},
            r"'completion' holds int, neither text nor token ids",
        ),
        ("a.jsonl", '{"messages": "hi"}', {"format": "messages"}, r"messages must be a list of objects"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "hi"}]}',
            {"format": "messages"},
            r"the last message is the user's",
        ),
        ("a.jsonl", "", {}, r"has no documents in its train split"),
        ("a.jsonl", "\n\n", {}, r"has no documents in its train split"),
        (
            "a.txt",
            "one",
            {"validation_fraction": 0.999},
            r"none of its 1 documents falls into the train split .*validation_path",
        ),
        ("a.txt", b"caf\xe9", {}, r"a.txt is not UTF-8 text \(byte 3\)"),
        ("a.txt", "one", {"format": "completion"}, r"a .txt file holds plain text"),
        ("a.parquet", "not parquet", {}, r"a.parquet is not a parquet file that can be read"),
        (
            "a.parquet",
            {"body": ["a"], "id": [1]},
            {},
            r"a.parquet row 0: no field 'text'; the fields are: body, id; set text_field",
        ),
        ("a.md", "x", {}, r"a.md: .*allowed: .*\.jsonl"),
        ("b.jsonl", None, {}, r"no file matches '.*b.jsonl'"),
    ],
)
def test_bad_files(tmp_path, name, content, fields, message):
    path = tmp_path / name
    if isinstance(content, dict):
        pyarrow.parquet.write_table(pyarrow.table(content), path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        open_source(SourceConfig(str(path), **fields), "train")


def test_unreadable_file(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot read .*folder.jsonl: Is a directory"):
        open_source(SourceConfig(str(tmp_path / "folder.jsonl")), "train")


def test_unknown_dataset_names_the_nearest():
    with pytest.raises(DataError, match="unknown dataset 'stdlb': did you mean 'stdlib'"):
        open_source(SourceConfig("stdlb"), "train")
