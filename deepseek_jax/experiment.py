"""An experiment file as an object: read, overridden from the command line, checked as a whole before anything runs.

An experiment file has one function, `get_config()`, that returns a ConfigDict:

    model      fields of ModelConfig
    runtime    fields of RuntimeConfig: recomputation, chunks, unrolling; they change speed and memory alone
    precision  policy name ("float32", "bfloat16", "fp8_deepseek"), or {"name": …, fields that differ from it}
    tokenizer  "byte", a tokenizer.json or the folder of a checkpoint
    task       {"name": …, fields of that task}, for stages that need one
    stages     names of the stages in order; each is a section of its own, {"kind": …, fields of that stage}
    mesh       sizes of mesh axes, {"fsdp": -1} (see `parallel.mesh.MeshConfig`); empty for one device
    seed       seed of weights, data order and sampling

A name in it is one of ours, or your own as package.module:attribute (see `registry`): a module beside the file, in the
folder above it, or on PYTHONPATH.
"""

import copy
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from deepseek_jax import cli
from deepseek_jax.config_file import any_names_and_values, call
from deepseek_jax.data.tokenizers import check_vocabulary, load_tokenizer
from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.fields import convert, inside, is_mapping
from deepseek_jax.json_io import to_json
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.overrides import override, plain, split
from deepseek_jax.parallel.mesh import MeshConfig, build_mesh, resolve
from deepseek_jax.parallel.rules import build_rules, check_divisible
from deepseek_jax.parallel.sharding import MeshOps
from deepseek_jax.precision import get_precision
from deepseek_jax.rl.tasks import build_task
from deepseek_jax.stages import Experiment, find_kind

FIELDS = ("model", "runtime", "precision", "tokenizer", "task", "stages", "mesh", "seed")


def read_flags(argv: Sequence[str]) -> tuple[ConfigDict, str, Path, bool]:
    """-> (config with overrides applied, experiment name, workdir, dry). Raises ConfigError for what can't be read.

    Any field can be overridden, whether the file mentions it or not; whether it exists is checked where it is used.
    """
    overrides, rest = split(argv)
    parser = cli.parser("deepseek_jax", "Runs an experiment's stages in order.")
    parser.add_argument(
        "--config", action="append", default=[], help="an experiment file; --config.field=value overrides"
    )
    parser.add_argument("--workdir", help="where results go (runs/<name of the experiment file> without it)")
    parser.add_argument(
        "--dry", action="store_true", help="check everything and print the plan; allocate and run nothing"
    )
    flags = parser.parse_args(rest)
    if len(flags.config) > 1:
        raise ConfigError(f"--config is given twice, {' and '.join(flags.config)}: one run is one experiment")
    if not flags.config or not flags.config[0]:
        here = ", ".join(sorted(map(str, Path("experiments").glob("*.py"))))
        raise ConfigError(f"no experiment given: pass --config=FILE. Here: {here or 'no experiments'}")
    name = Path(flags.config[0]).stem
    return read_config(flags.config[0], overrides), name, Path(flags.workdir or os.path.join("runs", name)), flags.dry


