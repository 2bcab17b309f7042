"""Streaming, chats that keep their ids, and the command line on a checkpoint of a tiny byte-level model."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import GQA, MLA, SAMPLING, N, build_case
from tokenizer_cases import R1, make_tokenizer

from deepseek_jax import cli
from deepseek_jax.data.tokenizers import StreamDecoder, load_tokenizer
from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.generation import stream as streaming
from deepseek_jax.generation.__main__ import main
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.generation.stream import PROMPT_SLOTS, TOKENS_PER_CALL, Chat, stream
from deepseek_jax.interop import export_folder
from deepseek_jax.training.checkpoints import Checkpoints

BYTES = load_tokenizer("byte")


@flax.struct.dataclass
class Weights:
    step: int
    params: dict
    router_bias: dict


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stage's folder with random weights over the byte vocabulary, and the case they belong to."""
    case = build_case(GQA.replace(vocab_size=BYTES.vocab_size, num_layers=1))
    folder = tmp_path_factory.mktemp("stage")
    store = Checkpoints(folder / "checkpoints", case.model.config)
    store.save(Weights(step=jnp.zeros((), jnp.int32), params=case.variables["params"], router_bias={}))
    store.close()
    BYTES.save(folder / "tokenizer")
    return folder, case


@pytest.fixture(scope="module")
def r1_tokenizer(tmp_path_factory):
    return load_tokenizer(
        make_tokenizer(tmp_path_factory.mktemp("r1"), R1, ("<|user|>", "<|assistant|>", "<think>", "</think>"))
    )


def run(*flags, stdin=""):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "deepseek_jax.generation", *map(str, flags)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=environment, timeout=300, encoding="utf-8"
    )


def test_stream_yields_what_generate_returns(gqa):
    for seed in range(3):
        prompt = gqa.prompts_BP[:1]
        chunks = list(stream(gqa.model, gqa.variables, prompt[0].tolist(), jax.random.key(seed), SAMPLING))
        whole = gqa.rollout(prompt, np.asarray([prompt.shape[1]]), seed=seed)
        assert sum(chunks, []) == np.asarray(whole.tokens_BN)[0, : int(whole.lengths_B[0])].tolist()
        assert all(0 < len(chunk) <= TOKENS_PER_CALL for chunk in chunks)
        assert len(chunks) > 1 and len(chunks[0]) == 1  # the first token does not wait for others


def test_stream_refuses_an_empty_prompt(gqa):
    with pytest.raises(DataError, match="no tokens"):
        next(stream(gqa.model, gqa.variables, [], jax.random.key(0), SAMPLING))


def test_chat_keeps_ids_and_closes_turns():
    chat, eos = Chat(BYTES), BYTES.eos_id
    user, assistant = BYTES.specials["<user>"], BYTES.specials["<assistant>"]
    first = [BYTES.bos_id, user, ord("h"), ord("i"), assistant]
    assert chat.ask("hi") == first
    sampled = [BYTES.specials["<think>"], 0xC3, 77, 270]  # not valid UTF-8, a reserved id, and no eos
    chat.answer(sampled)
    assert chat.ask("?") == [*first, *sampled, eos, user, ord("?"), assistant]
    chat.answer([65, eos])
    assert chat.ask("<eos>") == [
        *first, *sampled, eos, user, ord("?"), assistant, 65, eos, user, *b"<eos>", assistant
    ]  # fmt: skip


def test_chat_shows_the_model_what_the_template_writes(r1_tokenizer):
    """Reasoning that the template drops from earlier answers is gone in the next turn; what it keeps stays as it was
    sampled."""
    chat, parse = Chat(r1_tokenizer), functools.partial(r1_tokenizer.encode, allow_special=True)
    assert chat.ask("one") == parse("<s><|user|>one<|assistant|><think>\n")
    chat.answer(parse("reason</think>two</s>"))
    assert chat.ask("three") == parse("<s><|user|>one<|assistant|>two</s><|user|>three<|assistant|><think>\n")
    chat.answer(parse("cut off"))  # no </think>: the template has nothing to drop
    messages = [
        ("user", "one"),
        ("assistant", "<think>\nreason</think>two"),
        ("user", "three"),
        ("assistant", "<think>\ncut off"),
        ("user", "?"),
    ]
    assert chat.ask("?") == r1_tokenizer.chat([{"role": role, "content": content} for role, content in messages])

    kept = Chat(BYTES)
    kept.ask("hi")
    kept.answer([259, 0xC3, 77, 260, 65, BYTES.eos_id])
    assert kept.ask("?")[5:11] == [259, 0xC3, 77, 260, 65, BYTES.eos_id]


