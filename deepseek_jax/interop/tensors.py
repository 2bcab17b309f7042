"""The table of Hugging Face tensors and the parameters that they fill.

One table drives import, export, inspection and counting. Matrices are stored [out, in] there and [in, out] here; layers
and experts are separate tensors there and leading axes here. Nothing else changes: rotary rows keep their order.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.interop.attention import attention_names
from deepseek_jax.interop.fp8_blocks import scale_shape
from deepseek_jax.model.config import ModelConfig

SCALE_SUFFIX = "_scale_inv"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One stored tensor and its place in our variables.

    It fills `variables[path...][index]`, where `stack` gives the sizes of the indexed leading axes; `transposed` is
    true if our side is [in, out]. `quantized` tensors are FP8 with a scale in the released checkpoints. A `duplicate`
    repeats a tensor that another line of the table fills: it may be absent, and must agree where present
    (`folder.usable_folder`).
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    transposed: bool = False
    quantized: bool = False
    duplicate: bool = False

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        return self.stack + (self.shape[::-1] if self.transposed else self.shape)

    @property
    def is_router_bias(self) -> bool:
        return self.path[0] == "router_bias"

    @property
    def is_scale(self) -> bool:
        return self.name.endswith(SCALE_SUFFIX)

    @property
    def scale_name(self) -> str:
        return self.name + SCALE_SUFFIX

    @property
    def scale_shape(self) -> tuple[int, int]:
        return scale_shape(self.shape)

    @property
    def scales(self) -> "TensorSpec":
        """The stored scales as a tensor of their own, at the same place."""
        return dataclasses.replace(self, name=self.scale_name, shape=self.scale_shape, quantized=False)


class _Line(NamedTuple):
    """A line of a block's table: stored name and our path below the block; `experts` > 0 makes one line per expert."""

    name: str
    path: str
    shape: tuple[int, ...]
    quantized: bool = True
    experts: int = 0
    collection: str = "params"


def tensor_table(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every tensor of a Hugging Face checkpoint of `config`, in the order of the network; scales are not listed.

    Raises CheckpointError for an attention variant without Hugging Face names."""
    return tuple(_all_tensors(config))


def _all_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    vocabulary = (config.vocab_size, config.hidden_size)
    embedding = TensorSpec("model.embed_tokens.weight", vocabulary, ("params", "embed", "embedding"))
    if config.tie_embeddings:
        head = dataclasses.replace(embedding, name="lm_head.weight", duplicate=True)
    else:
        head = TensorSpec("lm_head.weight", vocabulary, ("params", "head", "kernel"), transposed=True)
    yield embedding
    for layer in range(config.num_layers):
        dense = layer < config.num_dense_layers
        stack, first, count = (
            ("dense_layers", 0, config.num_dense_layers)
            if dense
            else ("moe_layers", config.num_dense_layers, config.num_moe_layers)
        )
        yield from _block(config, dense, f"model.layers.{layer}", (stack,), (layer - first,), (count,))
    yield _vector("model.norm.weight", config.hidden_size, ("params", "final_norm", "scale"))
    yield head
    for k in range(config.mtp_depth):
        yield from _mtp_module(config, f"model.layers.{config.num_layers + k}", f"mtp_{k}", embedding, head)


def _mtp_module(
    config: ModelConfig, name: str, path: str, embedding: TensorSpec, head: TensorSpec
) -> Iterator[TensorSpec]:
    d = config.hidden_size
    yield dataclasses.replace(embedding, name=f"{name}.embed_tokens.weight", duplicate=True)
    yield _vector(f"{name}.enorm.weight", d, ("params", path, "embed_norm", "scale"))
    yield _vector(f"{name}.hnorm.weight", d, ("params", path, "hidden_norm", "scale"))
    # The released matrix takes [norm(embedding); norm(hidden)], and so does ours.
    yield TensorSpec(f"{name}.eh_proj.weight", (d, 2 * d), ("params", path, "proj", "kernel"), transposed=True)
    yield from _block(config, config.moe is None, name, (path, "block"), (), ())
    yield _vector(f"{name}.shared_head.norm.weight", d, ("params", path, "final_norm", "scale"))
    yield dataclasses.replace(head, name=f"{name}.shared_head.head.weight", duplicate=True)


def _vector(name: str, size: int, path: tuple[str, ...]) -> TensorSpec:
    return TensorSpec(name, (size,), path)


def _block(
    config: ModelConfig, dense: bool, name: str, path: tuple[str, ...], index: tuple[int, ...], stack: tuple[int, ...]
) -> Iterator[TensorSpec]:
    for part in (*_attention(config), *_norms(config), *(_dense_ffn(config) if dense else _moe(config))):
        for expert in range(max(part.experts, 1)):
            yield TensorSpec(
                name=f"{name}.{part.name.format(expert)}",
                shape=part.shape,
                path=(part.collection, *path, *part.path.split("/")),
                index=index + ((expert,) if part.experts else ()),
                stack=stack + ((part.experts,) if part.experts else ()),
                transposed=len(part.shape) == 2,
                quantized=part.quantized and len(part.shape) == 2,
            )


def _norms(config: ModelConfig) -> Iterator[_Line]:
    yield _Line("input_layernorm.weight", "attn_norm/scale", (config.hidden_size,))
    yield _Line("post_attention_layernorm.weight", "ffn_norm/scale", (config.hidden_size,))


def _attention(config: ModelConfig) -> Iterator[_Line]:
    names = attention_names(config.attention)
    for name, path, shape in names.tensors(config.attention, config.hidden_size):
        yield _Line(f"self_attn.{name}", f"attn/{path}", shape)


def _dense_ffn(config: ModelConfig) -> Iterator[_Line]:
    yield from _swiglu("mlp", "ffn/{}/kernel", config.hidden_size, config.intermediate_size)


def _moe(config: ModelConfig) -> Iterator[_Line]:
    d, moe = config.hidden_size, config.moe
    yield _Line("mlp.gate.weight", "ffn/router/kernel", (moe.num_experts, d), quantized=False)
    if moe.correction_bias:
        yield _Line("mlp.gate.e_score_correction_bias", "ffn/router/bias", (moe.num_experts,), collection="router_bias")
    yield from _swiglu("mlp.experts.{}", "ffn/experts/{}", d, moe.intermediate_size, moe.num_experts)
    if moe.num_shared_experts:
        yield from _swiglu(
            "mlp.shared_experts", "ffn/shared/{}/kernel", d, moe.num_shared_experts * moe.intermediate_size
        )


def _swiglu(name: str, path: str, d: int, width: int, experts: int = 0) -> Iterator[_Line]:
    yield _Line(f"{name}.gate_proj.weight", path.format("gate"), (width, d), experts=experts)
    yield _Line(f"{name}.up_proj.weight", path.format("up"), (width, d), experts=experts)
    yield _Line(f"{name}.down_proj.weight", path.format("down"), (d, width), experts=experts)
