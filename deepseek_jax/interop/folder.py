"""A Hugging Face folder held against the network its config.json describes: what is there, and everything that isn't right.

Only config.json, the index and the safetensors headers are read.
"""

import dataclasses
from pathlib import Path
from typing import Any

from deepseek_jax.errors import CheckpointError
from deepseek_jax.interop.hf_config import config_from_hf, read_config
from deepseek_jax.interop.safetensors_io import DTYPES, StoredTensor, read_folder
from deepseek_jax.interop.tensors import TensorSpec, tensor_table
from deepseek_jax.model.config import ModelConfig

_SHOWN = 10
# Buffers that older code saved though they follow from the config.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True)
class Folder:
    """`table` is what `config` needs, `stored` what the files hold; `problems` say in sentences where they disagree, `notes` what was
    passed over."""

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
            more = len(self.problems) - _SHOWN
            lines = [*self.problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
            raise CheckpointError(f"{self.path} can't be imported:\n  " + "\n  ".join(lines))


def open_folder(path: str | Path) -> Folder:
    """Compares a folder's headers with its config.json.

    A config.json that promises MTP modules for a folder without any of their tensors (transformers saves such) is taken
    without them, and a note says so. Raises CheckpointError if config.json is missing or unsupported or no safetensors
    can be read; everything else that is wrong is collected in `problems`.
    """
    path = Path(path)
    hf = read_config(path)
    config = config_from_hf(hf)
    stored, problems = read_folder(path)
    notes = []
    if config.mtp_depth and not any(name.startswith(f"model.layers.{config.num_layers}.") for name in stored):
        notes.append(f"config.json says num_nextn_predict_layers={config.mtp_depth}, the files hold none: taken as 0")
        config = config.replace(mtp_depth=0)
    table = tensor_table(config)
    expected = {spec.name for spec in table}
    for spec in table:
        problems += _tensor_problems(spec, stored)
    scales = {spec.scale_name for spec in table if spec.name in stored and stored[spec.name].dtype == "F8_E4M3"}
    extra = [name for name in stored if name not in expected and name not in scales]
    passed_over = [name for name in extra if name.endswith(_DERIVED_SUFFIX) or 0 in stored[name].shape]
    if passed_over:
        notes.append(f"{len(passed_over)} tensor(s) that hold nothing or follow from the config were passed over, such as {passed_over[0]}")
    for name in sorted(set(extra) - set(passed_over)):
        tensor = stored[name]
        problems.append(f"{name}: expected no such tensor, found {tensor.dtype} {list(tensor.shape)} in {tensor.file.name}")
    return Folder(path, hf, config, table, stored, tuple(problems), tuple(notes))


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
    wanted = f"expected F32 {list(spec.scale_shape)} (one scale for each 128 x 128 block of {spec.name} {list(spec.shape)})"
    if scale is None:
        return [f"{spec.scale_name}: {wanted}, found no such tensor"]
    if scale.shape != spec.scale_shape or scale.dtype != "F32":
        return [f"{spec.scale_name}: {wanted}, found {scale.dtype} {list(scale.shape)} in {scale.file.name}"]
    return []