def test_a_refused_question_leaves_the_chat_as_it_was():
    class Strict:
        stop_ids, answer_opening = (1,), ""

        def chat(self, messages):
            if messages[-1]["content"] == "bad":
                raise DataError("no")
            return [len(messages)]

        def decode(self, ids):
            return "".join(map(chr, ids))

    chat = Chat(Strict())
    chat.ask("a")
    chat.answer([7, 1])
    with pytest.raises(DataError, match="no"):
        chat.ask("bad")
    assert chat.ask("b") == [3], "user, assistant, user"


def test_command_streams_the_completion(checkpoint):
    folder, case = checkpoint
    result = run(f"--checkpoint={folder}", "--prompt=héllo", "--temperature=0.8", "--max_new_tokens=20", "--seed=5")
    assert result.returncode == 0, result.stderr
    sampling = SamplingConfig(max_new_tokens=20, eos_id=BYTES.eos_id, pad_id=BYTES.pad_id, temperature=0.8, top_p=0.95)
    rng = jax.random.fold_in(jax.random.key(5), 0)
    ids = sum(stream(case.model, case.variables, BYTES.encode("héllo", bos=True), rng, sampling), [])
    decoder = StreamDecoder(BYTES)
    assert result.stdout.removesuffix("\n") == decoder.push(ids) + decoder.flush()
    assert len(ids) == 20 and "--max_new_tokens=20" in result.stderr


def test_interactive_chat_feeds_back_the_ids_it_sampled(checkpoint, monkeypatch, capsys):
    folder, _ = checkpoint
    answers, prompts = iter([[[0xE2, 0x82], [0xAC, 65]], [[66, BYTES.eos_id]]]), []

    def fake_stream(model, variables, prompt_ids, rng, sampling):
        prompts.append(list(prompt_ids))
        return iter(next(answers))

    lines = iter(["one", "two", ""])
    monkeypatch.setattr("deepseek_jax.generation.__main__.stream", fake_stream)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main([f"--checkpoint={folder}", "--interactive"])
    assert capsys.readouterr().out == "€A\nB\n"
    user, assistant = BYTES.specials["<user>"], BYTES.specials["<assistant>"]
    first = [BYTES.bos_id, user, *b"one", assistant]
    assert prompts == [first, [*first, 0xE2, 0x82, 0xAC, 65, BYTES.eos_id, user, *b"two", assistant]]


def test_a_chat_compiles_one_program_per_prompt_width(gqa):
    sampling = SamplingConfig(max_new_tokens=N, eos_id=-1, pad_id=0, temperature=0.0)
    before = streaming._start._cache_size()
    for length in (2, 7, PROMPT_SLOTS):
        list(stream(gqa.model, gqa.variables, [5] * length, jax.random.key(0), sampling))
    assert streaming._start._cache_size() == before + 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt=a", "--temperature=-1"], "argument --temperature: '-1': must be a number, at least 0"),
        (["--prompt=a", "--temperature=1e-7"], "SamplingConfig.temperature=1e-07: must be at least 1e-05"),
        (["--prompt=a", "--tokenizer=/nowhere"], "no tokenizer at '/nowhere'"),
    ],
)
def test_bad_input_is_reported_in_one_line(checkpoint, flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, [f"--checkpoint={checkpoint[0]}", *flags])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith(f"error: {message}") and "Traceback" not in error


