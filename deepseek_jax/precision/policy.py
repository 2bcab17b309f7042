"""A policy: what the network multiplies with.

Master weights are float32 in every policy; `compute_dtype` is what activations are and what the products read. Norms,
softmax, routing, logits and losses are float32 whatever the policy.
"""

import dataclasses
import functools
import re
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.precision.grouped import grouped_matmul, row_block
from kernels_pallas import PreQuantized, plain, swiglu


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(equation: str, dtype: jnp.dtype, precision: jax.lax.Precision, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


def _einsum_bwd(equation, dtype, precision, operands, dy):
    """jax's own rule multiplies the float32 `dy` by operands widened to float32, which takes a GPU's matrix units twice
    as long.

    Sums are float32 here too, those over devices among them. Both gradients are there before either is used: `dy`, of
    logits for example, is not kept until the optimizer asks for the weight's.
    """
    a, b = operands
    in_a, in_b, out = re.split(",|->", equation)
    da = _einsum(f"{out},{in_b}->{in_a}", dtype, precision, dy, b).astype(a.dtype)
    db = _einsum(f"{in_a},{out}->{in_b}", dtype, precision, a, dy).astype(b.dtype)
    return jax.lax.optimization_barrier((da, db))


_einsum.defvjp(lambda *arguments: (_einsum(*arguments), arguments[-2:]), _einsum_bwd)


@dataclasses.dataclass(frozen=True)
class Precision:
    """A named number format for the network's products. Hashable, so that it can be a static argument.

    `role` says whose product it is: "linear", "attention_output", "mtp_projection" or "experts". `kind` is the kind of
    device that it is compiled for, as `Placement.device_kind` has it. A policy may treat each differently.
    """

    name: str
    param_dtype: jnp.dtype
    compute_dtype: jnp.dtype
    matmul_precision: jax.lax.Precision

    def has_kernels(self, kind: str) -> bool:
        """Whether products are kernels on that kind of device, which the compiler cannot divide among several."""
        del kind
        return False

    def weight(self, w: jax.Array, role: str, part: tuple[int, ...]) -> Any:
        """A weight [..., D, F] as it is sent to where it is multiplied; `part` is the shape of what one device holds of
        it."""
        del role, part
        return w.astype(self.compute_dtype)

    def dense(self, x: jax.Array | PreQuantized) -> jax.Array:
        """An operand as a plain array, for a product that is none of a policy's."""
        return plain(x)

    def by_heads(self, w_DF: jax.Array, heads: int) -> Any:
        """A weight with its outputs divided into heads: a tree of arrays [·, heads, ·], to be cut along the heads.
        `linear` reads it with the last two axes of each put together again."""
        return w_DF.reshape(w_DF.shape[0], heads, -1)

    def rounded_weight(self, w_DF: jax.Array, role: str, part: tuple[int, ...]) -> jax.Array:
        """The weight's numbers as `linear` multiplies with them, for a product that is written another way and must
        give the same."""
        del role, part
        return self.dense(w_DF)

    def rounded_input(self, x: jax.Array, role: str = "linear") -> jax.Array:
        """The numbers of `linear`'s input as it multiplies with them, in x's dtype."""
        del role
        return x

    def linear(self, x: jax.Array, w_DF: jax.Array, role: str = "linear", kind: str = "cpu") -> jax.Array:
        """x [..., D] times w [D, F] in the compute dtype.

        Give x as [N, D] where you can: with two batch axes XLA's CPU backend computes the weights' gradient twice as
        slowly.
        """
        del role, kind
        return jnp.matmul(
            x.astype(self.compute_dtype), w_DF.astype(self.compute_dtype), precision=self.matmul_precision
        )

    def swiglu_linear(self, gate: jax.Array, up: jax.Array, w_FD: jax.Array, kind: str = "cpu") -> jax.Array:
        """silu(gate) · up [..., F] times w [F, D]. What is between is rounded once, to the compute dtype, in every
        policy (see `swiglu`)."""
        return self.linear(swiglu(gate, up), w_FD, kind=kind)

    def einsum(self, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """A product outside the Linears (the head): operands in the compute dtype, result in float32; in its gradients'
        products too. "..." is a's leading axes, which b has not; they get letters that the equation does not use."""
        free = [letter for letter in string.ascii_letters if letter not in equation]
        leading = "".join(free[: a.ndim - len(equation.partition(",")[0].replace("...", ""))])
        return _einsum(equation.replace("...", leading), self.compute_dtype, self.matmul_precision, a, b)

    def row_block(self, rows: int, num_groups: int, kind: str) -> int:
        """Row count that groups are padded to for the grouped products; 1 means no padding."""
        return row_block(rows, num_groups, kind, self.compute_dtype)

    def rows(
        self, x_ND: jax.Array | PreQuantized, take: Callable[[jax.Array], jax.Array], kind: str
    ) -> jax.Array | PreQuantized:
        """take(x) as `grouped_linear` reads it; `take` moves whole rows, [N, ·] -> [R, ·]. A dispatch in FP8 brings x
        quantized."""
        del kind
        return take(self.dense(x_ND))

    def grouped_linear(
        self, x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, block: int, kind: str = "cpu"
    ) -> jax.Array:
        """Rows of group e times w[e]; groups lie one after another, each a multiple of `block` rows long."""
        x_RD, w_EDF = x_RD.astype(self.compute_dtype), w_EDF.astype(self.compute_dtype)
        return grouped_matmul(x_RD, w_EDF, group_sizes_E, block, self.matmul_precision, kind)

    def grouped_swiglu_linear(
        self,
        gate_RF: jax.Array,
        up_RF: jax.Array,
        w_EFD: jax.Array,
        group_sizes_E: jax.Array,
        block: int,
        kind: str = "cpu",
    ) -> jax.Array:
        """Rows of group e of silu(gate) · up times w[e]."""
        return self.grouped_linear(swiglu(gate_RF, up_RF), w_EFD, group_sizes_E, block, kind)