def read_config(path: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """The config that get_config() of a file returns, with fields set by (path, text) pairs. Raises ConfigError for a
    file that can't be read."""
    made, where = call(path, "get_config")
    if not is_mapping(made):
        raise ConfigError(
            f"{where}: get_config() returns {type(made).__name__}, not a ConfigDict of {', '.join(FIELDS)} and stages"
        )
    with any_names_and_values():
        config = copy.deepcopy(made) if isinstance(made, ConfigDict) else ConfigDict(plain(made))
        for field, text in overrides:
            override(config, field, text)
    return config


def build_experiment(
    config: ConfigDict,
    name: str,
    workdir: Path,
    devices: Sequence[jax.Device] | None = None,
    elsewhere: int | None = None,
) -> Experiment:
    """Checks everything that the stages share. Raises ConfigError with what to change.

    `devices` make up the mesh (default: all there are). For a machine that is not here say how many devices it has,
    `elsewhere`, or 0 where that is not known: the mesh is checked, and the experiment is one for a single device.
    """
    fields = plain(config)
    for field in ("model", "stages"):
        if field not in fields:
            raise ConfigError(f"missing field config.{field}")
    stages = _stage_names(fields["stages"])
    for field in fields:
        # left out of `stages`, kept in the file
        unused_stage = isinstance(fields[field], dict) and "kind" in fields[field]
        if field not in FIELDS and field not in stages and not unused_stage:
            raise ConfigError(f"unknown field config.{field}: {nearest(field, (*FIELDS, *stages))}")
    for stage in stages:
        if not isinstance(fields.get(stage), dict) or "kind" not in fields[stage]:
            known = [field for field, value in fields.items() if isinstance(value, dict) and "kind" in value]
            raise ConfigError(
                f"config.stages lists {stage!r}, but config.{stage} has no 'kind': {nearest(stage, known)}"
            )
    tokenizer = load_tokenizer(convert(fields.get("tokenizer", "byte"), str, "config.tokenizer"))
    model_config = ModelConfig.from_dict(fields["model"])
    check_vocabulary(tokenizer, model_config.vocab_size)
    return Experiment(
        name=name,
        model=Transformer(model_config, build_ops(fields, model_config, stages, devices, elsewhere)),
        tokenizer=tokenizer,
        task=build_task(fields["task"]) if fields.get("task") else None,
        sections={stage: fields[stage] for stage in stages},
        seed=_seed(fields.get("seed", 0)),
        workdir=workdir,
        config=json.loads(to_json(fields)),  # tuples as lists, as they come back from a file
    )


def _stage_names(names: Any) -> tuple[str, ...]:
    names = convert(names, tuple[str, ...], "config.stages")
    if not names:
        raise ConfigError("config.stages is empty: name at least one stage")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ConfigError(
                f"config.stages names {name!r}: a stage has a folder of that name, so letters, digits, '_' and '-'"
            )
        if names.count(name) > 1:
            raise ConfigError(f"config.stages names {name!r} twice: every stage has a section and a folder of its own")
    return names


def _seed(value: Any) -> int:
    seed = convert(value, int, "config.seed")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"config.seed={seed}: from 0 to 2**32 - 1")
    return seed


def build_ops(
    fields: Mapping[str, Any],
    model: ModelConfig,
    stages: Sequence[str],
    devices: Sequence[jax.Device] | None,
    elsewhere: int | None = None,
) -> Ops:
    """The number format of `config.precision` on the mesh of `config.mesh`, computed as `config.runtime` says. Raises
    ConfigError if the mesh does not divide the network or a stage's batches."""
    precision = get_precision(fields.get("precision", "float32"))
    runtime = RuntimeConfig.from_dict(fields.get("runtime") or {})
    if not fields.get("mesh"):
        if devices is None and elsewhere is None and jax.process_count() > 1:
            raise ConfigError(
                f"{jax.process_count()} processes and no mesh: say how they share the work, for one "
                f"config.mesh={{'fsdp': -1}}"
            )
        return Ops(precision, runtime)
    config = MeshConfig.from_dict(fields["mesh"])
    rules = build_rules(config.rules, model.attention.sharding_rules)
    if elsewhere is not None:
        if elsewhere or -1 not in config.sizes.values():
            mesh_sizes(config, fields, model, stages, elsewhere or math.prod(config.sizes.values()))
        return Ops(precision, runtime)
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, fields, model, stages, len(devices))
    mesh = build_mesh(sizes, dict(config.dcn), devices)
    return MeshOps(precision, runtime, mesh=mesh, rules=rules, dispatch=config.dispatch)


def mesh_sizes(
    config: MeshConfig, fields: Mapping[str, Any], model: ModelConfig, stages: Sequence[str], num_devices: int
) -> dict[str, int]:
    """The mesh's sizes on `num_devices`, wherever these are. Raises ConfigError if the network or a stage's batches
    don't fit it."""
    sequences, lengths = [], []
    for stage in stages:
        kind = find_kind(stage, fields[stage]["kind"])
        with inside(f"config.{stage}"):
            batches = kind.batches(stage, {name: value for name, value in fields[stage].items() if name != "kind"})
        sequences += batches.sequences
        lengths += batches.lengths
    check = functools.partial(check_divisible, config=config, model=model, sequences=sequences, lengths=lengths)
    return resolve(config, num_devices, check)
