"""Precision: the number format of every matrix product of the network.

Every policy keeps float32 master weights. Activations and the operands of products have `compute_dtype`. Norms,
softmax, routing, logits and losses are float32 in every policy.
"""

import dataclasses
import functools
import re
import string
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.precision.grouped import alignment, grouped_matmul
from kernels_pallas import PreQuantized, master, swiglu


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
    """A number format for the network's products. Hashable, so that it can be a static argument.

    `role` names whose product it is: "linear", "attention_output", "mtp_projection" or "experts"; `device` is the kind
    of device that the program is for (`Ops.device`). A policy may treat each of them differently.
    """

    name: str
    param_dtype: jnp.dtype
    compute_dtype: jnp.dtype
    matmul_precision: jax.lax.Precision

    def has_kernels(self, device: str) -> bool:
        """True if products are kernels on that kind of device, which the compiler cannot divide among several."""
        del device
        return False

    def weight(self, w: jax.Array, role: str, local_shape: tuple[int, ...]) -> Any:
        """A weight [..., D, F] in the format in which it travels to its product; one device holds `local_shape` of
        it."""
        del role, local_shape
        return w.astype(self.compute_dtype)

    def dense(self, x: jax.Array | PreQuantized) -> jax.Array:
        """An operand as a plain array, for products outside the policy."""
        return master(x)

    def by_heads(self, w_DF: jax.Array, heads: int) -> Any:
        """A weight with its outputs divided into heads: a tree of arrays [·, heads, ·] that can be cut along the heads.
        `linear` reads it with the last two axes of each joined again."""
        return w_DF.reshape(w_DF.shape[0], heads, -1)

    def rounded_weight(self, w_DF: jax.Array, role: str, local_shape: tuple[int, ...]) -> jax.Array:
        """The weight as `linear` rounds it, for a product that is written another way and must give the same."""
        del role, local_shape
        return self.dense(w_DF)

    def rounded_input(self, x: jax.Array, role: str = "linear") -> jax.Array:
        """The input as `linear` rounds it, in x's dtype."""
        del role
        return x

    def linear(self, x: jax.Array, w_DF: jax.Array, role: str = "linear", device: str = "cpu") -> jax.Array:
        """x [..., D] times w [D, F] in the compute dtype.

        Give x as [N, D] where you can: with two batch axes XLA's CPU backend computes the weights' gradient twice as
        slowly.
        """
        del role, device
        return jnp.matmul(
            x.astype(self.compute_dtype), w_DF.astype(self.compute_dtype), precision=self.matmul_precision
        )

    def swiglu_linear(
        self, gate: jax.Array, up: jax.Array, w_FD: jax.Array, role: str = "linear", device: str = "cpu"
    ) -> jax.Array:
        """silu(gate) · up [..., F] times w [F, D]. Every policy rounds silu(gate) · up once, to the compute dtype (see
        `swiglu`)."""
        return self.linear(swiglu(gate, up), w_FD, role, device)

    def einsum(self, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """A product outside the Linears (attention, the head): operands in the compute dtype, the result in float32,
        and likewise in its gradients. "..." stands for a's leading axes, which b does not have; they get letters that
        the equation does not use."""
        free = [letter for letter in string.ascii_letters if letter not in equation]
        leading = "".join(free[: a.ndim - len(equation.partition(",")[0].replace("...", ""))])
        return _einsum(equation.replace("...", leading), self.compute_dtype, self.matmul_precision, a, b)

    def alignment(self, tokens: int, num_groups: int, device: str) -> int:
        """The number of tokens that each expert's group is padded to a multiple of; 1 means no padding."""
        return alignment(tokens, num_groups, device, self.compute_dtype)

    def expert_tokens(self, x_ND: jax.Array | PreQuantized, device: str) -> jax.Array | PreQuantized:
        """Tokens as `grouped_linear` reads them, before they are copied to their experts. An FP8 dispatch brings them
        quantized."""
        del device
        return self.dense(x_ND)

    def grouped_linear(
        self, x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, alignment: int, device: str = "cpu"
    ) -> jax.Array:
        """Tokens of group e times w[e]: [R, F]; groups lie one after another, each a multiple of `alignment` long."""
        x_RD, w_EDF = x_RD.astype(self.compute_dtype), w_EDF.astype(self.compute_dtype)
        return grouped_matmul(x_RD, w_EDF, group_sizes_E, alignment, self.matmul_precision, device)

    def grouped_swiglu_linear(
        self,
        gate_RF: jax.Array,
        up_RF: jax.Array,
        w_EFD: jax.Array,
        group_sizes_E: jax.Array,
        alignment: int,
        device: str = "cpu",
    ) -> jax.Array:
        """Tokens of group e of silu(gate) · up times w[e]: [R, D]."""
        return self.grouped_linear(swiglu(gate_RF, up_RF), w_EFD, group_sizes_E, alignment, device)
