"""Fused experts: all experts' matrices in one tensor, one after the other, as transformers 5 holds them in memory."""

import dataclasses
import re
from collections.abc import Mapping

from deepseek_jax.interop.safetensors_io import StoredTensor

_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")


def separate_experts(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same bytes under the released names: gate_up_proj [E, 2F, D] and down_proj [E, D, F] become a matrix for each
    expert."""
    separate: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        fused = _FUSED.fullmatch(name)
        matrices = _MATRICES[fused[2]] if fused else ()
        if not fused or len(tensor.shape) != 3 or tensor.shape[1] % len(matrices):
            separate[name] = tensor
            continue
        shape = (tensor.shape[1] // len(matrices), tensor.shape[2])
        count = tensor.shape[0] * len(matrices)
        for i in range(count):
            expert, matrix = divmod(i, len(matrices))
            nbytes = tensor.nbytes // count
            one = dataclasses.replace(tensor, shape=shape, offset=tensor.offset + i * nbytes, nbytes=nbytes)
            separate[f"{fused[1]}.{expert}.{matrices[matrix]}.weight"] = one
    return separate
