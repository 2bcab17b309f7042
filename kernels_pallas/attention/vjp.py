"""Gradients of the attention kernels. The residuals are the operands, the result and the logarithm of each row's
sum."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp


def differentiable(kernels: ModuleType) -> Callable[..., jax.Array]:
    """Makes attention(q, k, v, query_segments, segments, first, scale), with gradients, of a module's `forward`,
    `query_gradient` and `key_and_value_gradients`."""

    def attention(*operands):
        return kernels.forward(*operands)[0]

    def fwd(*operands):
        o_BTHv, lse_BHT = kernels.forward(*operands)
        return o_BTHv, (operands[:-1], o_BTHv, lse_BHT)

    def bwd(scale, residuals, do_BTHv):
        operands, o_BTHv, lse_BHT = residuals
        delta_BHT = jnp.einsum("BTHv,BTHv->BHT", o_BTHv.astype(jnp.float32), do_BTHv.astype(jnp.float32))
        arguments = (*operands, scale, do_BTHv, lse_BHT, delta_BHT)
        return kernels.query_gradient(*arguments), *kernels.key_and_value_gradients(*arguments), None, None, None

    attention = jax.custom_vjp(attention, nondiff_argnums=(6,))
    attention.defvjp(fwd, bwd)
    return attention
