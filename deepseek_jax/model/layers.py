"""RMSNorm, Linear and SwiGLU."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.model.placement import Placement
from deepseek_jax.precision import Precision


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


def place(
    placement: Placement,
    precision: Precision,
    multiply: Callable[..., jax.Array],
    w: Any,
    role: str,
    names: tuple[str, str],
    *x: jax.Array,
) -> jax.Array:
    """multiply(*x, w) where the placement wants it; a plain product is the compiler's to divide."""
    w = precision.weight(w, role, placement.part(w.shape, names))
    if precision.has_kernels(placement.device_kind):
        return placement.multiply(multiply, w, names, *x)
    return multiply(*x, w)


class Linear(nn.Module):
    """y = x W with W [in, out]; no bias, as everywhere in DeepSeek's networks. `axes` names W's logical axes, `role`
    whose product it is."""

    features: int
    axes: tuple[str, str]
    init_std: float
    precision: Precision
    placement: Placement
    role: str = "linear"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        multiply = functools.partial(self.precision.linear, role=self.role, kind=self.placement.device_kind)
        y = place(
            self.placement,
            self.precision,
            multiply,
            self.weight(x.shape[-1]),
            self.role,
            self.axes,
            self.placement.flatten(x),
        )
        return y.reshape(*x.shape[:-1], self.features)

    @nn.compact
    def weight(self, in_features: int) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), self.axes)
        return self.param("kernel", init, (in_features, self.features), self.precision.param_dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)): the dense feed-forward and the shared experts."""

    features: int
    init_std: float
    precision: Precision
    placement: Placement

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(name, features, axes):
            return Linear(features, axes, self.init_std, self.precision, self.placement, name=name)

        flat = self.placement.flatten(x)
        gate, up = (linear(name, self.features, ("embed", "ffn"))(flat) for name in ("gate", "up"))
        down = linear("down", x.shape[-1], ("ffn", "embed"))
        multiply = functools.partial(self.precision.swiglu_linear, kind=self.placement.device_kind)
        return place(
            self.placement, self.precision, multiply, down.weight(self.features), down.role, down.axes, gate, up
        ).reshape(x.shape)
