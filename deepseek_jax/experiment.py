"""An experiment file as an object: read, overridden from the command line, checked as a whole before anything runs.

An experiment file has one function, `get_config()`, that returns a ConfigDict:

    model      fields of ModelConfig
    precision  recipe name ("float32", "bfloat16", "fp8_deepseek"), or {"name": …, fields that differ from it}
    tokenizer  "byte", a tokenizer.json or the folder of a checkpoint
    task       {"name": …, fields of that task}, for stages that need one
    stages     names of the stages in order; each is a section of its own, {"kind": …, fields of that stage}
    mesh       sizes of mesh axes, {"fsdp": -1} (see `parallel.mesh.MeshConfig`); empty for one device
    seed       seed of weights, data order and sampling
"""

import ast
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from deepseek_jax.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.json_io import to_json
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.placement import Placement
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.fit import fits
from deepseek_jax.parallel.hosts import from_primary, write_text
from deepseek_jax.parallel.mesh import MeshConfig, build_mesh, resolve
from deepseek_jax.parallel.placement import MeshPlacement
from deepseek_jax.parallel.rules import build_rules
from deepseek_jax.precision import recipe
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.tasks import Task, build_task
from deepseek_jax.training.checkpoints import COMPUTED_AS

FIELDS = ("model", "precision", "tokenizer", "task", "stages", "mesh", "seed")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every stage of a run shares. `sections` has the stages' own settings, in order."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    task: Task | None
    sections: dict[str, dict[str, Any]]
    seed: int
    workdir: Path
    config: dict[str, Any]


