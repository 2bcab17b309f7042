"""Checks a Hugging Face folder against the network that its config.json describes.

`open_folder` reads config.json, the index and the safetensors headers; `usable_folder` also compares the tensors that
are stored twice.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.errors import CheckpointError
from deepseek_jax.interop.fused_experts import separate_experts
from deepseek_jax.interop.hf_config import config_from_hf, read_config, scale_format
from deepseek_jax.interop.hf_fields import foreign
from deepseek_jax.interop.safetensors_io import DTYPES, StoredTensor, read_folder
from deepseek_jax.interop.slices import fill
from deepseek_jax.interop.tensors import TensorSpec, tensor_table
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.precision import FP8Precision, Precision

SHOWN = 10  # problems in one message
_ROWS = 1024  # of a matrix, compared at a time
_OF_MTP = re.compile(r"\.(enorm|hnorm|eh_proj|shared_head)\.")  # what the layers of the main model do not have
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checked folder.

    `table` lists the tensors that `config` needs, `stored` those that the files hold. `problems` are sentences about
    where they disagree, `notes` about what was ignored.
    """

    path: Path
    hf: dict[str, Any]
    config: ModelConfig
    table: tuple[TensorSpec, ...]
    stored: dict[str, StoredTensor]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def raise_problems(self) -> None:
        """Raises CheckpointError with the first problems if there are any."""
        if self.problems:
            raise CheckpointError(f"{self.path} can't be imported:\n  {shown(self.problems)}")


def shown(lines: Sequence[str]) -> str:
    """The first of many lines, and the number of the others."""
    more = len(lines) - SHOWN
    return "\n  ".join([*lines[:SHOWN], *([f"and {more} more"] if more > 0 else [])])


def precision_for(path: str | Path, precision: Precision) -> Precision:
    """The policy `precision`, adjusted to the weights of a Hugging Face folder.

    Where its config.json says scale_fmt="ue8m0" (DeepSeek-V3.1), an FP8 policy's scales are powers of two, those of
    activations too. Raises CheckpointError as `open_folder` does.
    """
    powers_of_two = scale_format(read_config(Path(path)).get("quantization_config")) == "ue8m0"
    return precision.with_powers_of_two() if powers_of_two and isinstance(precision, FP8Precision) else precision


def open_folder(path: str | Path) -> Folder:
    """Compares a folder's headers with its config.json.

    MTP modules that config.json promises and the files do not hold in full, or the other way round, are left out, as
    transformers leaves out all of them, and a note says so. Raises CheckpointError if config.json is missing or
    unsupported or no safetensors can be read; everything else that is wrong is collected in `problems`.
    """
    path = Path(path)
    hf = read_config(path)
    config = config_from_hf(hf)
    stored, problems = read_folder(path)
    stored, notes = separate_experts(stored), []
    if passed_over := sorted(name for name in hf if foreign(name)):
        notes.append(f"config.json: fields of other software were passed over: {', '.join(passed_over)}")
    if config.tie_embeddings and _HEAD in stored and _EMBEDDING not in stored:
        stored[_EMBEDDING] = stored[_HEAD]
    return _held_against(Folder(path, hf, config, (), stored, tuple(problems), tuple(notes)), config)


def usable_folder(path: str | Path) -> Folder:
    """As `open_folder`, for a folder whose weights are to be read: raises CheckpointError for its problems too.

    Every stored copy of the embedding and the head must equal the original. An MTP module whose copies differ from the
    main model's is left out, since here it shares them. A head that differs from an embedding it is said to be tied to
    is a head of its own, as in transformers. Notes say so.
    """
    folder = open_folder(path)
    folder.raise_problems()
    while (
        spec := next((spec for spec in folder.table if spec.duplicate and _differs(spec, folder)), None)
    ) is not None:
        if spec.name == _HEAD:
            note = f"config.json says tie_word_embeddings=true, but {_HEAD} differs from the embedding: taken as false"
            config = folder.config.replace(tie_embeddings=False)
        else:
            k = _layer(spec.name) - folder.config.num_layers
            note = (
                f"{spec.name} differs from the main model's, which an MTP module shares here: MTP module {k + 1} was "
                "left out"
            )
            config = folder.config.replace(mtp_depth=k)
        folder = _held_against(dataclasses.replace(folder, notes=(*folder.notes, note)), config)
        folder.raise_problems()
    return folder


