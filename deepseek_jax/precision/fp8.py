"""FP8 as DeepSeek-V3 trains with it (V3 §3.3): the policy `fp8_deepseek`, with a field for each choice of the paper."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax

from deepseek_jax.precision.policy import Precision
from kernels_pallas import (
    PRODUCTS,
    LinearQuantization,
    PreQuantized,
    QTensor,
    Quantizer,
    dequantize,
    fp8_grouped_linear,
    fp8_grouped_swiglu_linear,
    fp8_linear,
    fp8_swiglu_linear,
    prequantize,
    prequantize_weight,
    quantize,
)
from kernels_pallas.implementations import PREFERRED, preferred
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

    quantization       how Linears and experts multiply
    attention_output   how the Linear after attention does
    keep_swiglu_input  keep gate and up, quantized, and compute their product again in the backward pass; else keep
                       the product
    high_precision     roles that multiply in `compute_dtype` after all: "linear", "attention_output", "experts",
                       "mtp_projection"
    """

    quantization: LinearQuantization = LinearQuantization()
    attention_output: LinearQuantization = ATTENTION_OUTPUT
    keep_swiglu_input: bool = True
    high_precision: tuple[str, ...] = ("mtp_projection",)  # it is not quantized in the released weights either

    def __post_init__(self):
        for role in self.high_precision:
            if role not in ROLES:
                raise ValueError(f"high_precision={self.high_precision}: {role!r} is none of {', '.join(ROLES)}")

    def has_kernels(self, device: str) -> bool:
        if device not in PREFERRED and device.startswith("sm"):
            say_once(
                f"precision {self.name}: this device, {device}, has no FP8 kernels, so XLA emulates "
                "every product in float32, which is slower than bfloat16; NVIDIA Hopper GPUs and TPUs have kernels, "
                "and config.precision=bfloat16 needs none"
            )
        return device in PREFERRED

    def weight(
        self, w: jax.Array | QTensor, role: str, local_shape: tuple[int, ...]
    ) -> jax.Array | QTensor | PreQuantized:
        """Quantizes before the weight travels, so that eight bits do. The master copy travels instead, and its gradient
        is summed in float32, if one of the three products reads it or a device holds fewer than 8 rows or columns of a
        block."""
        if isinstance(w, QTensor) or role in self.high_precision:
            return w
        quantization = self._quantization(role)
        cut_small = any(
            size < whole and math.gcd(size, quantization.weight.size) < 8
            for size, whole in zip(local_shape[-2:], w.shape[-2:], strict=True)
        )
        if cut_small or not set(PRODUCTS) <= set(quantization.products):
            return w
        return prequantize_weight(w, quantization.weight, local_shape[-2:])

    def with_powers_of_two(self) -> "FP8Precision":
        """All scales rounded up to powers of two, of activations and weights alike, as the weights of DeepSeek-V3.1
        were trained."""

        def rounded(quantization: LinearQuantization) -> LinearQuantization:
            changes = {
                name: dataclasses.replace(getattr(quantization, name), power_of_two=True)
                for name in ("input", "weight", "gradient")
            }
            return dataclasses.replace(quantization, **changes)

        return dataclasses.replace(
            self, quantization=rounded(self.quantization), attention_output=rounded(self.attention_output)
        )

    def _quantization(self, role: str) -> LinearQuantization:
        return self.attention_output if role == "attention_output" else self.quantization

    def dense(self, x: jax.Array | QTensor | PreQuantized) -> jax.Array:
        return dequantize(x, self.compute_dtype) if isinstance(x, QTensor) else super().dense(x)

    def by_heads(self, w_DF: jax.Array | QTensor, heads: int) -> jax.Array | QTensor:
        """Of a weight that is quantized already, values and scales as they are: a scale is repeated for each column of
        its block, since blocks and heads need not end together."""
        if not isinstance(w_DF, QTensor):
            return super().by_heads(w_DF, heads)
        columns = retile(w_DF.mT, w_DF.tile[0]).mT
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], heads, -1), columns)

    def rounded_weight(self, w_DF: jax.Array | QTensor, role: str, local_shape: tuple[int, ...]) -> jax.Array:
        quantization = self._quantization(role)
        if isinstance(w_DF, QTensor) or role in self.high_precision or "forward" not in quantization.products:
            return self.dense(w_DF)
        return dequantize(prequantize_weight(w_DF, quantization.weight, local_shape).quantized, self.compute_dtype)

    def rounded_input(self, x: jax.Array, role: str = "linear") -> jax.Array:
        quantization = self._quantization(role)
        if role in self.high_precision or "forward" not in quantization.products:
            return x
        return dequantize(quantize(x, quantization.input, implementation="xla"), x.dtype)

    def linear(
        self, x: jax.Array, w_DF: jax.Array | QTensor | PreQuantized, role: str = "linear", device: str = "cpu"
    ) -> jax.Array:
        if role in self.high_precision:
            return super().linear(x, self.dense(w_DF))
        multiply = functools.partial(
            fp8_linear, quantization=self._quantization(role), implementation=preferred(device)
        )
        return _by_sequence(multiply, x.ndim, 1)(x.astype(self.compute_dtype), w_DF)

    def swiglu_linear(
        self,
        gate: jax.Array,
        up: jax.Array,
        w_FD: jax.Array | QTensor | PreQuantized,
        role: str = "linear",
        device: str = "cpu",
    ) -> jax.Array:
        if role in self.high_precision or not self.keep_swiglu_input:
            return super().swiglu_linear(gate, up, w_FD, role, device)
        multiply = functools.partial(
            fp8_swiglu_linear, quantization=self._quantization(role), implementation=preferred(device)
        )
        return _by_sequence(multiply, gate.ndim, 2)(gate, up, w_FD)

    def alignment(self, tokens: int, num_groups: int, device: str) -> int:
        """A whole tile of tokens. Not on a CPU, where padded tokens cost more than tiles that are not full."""
        return super().alignment(tokens, num_groups, device) if device == "cpu" else self.quantization.gradient.size

    def expert_tokens(self, x_ND: jax.Array | PreQuantized, device: str) -> jax.Array | PreQuantized:
        """Quantized once for all experts of a token and both products."""
        if "experts" in self.high_precision:
            return super().expert_tokens(x_ND, device)
        if isinstance(x_ND, PreQuantized) and x_ND.quantized.tile == self.quantization.input.tile(x_ND.shape):
            return x_ND
        return prequantize(
            self.dense(x_ND).astype(self.compute_dtype), self.quantization.input, implementation=preferred(device)
        )

    def grouped_linear(
        self,
        x_RD: jax.Array | PreQuantized,
        w_EDF: jax.Array | QTensor | PreQuantized,
        group_sizes_E: jax.Array,
        alignment: int,
        device: str = "cpu",
    ) -> jax.Array:
        if "experts" in self.high_precision:
            return super().grouped_linear(x_RD, self.dense(w_EDF), group_sizes_E, alignment, device)
        fields = dict(alignment=alignment, quantization=self.quantization, implementation=preferred(device))
        return fp8_grouped_linear(x_RD, w_EDF, group_sizes_E, **fields)

    def grouped_swiglu_linear(
        self,
        gate_RF: jax.Array,
        up_RF: jax.Array,
        w_EFD: jax.Array | QTensor | PreQuantized,
        group_sizes_E: jax.Array,
        alignment: int,
        device: str = "cpu",
    ) -> jax.Array:
        if "experts" in self.high_precision or not self.keep_swiglu_input:
            return super().grouped_swiglu_linear(gate_RF, up_RF, w_EFD, group_sizes_E, alignment, device)
        fields = dict(alignment=alignment, quantization=self.quantization, implementation=preferred(device))
        return fp8_grouped_swiglu_linear(gate_RF, up_RF, w_EFD, group_sizes_E, **fields)


def _by_sequence(multiply: Callable[..., jax.Array], ndim: int, inputs: int) -> Callable[..., jax.Array]:
    """`multiply`, which takes inputs [N, D], for inputs of `ndim` axes: [B, T, D] stays in sequences, since different
    devices may hold B and T."""
    return multiply if ndim == 2 else jax.vmap(multiply, (*(0,) * inputs, None))
