"""Ops: the products, the attention and the experts that the network's modules ask for.

A module names logical axes and gets numbers. The number format and the devices are decided here; `Ops()` is one device,
`parallel.sharding.MeshOps` a mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.precision import Precision, get_precision
from kernels_pallas import PreQuantized, QTensor
from kernels_pallas.implementations import device_kind

Weight = jax.Array | QTensor  # float32 as trained, or quantized as stored


@dataclasses.dataclass(frozen=True)
class Ops:
    """Operations on one device. Hashable: a static field of every module.

    precision  the number format of each product: a policy of `deepseek_jax.precision`, or its name
    runtime    the choices that change speed and memory, not the function
    target     the kind of device that the program is for: "cpu", "tpu", "sm90" (NVIDIA Hopper), …; None: the first here
    """

    precision: Precision = "float32"
    runtime: RuntimeConfig = RuntimeConfig()
    target: str | None = None

    def __post_init__(self):
        if not isinstance(self.precision, Precision):
            object.__setattr__(self, "precision", get_precision(self.precision))

    @property
    def device(self) -> str:
        """The kind of device that the program is compiled for."""
        return self.target or device_kind()

    @property
    def batch_shards(self) -> int:
        """The number of devices that divide the sequences of a batch."""
        return 1

    @property
    def token_shards(self) -> int:
        """The number of devices that divide the tokens of a batch: its sequences and the positions in them."""
        return 1

    # Products

    def linear(self, x: jax.Array, w_DF: Weight, axes: Sequence[str], role: str = "linear") -> jax.Array:
        """x [..., D] times W [D, F]: [..., F] in the compute dtype. `axes` are W's logical axes, `role` says whose
        product it is (see `Precision`)."""
        x_ND, w = self.flatten(x), self.precision.weight(w_DF, role, self.local_shape(w_DF.shape, axes))
        y_NF = self.divided(self.precision.linear, role, w, axes, x_ND)(x_ND, w)
        return y_NF.reshape(*x.shape[:-1], -1)

    def swiglu_linear(self, gate: jax.Array, up: jax.Array, w_FD: Weight, axes: Sequence[str]) -> jax.Array:
        """silu(gate) · up, [..., F], times W [F, D]: [..., D] in the compute dtype."""
        flat, w = (self.flatten(gate), self.flatten(up)), w_FD
        w = self.precision.weight(w, "linear", self.local_shape(w.shape, axes))
        y_ND = self.divided(self.precision.swiglu_linear, "linear", w, axes, *flat)(*flat, w)
        return y_ND.reshape(*gate.shape[:-1], -1)

    def divided(
        self, multiply: Callable[..., jax.Array], role: str, w: Any, axes: Sequence[str], *x: jax.Array
    ) -> Callable[..., jax.Array]:
        """multiply(*x, w), a product of the precision, as each device computes its share."""
        del w, axes, x
        return functools.partial(multiply, role=role, device=self.device)

    def flatten(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [N, D], for one plain matrix product."""
        return x.reshape(-1, x.shape[-1])

    def einsum(self, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """A product outside the Linears (attention, the head): operands in the compute dtype, the result in float32.
        "..." stands for leading axes of a, which b does not have."""
        if "..." not in equation:
            return self.precision.einsum(equation, a, b)
        return self.precision.einsum(equation, self.flatten(a), b).reshape(*a.shape[:-1], -1)

    def rounded_input(self, x: jax.Array) -> jax.Array:
        """x as `linear` rounds it: for a product written another way that must give the same."""
        return self.precision.rounded_input(x)

    def rounded_weight(self, w_DF: Weight, axes: Sequence[str]) -> jax.Array:
        """W as `linear` rounds it, as a plain array."""
        return self.precision.rounded_weight(w_DF, "linear", self.local_shape(w_DF.shape, axes))

    # Arrays

    def shard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """x, divided among devices by its logical axes; None is an axis that stays whole."""
        del axes
        return x

    def local_shape(self, shape: Sequence[int], axes: Sequence[str | None]) -> tuple[int, ...]:
        """The shape of what one device holds of a parameter."""
        del axes
        return tuple(shape)

    def shard_mapped(
        self, kernel: Callable[..., jax.Array], axes: Sequence[Sequence[str | None]], *arrays: jax.Array
    ) -> jax.Array:
        """kernel(*arrays), which the compiler cannot divide: each device computes its own part. `axes` are the logical
        axes of the arrays; the result is divided as the first is."""
        del axes
        return kernel(*arrays)

    def wrap_layer(self, block: type) -> type:
        """The layer that runs in the place of `block`: the same fields and parameters, in another order of work."""
        return block

    def embed(self, table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        """Vectors of an embedding with logical axes ("vocab", "embed"): [B, T, D] in the compute dtype."""
        return jnp.take(table_VD.astype(self.precision.compute_dtype), ids_BT, axis=0)

    def attention(self, core: Callable[..., jax.Array], q_inputs: Any, kv_inputs: Any, weights: Any) -> jax.Array:
        """core(q_inputs, kv_inputs, weights, first): [B, T, heads, ...], each query against the whole sequence.

        `q_inputs` are arrays [B, T] or [B, T, heads, ...], `kv_inputs` what keys and values are made of, [B, T, ·] or
        [B, T, heads, ·], `weights` arrays [·, heads, ·]. The first query stands at position `first` of the keys.
        """
        return core(q_inputs, kv_inputs, weights, 0)

    # Experts

    def experts(
        self,
        apply: Callable[..., jax.Array],
        combine: Callable[..., jax.Array],
        weights: Sequence[Weight],
        axes: Sequence[Sequence[str]],
        x_BTD: jax.Array,
        ids_BTK: jax.Array,
        gates_BTK: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Each token through its experts: ([B, T, D], overflows int32: devices whose buffers were too small, so that
        the slower way was taken).

        weights  arrays [E, ·, ·], one expert after another; `axes` are their logical axes
        apply    apply(weights, x [N, D], ids [N, K]) -> [N, K, D]; takes any number of experts, numbered from 0, and
                 gives zero for an id beyond the last
        combine  combine(y [N, K, D], gates [N, K], dtype) -> [N, D]
        """
        weights = self.expert_weights(weights, axes)
        x_ND, ids_NK, gates_NK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, ids_BTK, gates_BTK))
        y_ND = combine(apply(weights, x_ND, ids_NK), gates_NK, x_BTD.dtype)
        return y_ND.reshape(x_BTD.shape), jnp.zeros((), jnp.int32)

    def expert_weights(self, weights: Sequence[Weight], axes: Sequence[Sequence[str]]) -> tuple[Any, ...]:
        """The experts' weights in the format in which they are multiplied."""
        weight, shape = self.precision.weight, self.local_shape
        return tuple(weight(w, "experts", shape(w.shape, names)) for w, names in zip(weights, axes, strict=True))

    def alignment(self, tokens: int, num_experts: int) -> int:
        """The number of tokens that each expert's group is padded to a multiple of; 1 means no padding."""
        return self.precision.alignment(tokens, num_experts, self.device)

    def expert_tokens(self, x_ND: jax.Array | PreQuantized) -> jax.Array | PreQuantized:
        """Tokens in the format in which experts multiply them: a copy to each expert then copies eight bits."""
        return self.precision.expert_tokens(x_ND, self.device)

    def grouped_linear(self, x_RD, w_EDF, group_sizes_E: jax.Array, alignment: int) -> jax.Array:
        """Tokens of group e times w[e]: [R, F]. Groups lie one after another, each a multiple of `alignment` long."""
        return self.precision.grouped_linear(x_RD, w_EDF, group_sizes_E, alignment, self.device)

    def grouped_swiglu_linear(self, gate_RF, up_RF, w_EFD, group_sizes_E: jax.Array, alignment: int) -> jax.Array:
        """Tokens of group e of silu(gate) · up, times w[e]: [R, D]."""
        return self.precision.grouped_swiglu_linear(gate_RF, up_RF, w_EFD, group_sizes_E, alignment, self.device)
