"""Checkpoints on disk: written in the background, complete or absent, checked when read back.

A checkpoint is a folder named by its step with three items: `variables` (weights and router biases, all that inference
needs), `training` (the rest of the state) and `meta` (JSON: model configuration, loader state, and the shape, dtype and
checksum of every array). The results of an evaluation are added in metrics.json once they are known. Orbax writes to a
temporary folder and renames it, so that a killed process leaves the earlier checkpoints as they were.

Of several processes each writes and reads its devices' shards, in one folder that all of them see; all call the same
functions and come to the same decisions. Nothing on disk depends on the mesh: any other can read it.
"""

import base64
import dataclasses
import errno
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.identity import decisive
from deepseek_jax.json_io import read_json, to_json
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.parallel.hosts import all_true, from_primary, is_primary, wait_for_all, write_text

METRIC = "bits_per_byte"
METRICS = "metrics.json"  # next to the three items of a checkpoint

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    state: Any
    loader_state: Any
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Keep(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `last` checkpoints and the `best` of lowest rank; `ranks` has those that have one, by step."""

    last: int
    best: int
    ranks: dict[int, float]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        ranked = sorted((step for step in steps if step in self.ranks), key=self.ranks.get)
        kept = {*steps[-self.last :], *ranked[: self.best]}
        return [step in kept for step in steps]


class _Manager(ocp.CheckpointManager):
    """Leaves it to the training loop to ask about preemption, since jax counts how often each process asks."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run of one model: the newest `keep_last`, and the `keep_best` with the lowest `metric`.

    Only a checkpoint with a finite value of that metric, see `note`, can be best.
    """

    def __init__(self, directory, config: ModelConfig, *, keep_last: int = 2, keep_best: int = 1, metric: str = METRIC):
        if keep_last < 1:
            raise CheckpointError(f"keep_last={keep_last}: at least the newest checkpoint has to be kept")
        self.directory = pathlib.Path(directory).absolute()
        self.config = config
        self.metric = metric
        self._remove_unfinished()
        self._ranks = {
            step: rank
            for step in steps_in(self.directory)
            if (rank := _rank(self.directory / str(step), metric)) is not None
        }
        policy = _Keep(keep_last, keep_best, self._ranks)
        self._manager = _Manager(self.directory, options=ocp.CheckpointManagerOptions(preservation_policy=policy))

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state, loader_state: Any = None) -> None:
        """Copies a `TrainState` (or a dataclass that extends it) and returns; a thread writes it.

        `loader_state` is JSON or bytes. Raises CheckpointError if this or the save before it could not be written, for
        example because the disk is full; earlier checkpoints then stay as they were.
        """
        step = int(state.step)
        variables, training = _split(state)
        self.require_space(state)
        meta = {
            "model": self.config.to_dict(),
            "loader": _encode(loader_state),
            "variables": _describe(variables),
            "training": _describe(training),
        }
        items = ocp.args.Composite(
            variables=ocp.args.StandardSave(variables),
            training=ocp.args.StandardSave(training),
            meta=ocp.args.JsonSave(meta),
        )
        self._guard(lambda: self._manager.save(step, args=items))

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the results of an evaluation of `step` to its checkpoint, once that is written: an evaluation that fails
        loses no step.

        With a finite `metric` the checkpoint can be among the best. Raises CheckpointError as `save` does.
        """
        self.wait()
        values = {name: float(value) for name, value in metrics.items()}
        self._guard(lambda: write_text(self.directory / str(step) / METRICS, to_json(values) + "\n"))
        wait_for_all("an evaluation is noted")
        if math.isfinite(values.get(self.metric, math.nan)):
            self._ranks[step] = values[self.metric]

    def rescue(self, state, loader_state: Any = None) -> str:
        """Saves the state that an exception left, if it can, and returns a sentence about it; raises nothing.

        A step that fails may have destroyed its buffers. One of several processes cannot save alone, and cannot know if
        the others have met the exception too.
        """
        if jax.process_count() > 1:
            return f"Nothing more can be saved by one of several processes. {self._safe()}"
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return f"The step that failed has destroyed its state. {self._safe()}"
        try:
            self.save(state, loader_state)
            self.wait()
        except Exception as error:
            return f"What was reached could not be saved: {error}"
        return f"saved step {int(state.step)} in {self.directory}; fix the error below and start again to resume there"

    def wait(self) -> None:
        """Returns when everything is on disk. Raises CheckpointError as `save` does."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def require_space(self, state) -> None:
        """Raises CheckpointError if the disk has no room for a checkpoint of this state, which may be abstract."""
        needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(_split(state)))
        free = int(from_primary(str(shutil.disk_usage(self.directory).free)))
        if free < needed:
            raise CheckpointError(
                f"a checkpoint takes {needed / 1e9:.3g} GB and the disk of {self.directory} has {free / 1e9:.3g} GB "
                f"left; free some space or choose another workdir. {self._safe()}"
            )

    def restore(self, like, last: int | None = None) -> Restored | None:
        """The newest readable checkpoint, placed like `like`; None if there is none. Of a run that has passed step
        `last`, the checkpoint of `last`.

        `like` is a state of arrays or of jax.ShapeDtypeStruct with shardings; arrays of the checkpoint for fields that
        are None in it are dropped. A damaged checkpoint is reported, set aside as `<step>.damaged`, and the one before
        it is used. Raises CheckpointError for a checkpoint of another model or optimizer, naming the first difference,
        if every checkpoint is damaged (training anew over them is the caller's decision), and if the checkpoint of
        `last` is missing.
        """
        steps, damaged = json.loads(from_primary(json.dumps(self.steps()))), []
        if last is not None and steps and steps[-1] > last:
            if last not in steps:
                raise CheckpointError(
                    f"{self.directory} has gone beyond step {last}, and has checkpoints of steps {steps} alone: ask "
                    "for as many steps as one of them or more"
                )
            steps = [last]
        for step in reversed(steps):
            restored = self._read(step, like)
            if restored is None:
                damaged.append(step)
                continue
            for bad in damaged:
                self._set_aside(bad)
            return restored
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (steps {damaged}); move the folder away to start anew"
            )
        return None

    def _read(self, step: int, like) -> Restored | None:
        """One checkpoint; None if it is damaged for any of the processes."""
        where = self.directory / str(step)
        variables, training = _split(like)

        def read():
            meta = _read_meta(where)
            differs = _first_difference(decisive(_model_of(meta, where)), decisive(self.config), "model")
            if differs:
                raise CheckpointError(
                    f"{where} is a checkpoint of another model: {differs}; use another workdir or that model"
                )
            parts = {"variables": variables, "training": training | _unwanted(meta["training"], like)}
            for part, tree in parts.items():
                _refuse_other_leaves(meta[part], tree, where)
            return meta, {part: _read_part(where / part, tree) for part, tree in parts.items()}

        read_here, damage = _attempt(read)
        if not all_true(damage is None):
            log.warning(
                "checkpoint %s is damaged and will not be used: %s", where, damage or "another process cannot read it"
            )
            return None
        meta, parts = read_here
        damage = _changed_bytes(meta, parts)
        if damage is not None:
            log.warning("checkpoint %s is damaged and will not be used: %s", where, damage)
            return None
        fields = {"router_bias": {}} | parts["variables"] | {name: parts["training"][name] for name in training}
        return Restored(like.replace(**fields), _decode(meta["loader"]), _read_metrics(where))

    def _set_aside(self, step: int) -> None:
        if is_primary():
            (self.directory / str(step)).rename(self.directory / f"{step}.damaged")
        wait_for_all("a damaged checkpoint is set aside")
        self._manager.reload()

    def _remove_unfinished(self) -> None:
        """Removes the remains of a killed process or a failed write. Orbax would do it in a thread, concurrently with
        the next write."""
        if is_primary():
            for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _guard(self, write) -> None:
        try:
            write()
        except Exception as error:  # any error of the background thread
            self._remove_unfinished()
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            cause = "the disk is full" if full else _first_line(error)
            raise CheckpointError(
                f"could not write a checkpoint to {self.directory}: {cause}; free some space or choose another "
                f"workdir. {self._safe()}"
            ) from error

    def _safe(self) -> str:
        steps = self.steps()
        return (
            f"Checkpoints of steps {steps} are untouched; start again to resume there."
            if steps
            else "Nothing was saved yet."
        )


def load_variables(
    path, best: bool = False, shardings: Callable[[ModelConfig], Any] | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, {"params", "router_bias"}) of a checkpoint, without its optimizer state: for inference and later stages.

    `shardings(config)` is a tree of shardings like the variables, and each device gets its shard; without it, or where
    it gives None, the first device gets all.

    `path` is anything that `resolve_checkpoint` understands. Raises CheckpointError if there is none or it is damaged.
    """
    where = resolve_checkpoint(path, best)
    try:
        meta = _read_meta(where)
    except Exception as error:
        raise CheckpointError(f"checkpoint {where} is damaged: {_first_line(error)}; use an earlier one") from error
    config = _model_of(meta, where)
    places = _leaves(shardings(config)) if shardings is not None else {}
    abstract = {
        name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=places.get(name))
        for name, leaf in meta["variables"].items()
    }
    variables, damage = _attempt(lambda: _read_part(where / "variables", _nested(abstract)))
    if not all_true(damage is None):
        damage = damage or "another process cannot read it"
    else:
        damage = _changed_bytes(meta, {"variables": variables})
    if damage is not None:
        raise CheckpointError(f"checkpoint {where} is damaged: {damage}; use an earlier one")
    return config, {"router_bias": {}} | variables


def resolve_checkpoint(path, best: bool = False) -> pathlib.Path:
    """The folder of one checkpoint, <stage>/checkpoints/<step>, from any path that leads to it.

    `path` is that folder, the `checkpoints` folder, a stage's folder or a run's. Of a run the last stage that has
    weights is taken, with a printed note; of several checkpoints the newest, or with `best` the one with the lowest
    metric if any has one. Raises CheckpointError if there is none.
    """
    given = path = pathlib.Path(path).absolute()
    if path.name.isdigit() and (path / "meta").is_dir():
        return path
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {given}: the folder does not exist")
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    stages = [] if steps_in(path) else _stages_with_weights(path)
    if stages:
        path = stages[-1] / "checkpoints"
    steps = steps_in(path)
    if not steps:
        raise CheckpointError(
            f"no checkpoint at {given}: give a run's folder, a stage's, its 'checkpoints' folder, or one checkpoint in "
            "it"
        )
    ranks = {step: rank for step in steps if best and (rank := _rank(path / str(step))) is not None}
    step = min(ranks, key=ranks.get) if ranks else steps[-1]
    if stages:
        log.warning("%s: taking the weights of its last stage that has any, %s, step %d", given, stages[-1].name, step)
    return path / str(step)


def steps_in(directory) -> list[int]:
    """The steps that a `checkpoints` folder has complete checkpoints of, oldest first; [] without the folder."""
    directory = pathlib.Path(directory)
    return (
        sorted(int(child.name) for child in directory.iterdir() if child.name.isdigit()) if directory.is_dir() else []
    )


def _stages_with_weights(run: pathlib.Path) -> list[pathlib.Path]:
    """The folders of a run's stages that have checkpoints, in the order in which they ran."""
    try:
        folders = [run / name for name in read_json(run / "config.json", "")["stages"]]
    except (DataError, KeyError, TypeError):  # the folder of something else
        folders = []
    return [folder for folder in folders if steps_in(folder / "checkpoints")]


def saved_steps(workdir) -> str:
    """A sentence about the checkpoints from which the stages of a run can resume."""
    steps = {folder.parent.name: steps_in(folder) for folder in sorted(pathlib.Path(workdir).glob("*/checkpoints"))}
    found = [f"{stage} {', '.join(map(str, numbers))}" for stage, numbers in steps.items() if numbers]
    return (
        f"Checkpoints in {workdir} are complete and safe: steps {'; '.join(found)}."
        if found
        else f"Nothing was saved in {workdir} yet."
    )


def _split(state) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two array items of a checkpoint. An empty router bias and a field that is None are left out, since they store
    nothing."""
    fields = {name: value for name, value in vars(state).items() if value is not None}
    variables = {name: fields.pop(name) for name in ("params", "router_bias")}
    return {name: tree for name, tree in variables.items() if jax.tree.leaves(tree)}, fields


def _unwanted(described: Mapping[str, Mapping[str, Any]], like) -> dict[str, Any]:
    """Abstract arrays that a checkpoint has for fields that are None in the state `like`. They are read with the rest,
    since Orbax reads all or nothing, and dropped. Reinforcement learning without a KL term once kept a reference
    policy."""
    absent = [name for name, value in vars(like).items() if value is None]
    leaves = {path: leaf for path, leaf in described.items() if path.split("/")[0] in absent}
    return _nested({path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for path, leaf in leaves.items()})


def _read_meta(checkpoint: pathlib.Path) -> dict[str, Any]:
    return json.loads((checkpoint / "meta" / "metadata").read_text(encoding="utf-8"))


def _model_of(meta: Mapping[str, Any], where: pathlib.Path) -> ModelConfig:
    """The model of a checkpoint. Raises CheckpointError for one that this program cannot read, because another version
    wrote it, or because its attention is a class that is not on PYTHONPATH."""
    try:
        return ModelConfig.from_saved(meta["model"])
    except ConfigError as error:
        raise CheckpointError(f"the model of checkpoint {where} cannot be read here: {error}") from error


def _read_metrics(checkpoint: pathlib.Path) -> dict[str, float]:
    """The results of a checkpoint's evaluations; {} if there are none or they cannot be read. null stands for numbers
    that are not finite."""
    path = checkpoint / METRICS
    try:
        # older checkpoints have them in `meta`
        values = read_json(path, "") if path.exists() else _read_meta(checkpoint).get("metrics", {})
        return {name: math.nan if value is None else float(value) for name, value in values.items()}
    except (OSError, TypeError, ValueError):
        return {}


def _rank(checkpoint: pathlib.Path, metric: str = METRIC) -> float | None:
    """The metric by which a checkpoint is compared with others; None where there is none, or it is not a finite
    number."""
    rank = _read_metrics(checkpoint).get(metric, math.nan)
    return rank if math.isfinite(rank) else None


def _attempt(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, the damage). A CheckpointError is not damage: it is passed on."""
    try:
        return read(), None
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        return None, _first_line(error)


def _read_part(folder: pathlib.Path, like) -> Any:
    """Reads one tree of arrays, placed like `like`; each process reads its shards and waits for no other. Raises
    Orbax's errors."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=str(here)
    )
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as reader:
        return reader.restore(folder, jax.tree.map(_placed, like))


def _placed(leaf) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _changed_bytes(meta: Mapping[str, Any], parts: Mapping[str, Any]) -> str | None:
    """The first array whose bytes are not those that were saved, on any device; the same answer on every process."""
    for part, tree in parts.items():
        for name, checksum in _checksums(tree).items():
            if checksum != meta[part][name].get("checksum", checksum):  # checkpoints of old have another kind
                return f"the bytes of {name} are not those that were saved"
    return None


def _leaves(tree) -> dict[str, Any]:
    """Leaves by path, "params/embed/embedding"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _describe(tree) -> dict[str, dict[str, Any]]:
    checksums = _checksums(tree)
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": checksums[name]}
        for name, leaf in _leaves(tree).items()
    }


