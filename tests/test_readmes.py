"""Every command and every code block of the README files is run, on networks of a few thousand weights, in the order of
the page.

Pre-training, sweeps and compilations that take minutes are run up to their first step: `--dry`, `--plan`, and for the
dry run of a published network the check that its figures are among those that `pytest -m big_dry_run` compiles again.
"""

import ast
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from readme_blocks import READMES, ROOT, Block, Command, blocks, docstring_commands, overrides, readme_commands
from test_experiment import SMALL

from deepseek_jax.experiment import build_experiment, read_flags
from deepseek_jax.interop import export_folder
from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.parallel.mesh import MeshConfig, resolve
from deepseek_jax.stages import build_stages

sys.path.insert(0, str(ROOT / "tests" / "dry_run"))
from dry_run_cases import CASES

LANGUAGES = {"bash", "python", ""}  # without a language: what a program printed
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def small_deepseek(vocab_size: int) -> ModelConfig:
    """A network with every piece of V2-Lite and V3 that a checkpoint folder can hold, in widths of whole FP8 blocks."""
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=128, num_layers=2, intermediate_size=128, first_k_dense=1, init_std=0.1,
        attention=MLAConfig(num_heads=2, q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64,
        v_head_dim=64),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=128, num_shared_experts=1),
    )  # fmt: skip