def read_flags(argv: Sequence[str]) -> tuple[ConfigDict, str, Path, bool]:
    """-> (config with overrides applied, experiment name, workdir, dry). Raises ConfigError for what can't be read.

    A field that the file leaves at its default, or at None, can be overridden too; whether it exists is checked where it is used.
    """
    path = next((argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")), None)
    if path is None:
        here = ", ".join(sorted(map(str, Path("experiments").glob("*.py"))))
        raise ConfigError(f"no experiment given: pass --config=FILE. Here: {here or 'no experiments'}")
    if not Path(path).is_file():
        raise ConfigError(f"no such file: {path}")
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # an experiment may import its neighbours and change a few lines
    bare = _parse([f"--config={path}"]).config
    added = [a for a in argv if a.startswith("--config.") and not _has(bare, a.partition("=")[0].removeprefix("--config.").split("."))]
    values = _parse([argument for argument in argv if argument not in added])
    with values.config.unlocked():
        for argument in added:
            _add(values.config, argument)
    name = Path(path).stem
    return values.config, name, Path(values.workdir or os.path.join("runs", name)), values.dry


def _parse(argv: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    arguments = ["deepseek_jax", *argv]
    config_flags.DEFINE_config_file("config", None, "Experiment file.", flag_values=values, sys_argv=arguments)
    flags.DEFINE_string("workdir", None, "Where results go (default: runs/<name of the experiment file>).", flag_values=values)
    flags.DEFINE_bool("dry", False, "Check everything and print the plan; allocate and run nothing.", flag_values=values)
    try:
        values(arguments)
        if not isinstance(values.config, ConfigDict):
            values.config["model"]  # what stands in for a file that could not be loaded raises the reason when it is used
    except (flags.Error, AttributeError, OSError, TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return values


def _has(node: Any, path: Sequence[str]) -> bool:
    for part in path:
        if not isinstance(node, ConfigDict) or part not in node:
            return False
        node = node[part]
    return node is not None  # a None has no type for a flag to be read as


def _add(config: ConfigDict, argument: str) -> None:
    """Sets a field that the file doesn't mention or has as None: `--config.grpo.eval.problems=64`. The value is a Python literal, or else text."""
    path, _, text = argument.removeprefix("--config.").partition("=")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    *parents, last = path.split(".")
    node = config
    for part in parents:
        if part not in node:
            node[part] = ConfigDict()
        node = node[part]
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"{argument}: {part!r} is {node!r}, which has no fields")
    node[last] = value


def build_experiment(config: ConfigDict, name: str, workdir: Path, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Checks everything that the stages share. Raises ConfigError with what to change.

    `devices` make up the mesh (default: all there are).
    """
    fields = config.to_dict()
    stages = tuple(fields.get("stages", ()))
    for field in fields:
        unused_stage = isinstance(fields[field], dict) and "kind" in fields[field]  # left out of `stages`, kept in the file
        if field not in FIELDS and field not in stages and not unused_stage:
            raise ConfigError(f"unknown field config.{field}: {nearest(field, (*FIELDS, *stages))}")
    for field in ("model", "stages"):
        if field not in fields:
            raise ConfigError(f"missing field config.{field}")
    for stage in stages:
        if not isinstance(fields.get(stage), dict) or "kind" not in fields[stage]:
            known = [field for field, value in fields.items() if isinstance(value, dict) and "kind" in value]
            raise ConfigError(f"config.stages names {stage!r}, which is no section with a 'kind': {nearest(stage, known)}")
    tokenizer = load_tokenizer(fields.get("tokenizer", "byte"))
    model_config = ModelConfig.from_dict(fields["model"])
    check_vocabulary(tokenizer, model_config.vocab_size)
    return Experiment(
        name=name,
        model=Transformer(model_config, recipe(fields.get("precision", "float32")), place(fields, model_config, stages, devices)),
        tokenizer=tokenizer,
        task=build_task(fields["task"]) if fields.get("task") else None,
        sections={stage: fields[stage] for stage in stages},
        seed=fields.get("seed", 0),
        workdir=workdir,
        config=json.loads(to_json(fields)),  # tuples as lists, as they come back from a file
    )


def place(fields: Mapping[str, Any], model: ModelConfig, stages: Sequence[str], devices: Sequence[jax.Device] | None) -> Placement:
    """The placement on the mesh that `config.mesh` describes. Raises ConfigError if the network or a stage's batches don't fit it."""
    if not fields.get("mesh"):
        if devices is None and jax.process_count() > 1:
            raise ConfigError(f"{jax.process_count()} processes and no mesh: say how they share the work, for one config.mesh={{'fsdp': -1}}")
        return Placement()
    config = MeshConfig.from_dict(fields["mesh"])
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, fields, model, stages, len(devices))
    return MeshPlacement(build_mesh(sizes, dict(config.dcn), devices), build_rules(config.rules), config.dispatch)


def mesh_sizes(config: MeshConfig, fields: Mapping[str, Any], model: ModelConfig, stages: Sequence[str], num_devices: int) -> dict[str, int]:
    """The mesh's sizes on `num_devices`, wherever these are. Raises ConfigError if the network or a stage's batches don't fit it."""
    rows, lengths = {}, {}
    for stage in stages:
        train = fields[stage].get("train", {})
        if "batch_size" in fields[stage] and train:
            field = "train.microbatch" if train.get("microbatch") else "batch_size"
            rows[f"{stage}.{field}"] = train.get("microbatch") or fields[stage]["batch_size"]
            lengths[f"{stage}.seq_len"] = fields[stage].get("seq_len", 1)
        if fields[stage].get("grpo"):
            rows[f"{stage}.grpo's prompts_per_rollout × group_size / num_minibatches"] = GRPOConfig.from_dict(fields[stage]["grpo"]).minibatch_size
    return resolve(config, num_devices, fits(config, model, rows, lengths))


def claim_workdir(experiment: Experiment) -> None:
    """Notes the configuration in the workdir; a run that is started again, and every process of it, has to be the same experiment.

    On which mesh it runs, and how the network is computed, may change: checkpoints don't depend on it. Raises ConfigError naming
    the first fields that differ.
    """
    path = experiment.workdir / "config.json"
    text = from_primary(path.read_text(encoding="utf-8") if path.exists() else to_json(experiment.config, indent=1) + "\n")
    try:
        before = _flat(json.loads(text))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); pass another --workdir, or restore it") from None
    now = _flat(experiment.config)
    free = {f"config.model.{field}" for field in COMPUTED_AS}
    fields = sorted(field for field in {*before, *now} - free if field.split(".")[1] != "mesh" and before.get(field) != now.get(field))
    changed = [f"{field} ({before.get(field)!r} -> {now.get(field)!r})" for field in fields]
    if changed:
        raise ConfigError(
            f"{experiment.workdir} holds a run of another configuration: {', '.join(changed[:3])}"
            f"{' and more' if len(changed) > 3 else ''}. Pass another --workdir, or the settings it was started with"
        )
    if not path.exists():
        write_text(path, text)


def _flat(node: Any, path: str = "config") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        return {key: value for name, child in node.items() for key, value in _flat(child, f"{path}.{name}").items()}
    return {path: node}