def _checksums(tree) -> dict[str, int]:
    """A checksum of each array, computed on its own devices. TensorStore does not notice a flipped bit."""
    return {
        name: int(checksum)
        for name, checksum in jax.device_get({name: _checksum(leaf) for name, leaf in _leaves(tree).items()}).items()
    }


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum modulo 2³² of an array's words, each times an odd number that depends on its index. uint32 [].

    A flipped bit always changes it, words that change places nearly always. Unlike a CRC it is the same however the
    array is divided among devices.
    """
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype != jnp.bool:
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    weight = jnp.uint32(1)
    for axis in range(x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.uint32(0x9E3779B9 * (axis + 1) % 2**32)
        mixed = (place ^ (place >> 16)) * jnp.uint32(0x85EBCA6B)
        weight *= (mixed ^ (mixed >> 13)) | 1
    return jnp.sum(x.astype(jnp.uint32) * weight, dtype=jnp.uint32)


def _refuse_other_leaves(described: Mapping[str, Mapping[str, Any]], tree, where: pathlib.Path) -> None:
    """Raises CheckpointError naming the first array that is missing, unexpected, or of another shape or dtype."""
    wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _leaves(tree).items()}
    found = {name: f"{leaf['dtype']}{list(leaf['shape'])}" for name, leaf in described.items()}
    differs = _first_difference(found, wanted, "state")
    if differs:
        raise CheckpointError(
            f"{where} does not fit this model and optimizer: {differs}; use another workdir or those settings"
        )


def _first_difference(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> str | None:
    for name in (*wanted, *(name for name in saved if name not in wanted)):
        if name not in saved:
            return f"{path}.{name} is {wanted[name]!r} here and absent from the checkpoint"
        if name not in wanted:
            return f"{path}.{name} is {saved[name]!r} in the checkpoint and absent here"
        if saved[name] != wanted[name]:
            return f"{path}.{name} is {saved[name]!r} in the checkpoint and {wanted[name]!r} here"
    return None


def _encode(loader_state: Any) -> Any:
    """JSON as it is; bytes, which some loaders give, as base64."""
    return {"base64": base64.b64encode(loader_state).decode()} if isinstance(loader_state, bytes) else loader_state


def _decode(stored: Any) -> Any:
    return base64.b64decode(stored["base64"]) if isinstance(stored, dict) and set(stored) == {"base64"} else stored


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