def small_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with DeepSeek's control tokens and a chat template, as a released folder has them."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(["the quick brown fox"] * 4, trainer)
    made.save(str(folder / "tokenizer.json"))
    template = (
        "{{bos_token}}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{m.content}}{% else %}"
        "<｜Assistant｜>{{m.content}}{{eos_token}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    )
    settings = {"bos_token": special[0], "eos_token": special[1], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the pages take it for granted: the checkout's files, a trained run, and two released checkpoints."""
    root = tmp_path_factory.mktemp("reader")
    for name in ("deepseek_jax", "kernels_pallas", "tests"):
        (root / name).symlink_to(ROOT / name)
    (root / "my_module.py").write_text(
        "def my_reward(prompt, completion, answer):\n    return float(completion == answer)\n", encoding="utf-8"
    )
    shutil.copytree(ROOT / "experiments", root / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    for block in python_blocks():
        if "def get_config" in block.text:  # `mine.py` is what the page calls it
            (root / "experiments" / "mine.py").write_text(block.text, encoding="utf-8")
        if "def get_sweep" in block.text:
            (root / "experiments" / "sweeps" / "mine.py").write_text(block.text, encoding="utf-8")
    before = os.getcwd()
    os.chdir(root)
    os.environ["TFDS_DATA_DIR"] = str(tmp_path_factory.getbasetemp() / "tfds")
    sys.path.insert(0, str(root))
    try:
        _run_module("deepseek_jax", ["--config=experiments/r1_tiny.py", *SMALL, "--config.stages=('grpo',)"])
        for name, dtype in (("DeepSeek-V2-Lite", "bfloat16"), ("DeepSeek-V3", "fp8")):
            network = Transformer(small_deepseek(320))
            export_folder(
                network.config, jax.device_get(init_variables(network, jax.random.key(0))), root / name, dtype
            )
            small_tokenizer(root / name)
        yield root
    finally:
        os.chdir(before)
        sys.path.remove(str(root))


def python_blocks() -> list[Block]:
    return [block for path in READMES for block in blocks(path) if block.language == "python"]


def _run_module(module: str, argv: list[str]) -> None:
    """`python -m module argv` in this process. A status other than 0, or any error, fails the test."""
    main = importlib.import_module(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module).main
    assert not main(argv)


def _packages(command: Command) -> None:
    """`pip install`: the extras exist. A test does not install; the CI script runs the page's own two commands."""
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(command.argv)):
        for extra in extras.split(","):
            assert f'"{extra}":' in SETUP, f"{command}: setup.py has no extra {extra!r}"


def _tests(command: Command) -> None:
    """`pytest`: the folders and markers exist."""
    words = command.argv[1:]
    for word in words:
        if word.startswith("tests"):
            assert (ROOT / word).exists(), f"{command}: {word} does not exist"
    for marker in [words[i + 1] for i, word in enumerate(words) if word == "-m"]:
        assert f'"{marker}' in PYPROJECT, f"{command}: pyproject.toml has no marker {marker!r}"


def _benchmark(command: Command) -> None:
    """`python tests/benchmarks/x.py`: starts, and knows the flags of the page."""
    script, *flags = command.argv[1:]
    text = (ROOT / script).read_text(encoding="utf-8") + (ROOT / "tests/benchmarks/common.py").read_text(
        encoding="utf-8"
    )
    compile(text, script, "exec")
    for flag in flags:
        assert flag.partition("=")[0].removeprefix("--") in text, f"{command}: {script} has no flag {flag}"


def _dry_run(command: Command, argv: list[str]) -> None:
    """Built for the published network; one of the dry runs that are compiled and compared elsewhere has its file and
    its program."""
    flags = [word for word in argv if word.startswith("--config")]
    wanted = dict(word.removeprefix("--").split("=", 1) for word in argv)
    compiled = [
        case
        for topology, arguments, *options in CASES.values()
        if arguments[0].endswith(wanted["config"])
        and dict(*options).get("program", "train") == wanted.get("program", "train")
        and (topology == wanted["topology"] or "program" in wanted)
        for case in [topology]
    ]
    assert compiled, f"{command}: no test compiles it"
    config, name, *_ = read_flags(flags)
    with config.unlocked():
        config.mesh = {}
    build_stages(build_experiment(config, name, Path("runs") / name))


def _sweep(command: Command, argv: list[str], monkeypatch) -> None:
    """Sweeps: planned and never started; of a ladder only the rungs for this machine, since the others are compiled for
    minutes."""
    if "--sweep=…" in argv:
        argv[argv.index("--sweep=…")] = "--sweep=experiments/sweeps/v3_lr_batch.py"
    if "--results" not in argv and "--plan" not in argv:
        argv.append("--plan")
    if any("v3_ladder" in word for word in argv):
        argv = [word for word in argv if not word.startswith("--only=")] + ["--only=0.2m"]
    _run_module("deepseek_jax.launch", argv)


def run(command: Command, monkeypatch) -> None:
    """Runs one command of a page, shortened where it would train, compile for minutes or install."""
    program, *argv = command.argv
    if program == "pip":
        return _packages(command)
    if program == "pytest":
        return _tests(command)
    assert program == "python", f"{command}: no way to run {program!r}"
    if argv[0] != "-m":
        return _benchmark(command)
    _, module, *argv = argv
    if module == "deepseek_jax":
        return _run_module(module, [*argv, *([] if "--dry" in argv else ["--dry"])])
    if module == "deepseek_jax.dry_run":
        return _dry_run(command, argv)
    if module == "deepseek_jax.launch":
        return _sweep(command, argv, monkeypatch)
    if module == "deepseek_jax.generation":
        monkeypatch.setattr(sys, "stdin", io.StringIO("Why is the sky blue?\n\n"))
        return _run_module(module, [*argv, "--max_new_tokens=4"])
    if module == "kernels_pallas.bench":
        assert importlib.import_module("kernels_pallas.bench.__main__").main([*argv, "--small", "--only=quantize_tile"])
        return None
    return _run_module(module, argv)


def test_every_block_is_of_a_kind_that_is_run():
    for path in READMES:
        for block in blocks(path):
            assert block.language in LANGUAGES, f"{block.where}: {block.language!r}"


@pytest.mark.parametrize("page", READMES)
def test_commands_run_as_they_are_printed(page, folder, monkeypatch):
    of_page = [command for command in readme_commands() if command.where.startswith(f"{page}:")]
    assert of_page
    for command in of_page:
        try:
            run(command, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{command}: {type(error).__name__}: {error}") from error


def _statements(block: Block) -> list[str]:
    return [ast.unparse(node) for node in ast.parse(block.text).body]


def _config_statement(statement: str) -> None:
    """`config.x = …` in an experiment file: the experiment is valid with it, on as many devices as the mesh takes."""
    config, name, workdir, _ = read_flags(["--config=experiments/r1_tiny.py"])
    with config.unlocked():
        exec(statement, {"config": config})
    mesh = MeshConfig.from_dict(config.mesh.to_dict())
    fixed = math.prod(size for size in mesh.sizes.values() if size > 0)
    assert math.prod(resolve(mesh, fixed).values()) == fixed
    with config.unlocked():
        config.mesh = {}
    build_stages(build_experiment(config, name, workdir))


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.where)
def test_code_runs_as_it_is_printed(block, folder):
    if "def get_config" in block.text:
        _run_module("deepseek_jax", ["--config=experiments/mine.py", "--dry"])
    elif "def get_sweep" in block.text:
        _run_module("deepseek_jax.launch", ["--sweep=experiments/sweeps/mine.py", "--plan"])
    elif "config." in block.text:
        for statement in _statements(block):
            _config_statement(statement)
    else:
        names = {name: jax.random.normal(jax.random.key(0), (256, 256)) for name in ("x", "a", "b")}
        for statement in _statements(block):
            grouped = "group_sizes" in statement
            w = jax.random.normal(jax.random.key(1), (2, 256, 256) if grouped else (256, 256))
            exec(statement, names | {"w": w, "group_sizes": jnp.array([100, 156])}, names)


def test_overrides_are_valid_as_they_are_printed(folder):
    printed = overrides()
    assert printed
    for where, flags in printed:
        # what the page speaks of
        subject = "deepseek_v3_671b" if where.startswith("deepseek_jax/parallel/") else "r1_tiny"
        try:
            _run_module("deepseek_jax", [f"--config=experiments/{subject}.py", *flags, "--dry"])
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{where}: {flags}: {type(error).__name__}: {error}") from error


def test_commands_in_experiments_run_as_they_are_printed(folder, monkeypatch):
    for command in docstring_commands():
        try:
            run(command, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{command}: {type(error).__name__}: {error}") from error
