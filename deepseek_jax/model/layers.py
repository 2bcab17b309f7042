"""RMSNorm, Linear and SwiGLU."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.ops import Ops


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · scale over the last axis, in float32; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32
        )
        return rms_norm(x, scale, self.eps)


class Linear(nn.Module):
    """y = x W with W [in, out]; no bias, as everywhere in DeepSeek's networks.

    `axes` names W's logical axes, `role` whose product it is (see `Precision`).
    """

    config: ModelConfig
    ops: Ops
    features: int
    axes: tuple[str, str]
    role: str = "linear"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.ops.linear(x, self.weight(x.shape[-1]), self.axes, self.role)

    @nn.compact
    def weight(self, in_features: int) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.config.init_std), self.axes)
        return self.param("kernel", init, (in_features, self.features), self.ops.precision.param_dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)): the dense feed-forward and the shared experts, `features` wide inside."""

    config: ModelConfig
    ops: Ops
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(name, features, axes):
            return Linear(self.config, self.ops, features, axes, name=name)

        tokens = self.ops.flatten(x)  # once: the backward pass then keeps one array for both products
        gate, up = (linear(name, self.features, ("embed", "ffn"))(tokens) for name in ("gate", "up"))
        down = linear("down", x.shape[-1], ("ffn", "embed"))
        return self.ops.swiglu_linear(gate, up, down.weight(self.features), down.axes).reshape(x.shape)
