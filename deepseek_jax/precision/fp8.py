"""FP8 as DeepSeek-V3 trains with it (V3 §3.3): the policy `fp8_deepseek`, with a field for each choice of the paper."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax

from deepseek_jax.precision.policy import Precision
from kernels_pallas import (
    LinearQuantization,
    PreQuantized,
    QTensor,
    Quantizer,
    dequantize,
    fp8_grouped_linear,
    fp8_grouped_swiglu_linear,
    fp8_linear,
    fp8_swiglu_linear,
    prepare,
    prequantize_weight,
    quantize,
)
from kernels_pallas.implementations import PREFERRED, preferred
from kernels_pallas.linear.quantization import PRODUCTS
from kernels_pallas.qtensor import retile
from kernels_pallas.trust import say_once

ROLES = ("linear", "attention_output", "experts", "mtp_projection")
# V3 keeps the attention's output with more fraction bits than E4M3 has, and with scales by which scaling is exact
# (§3.3.3).
ATTENTION_OUTPUT = LinearQuantization(
    input=Quantizer(power_of_two=True), residual=Quantizer(dtype="e5m6", power_of_two=True)
)


@dataclasses.dataclass(frozen=True)
class FP8Precision(Precision):
    """All three products of every Linear and expert in E4M3. Embedding, head, router, norms and attention's own
    products stay in `compute_dtype` or float32, as in the other policies.

    format             how Linears and experts multiply
    attention_output   how the Linear after attention does
    keep_swiglu_input  keep gate and up, quantized, and compute their product again in the backward pass; else the product is kept
    high_precision     roles that multiply in `compute_dtype` after all: "linear", "attention_output", "experts", "mtp_projection"
    """

    format: LinearQuantization = LinearQuantization()
    attention_output: LinearQuantization = ATTENTION_OUTPUT
    keep_swiglu_input: bool = True
    high_precision: tuple[str, ...] = ("mtp_projection",)  # it is not quantized in the released weights either

    def __post_init__(self):
        for role in self.high_precision:
            if role not in ROLES:
                raise ValueError(f"high_precision={self.high_precision}: {role!r} is none of {', '.join(ROLES)}")

    def has_kernels(self, kind: str) -> bool:
        if kind not in PREFERRED and kind.startswith("sm"):
            say_once(
                f"precision {self.name}: there are no FP8 kernels for this kind of device, {kind}, so XLA emulates "
                "every product in float32, which is "
                "slower than bfloat16; NVIDIA Hopper GPUs and TPUs have kernels, and config.precision=bfloat16 needs "
                "none"
            )
        return kind in PREFERRED

    def weight(self, w: jax.Array | QTensor, role: str, part: tuple[int, ...]) -> jax.Array | QTensor | PreQuantized:
        """In eight bits, unless some product reads the master copy or devices hold crumbs of a block; the master copy,
        whose gradient is summed in float32, otherwise."""
        if isinstance(w, QTensor) or role in self.high_precision:
            return w
        format = self._format(role)
        crumbs = any(
            size < all_of_it and math.gcd(size, format.weight.size) < 8
            for size, all_of_it in zip(part[-2:], w.shape[-2:], strict=True)
        )
        return (
            w
            if crumbs or not set(PRODUCTS) <= set(format.products)
            else prequantize_weight(w, format.weight, part[-2:])
        )

    def with_powers_of_two(self) -> "FP8Precision":
        """All scales rounded up to powers of two, of activations and weights alike, as the weights of DeepSeek-V3.1
        were trained."""

        def rounded(format: LinearQuantization) -> LinearQuantization:
            changes = {
                name: dataclasses.replace(getattr(format, name), power_of_two=True)
                for name in ("input", "weight", "gradient")
            }
            return dataclasses.replace(format, **changes)

        return dataclasses.replace(self, format=rounded(self.format), attention_output=rounded(self.attention_output))

    def _format(self, role: str) -> LinearQuantization:
        return self.attention_output if role == "attention_output" else self.format

    def dense(self, x: jax.Array | QTensor | PreQuantized) -> jax.Array:
        return dequantize(x, self.compute_dtype) if isinstance(x, QTensor) else super().dense(x)

    def by_heads(self, w_DF: jax.Array | QTensor, heads: int) -> jax.Array | QTensor:
        """Of a weight that is quantized already, values and scales as they are: a scale is repeated for each column of
        its block, since blocks and heads need not end together."""
        if not isinstance(w_DF, QTensor):
            return super().by_heads(w_DF, heads)
        columns = retile(w_DF.mT, w_DF.tile[0]).mT
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], heads, -1), columns)

    def rounded_weight(self, w_DF: jax.Array | QTensor, role: str, part: tuple[int, ...]) -> jax.Array:
        format = self._format(role)
        if isinstance(w_DF, QTensor) or role in self.high_precision or "forward" not in format.products:
            return self.dense(w_DF)
        return dequantize(prequantize_weight(w_DF, format.weight, part).quantized, self.compute_dtype)

    def rounded_input(self, x: jax.Array, role: str = "linear") -> jax.Array:
        format = self._format(role)
        if role in self.high_precision or "forward" not in format.products:
            return x
        return dequantize(quantize(x, format.input, implementation="xla"), x.dtype)

    def linear(
        self, x: jax.Array, w_DF: jax.Array | QTensor | PreQuantized, role: str = "linear", kind: str = "cpu"
    ) -> jax.Array:
        if role in self.high_precision:
            return super().linear(x, self.dense(w_DF))
        multiply = functools.partial(fp8_linear, format=self._format(role), implementation=preferred(kind))
        return _by_rows(multiply, w_DF, x.astype(self.compute_dtype))

    def swiglu_linear(
        self, gate: jax.Array, up: jax.Array, w_FD: jax.Array | QTensor | PreQuantized, kind: str = "cpu"
    ) -> jax.Array:
        if "linear" in self.high_precision or not self.keep_swiglu_input:
            return super().swiglu_linear(gate, up, w_FD, kind)
        multiply = functools.partial(fp8_swiglu_linear, format=self.format, implementation=preferred(kind))
        return _by_rows(multiply, w_FD, gate, up)

    def row_block(self, rows: int, num_groups: int, kind: str) -> int:
        """Groups of whole tiles, but on a CPU, where rows are dear."""
        return super().row_block(rows, num_groups, kind) if kind == "cpu" else self.format.gradient.size

    def rows(
        self, x_ND: jax.Array | PreQuantized, take: Callable[[jax.Array], jax.Array], kind: str
    ) -> jax.Array | PreQuantized:
        """Quantized once for all experts of a token and both products, and copied in eight bits."""
        if "experts" in self.high_precision:
            return super().rows(x_ND, take, kind)
        if isinstance(x_ND, PreQuantized) and x_ND.quantized.tile == self.format.input.tile(x_ND.shape):
            return jax.tree.map(take, x_ND)
        return prepare(
            self.dense(x_ND).astype(self.compute_dtype), self.format.input, take=take, implementation=preferred(kind)
        )

    def grouped_linear(
        self,
        x_RD: jax.Array | PreQuantized,
        w_EDF: jax.Array | QTensor | PreQuantized,
        group_sizes_E: jax.Array,
        block: int,
        kind: str = "cpu",
    ) -> jax.Array:
        if "experts" in self.high_precision:
            return super().grouped_linear(x_RD, self.dense(w_EDF), group_sizes_E, block, kind)
        fields = dict(alignment=block, format=self.format, implementation=preferred(kind))
        return fp8_grouped_linear(x_RD, w_EDF, group_sizes_E, **fields)

    def grouped_swiglu_linear(
        self,
        gate_RF: jax.Array,
        up_RF: jax.Array,
        w_EFD: jax.Array | QTensor | PreQuantized,
        group_sizes_E: jax.Array,
        block: int,
        kind: str = "cpu",
    ) -> jax.Array:
        if "experts" in self.high_precision or not self.keep_swiglu_input:
            return super().grouped_swiglu_linear(gate_RF, up_RF, w_EFD, group_sizes_E, block, kind)
        fields = dict(alignment=block, format=self.format, implementation=preferred(kind))
        return fp8_grouped_swiglu_linear(gate_RF, up_RF, w_EFD, group_sizes_E, **fields)


def _by_rows(multiply: Callable[..., jax.Array], w: jax.Array | QTensor | PreQuantized, *x: jax.Array) -> jax.Array:
    """multiply(x [N, D], w) for x of any rank; where x comes as [B, T, D] its two axes may lie on different devices and
    stay apart."""
    if x[0].ndim == 1:
        return multiply(*(part[None] for part in x), w)[0]
    for _ in range(x[0].ndim - 2):
        multiply = jax.vmap(multiply, in_axes=(*(0 for _ in x), None))
    return multiply(*x, w)