def test_a_missing_checkpoint_ends_the_command(tmp_path):
    result = run(f"--checkpoint={tmp_path / 'gone'}", "--prompt=a")
    assert result.returncode == 2 and result.stdout == "" and "the folder does not exist" in result.stderr
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_a_run_that_saved_no_tokenizer_names_it_in_its_config(checkpoint, tmp_path, monkeypatch, capsys):
    """Never the bytes in silence: the run's config.json says which, or nobody does and the flag is asked for."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "checkpoints").symlink_to(checkpoint[0] / "checkpoints")
    prompts = []

    def fake_stream(model, variables, prompt_ids, rng, sampling):
        prompts.append(list(prompt_ids))
        return iter([[65]])

    monkeypatch.setattr("deepseek_jax.generation.__main__.stream", fake_stream)
    ask = [f"--checkpoint={tmp_path / 'sft'}", "--prompt=<eos>h"]
    with pytest.raises(DataError, match="no tokenizer.json, no folder 'tokenizer'.*--tokenizer="):
        main(ask)
    spec = make_tokenizer(tmp_path / "fox", R1, ())
    (tmp_path / "config.json").write_text(json.dumps({"stages": ["sft"], "tokenizer": spec}))
    monkeypatch.setattr("deepseek_jax.generation.__main__.check_vocabulary", lambda tokenizer, size: None)
    assert main(ask) == 0
    (tmp_path / "config.json").write_text(json.dumps({"stages": ["sft"]}))  # an experiment that names none uses bytes
    assert main(ask) == 0
    assert prompts == [load_tokenizer(spec).encode("<eos>h", bos=True), BYTES.encode("<eos>h", bos=True)]
    load_tokenizer(spec).save(tmp_path / "sft" / "tokenizer")
    assert main([f"--checkpoint={tmp_path}", "--prompt=<eos>h"]) == 0  # a run's folder: its last stage with weights
    assert prompts[-1] == prompts[0]


def test_every_stop_token_ends_an_answer_and_none_is_shown(checkpoint, tmp_path, monkeypatch, capsys):
    """Also an ordinary token, where generation_config.json makes it one."""
    folder, plain = make_tokenizer(tmp_path / "plain", R1, ()), load_tokenizer(tmp_path / "plain")
    dot, words = plain.encode(".")[0], plain.encode("fox")
    (tmp_path / "plain" / "generation_config.json").write_text(json.dumps({"eos_token_id": [plain.eos_id, dot]}))

    def fake_stream(model, variables, prompt_ids, rng, sampling):
        assert sampling.stop_ids == (plain.eos_id, dot)
        return iter([words, [dot]])

    monkeypatch.setattr("deepseek_jax.generation.__main__.stream", fake_stream)
    monkeypatch.setattr("deepseek_jax.generation.__main__.check_vocabulary", lambda tokenizer, size: None)
    assert main([f"--checkpoint={checkpoint[0]}", f"--tokenizer={folder}", "--prompt=a"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "fox\n" and "stopped after" not in captured.err


@pytest.mark.parametrize(
    "ids", [[BYTES.eos_id], [10, 32, BYTES.eos_id], [BYTES.pad_id] * 3], ids=["at once", "blanks", "nothing to show"]
)
def test_an_answer_without_text_is_said(checkpoint, ids, monkeypatch, capsys):
    monkeypatch.setattr("deepseek_jax.generation.__main__.stream", lambda *_: iter([ids]))
    assert main([f"--checkpoint={checkpoint[0]}", "--prompt=a"]) == 1
    assert "no text came" in capsys.readouterr().err
    asked = iter(["one", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    assert main([f"--checkpoint={checkpoint[0]}", "--interactive"]) == 0 and "no text came" in capsys.readouterr().err


def test_numbers_that_are_not_finite_end_the_program(checkpoint, tmp_path, monkeypatch, capsys):
    folder, case = checkpoint
    spoiled = jax.tree.map(lambda x: x * jnp.nan, case.variables)
    monkeypatch.setattr("deepseek_jax.generation.__main__.load_variables", lambda path: (case.model.config, spoiled))
    for flags in (["--prompt=a"], ["--prompt=a", "--temperature=0"], ["--interactive"]):
        monkeypatch.setattr("builtins.input", lambda prompt: "hi")
        assert main([f"--checkpoint={folder}", "--max_new_tokens=20", *flags]) == 1
        captured = capsys.readouterr()
        assert captured.out == "\n" and captured.err.startswith(
            "error: the network's numbers are not finite (NaN or infinity) at token 1"
        )


def test_stream_refuses_ids_outside_the_vocabulary(gqa):
    for token in (-1, 40):
        with pytest.raises(DataError, match=f"has token {token} in slot 1: .* 0 to 39"):
            next(stream(gqa.model, gqa.variables, [5, token], jax.random.key(0), SAMPLING))


def test_a_hugging_face_folder_is_read_directly(mla, tmp_path, monkeypatch, capsys):
    export_folder(MLA, mla.variables, tmp_path / "hf", dtype="float32")
    with pytest.raises(DataError, match="no tokenizer.json.*--tokenizer"):
        main([f"--checkpoint={tmp_path / 'hf'}", "--prompt=a"])
    with pytest.raises(ConfigError, match="272 ids but the model's vocab_size is 40"):
        main([f"--checkpoint={tmp_path / 'hf'}", "--prompt=a", "--tokenizer=byte"])

    def fake_stream(model, variables, prompt_ids, rng, sampling):
        assert model.config.attention == MLA.attention and prompt_ids == [BYTES.bos_id, ord("a")]
        jax.tree.map(np.testing.assert_array_equal, variables, mla.variables)
        return iter([[104], [105, BYTES.eos_id]])

    monkeypatch.setattr("deepseek_jax.generation.__main__.stream", fake_stream)
    monkeypatch.setattr("deepseek_jax.generation.__main__.check_vocabulary", lambda tokenizer, size: None)
    main([f"--checkpoint={tmp_path / 'hf'}", "--prompt=a", "--tokenizer=byte"])
    assert capsys.readouterr().out == "hi\n"