def _differs(copy: TensorSpec, folder: Folder) -> bool:
    """True if a stored duplicate holds other numbers than the tensor it repeats, compared in the less precise of their
    dtypes."""
    if copy.name not in folder.stored:
        return False
    original = next(spec for spec in folder.table if spec.path == copy.path and not spec.duplicate)
    specs = [dataclasses.replace(spec, transposed=False) for spec in (original, copy)]
    dtypes = [DTYPES[folder.stored[spec.name].dtype] for spec in specs]
    dtype = min(
        (dtype for dtype in dtypes if dtype.itemsize > 1),
        key=lambda dtype: dtype.itemsize,
        default=np.dtype(np.float32),
    )
    for start in range(0, copy.shape[0], _ROWS):
        ranges = (range(start, min(start + _ROWS, copy.shape[0])), range(copy.shape[1]))
        values = np.empty((2, len(ranges[0]), len(ranges[1])), np.float32)
        for spec, target in zip(specs, values, strict=True):
            fill(spec, folder.stored, ranges, target)
        if not np.array_equal(*values.astype(dtype), equal_nan=True):
            return True
    return False


def _held_against(folder: Folder, config: ModelConfig) -> Folder:
    """The folder with its problems and notes if the network is `config`'s."""
    stored, problems, notes = folder.stored, list(folder.problems), list(folder.notes)
    table = tensor_table(config)
    for k in range(config.mtp_depth):
        layer = config.num_layers + k
        wrong = [problem for spec in table if _layer(spec.name) == layer for problem in _tensor_problems(spec, stored)]
        if wrong:
            none = not any(_layer(name) == layer for name in stored)
            if "num_nextn_predict_layers" in folder.hf or not none:
                what = "the files hold none" if none else f"module {k + 1} is not whole ({wrong[0]})"
                notes.append(f"num_nextn_predict_layers={config.mtp_depth} in config.json, {what}: taken as {k}")
            config = config.replace(mtp_depth=k)
            table = tensor_table(config)
            break
    for spec in table:
        problems += _tensor_problems(spec, stored)
    needed = {spec.name for spec in table}
    needed |= {spec.scale_name for spec in table if spec.name in stored and stored[spec.name].dtype == "F8_E4M3"}
    extra = {name for name in stored if name not in needed}
    mtp_layers = {_layer(name) for name in extra if _OF_MTP.search(name)}
    of_mtp = {name for name in extra if _layer(name) in mtp_layers and _layer(name) >= config.num_layers}
    nothing = {name for name in extra - of_mtp if ".rotary_emb." in name or 0 in stored[name].shape}
    if of_mtp:
        notes.append(f"{len(of_mtp)} tensor(s) of MTP modules were left out, such as {min(of_mtp)}")
    if nothing:
        notes.append(
            f"{len(nothing)} tensor(s) that hold nothing or follow from the config were passed over, such as "
            f"{min(nothing)}"
        )
    for name in sorted(extra - of_mtp - nothing):
        tensor = stored[name]
        problems.append(
            f"{name}: expected no such tensor, found {tensor.dtype} {list(tensor.shape)} in {tensor.file.name}"
        )
    return dataclasses.replace(
        folder, config=config, table=table, problems=tuple(problems), notes=tuple(dict.fromkeys(notes))
    )


def _layer(name: str) -> int:
    """The number of the layer, or MTP module after the layers, that a tensor belongs to; -1 for none."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _tensor_problems(spec: TensorSpec, stored: dict[str, StoredTensor]) -> list[str]:
    found = stored.get(spec.name)
    if found is None:
        return [] if spec.duplicate else [f"{spec.name}: expected shape {list(spec.shape)}, found no such tensor"]
    where = f"in {found.file.name}"
    if found.shape != spec.shape:
        return [f"{spec.name}: expected shape {list(spec.shape)}, found {list(found.shape)} {where}"]
    if found.dtype not in DTYPES:
        return [f"{spec.name}: expected dtype {', '.join(DTYPES)}, found {found.dtype} {where}"]
    if found.dtype == "F8_E4M3":
        return _scale_problems(spec, stored)
    return []


def _scale_problems(spec: TensorSpec, stored: dict[str, StoredTensor]) -> list[str]:
    if len(spec.shape) != 2:
        return [f"{spec.name}: expected dtype F32, F16, BF16 for a vector, found F8_E4M3"]
    scale = stored.get(spec.scale_name)
    wanted = (
        f"expected F32 {list(spec.scale_shape)} (one scale for each 128 x 128 block of {spec.name} {list(spec.shape)})"
    )
    if scale is None:
        return [f"{spec.scale_name}: {wanted}, found no such tensor"]
    if scale.shape != spec.scale_shape or scale.dtype != "F32":
        return [f"{spec.scale_name}: {wanted}, found {scale.dtype} {list(scale.shape)} in {scale.file.name}"]
    return []
