"""What the network asks of whoever places it on devices. It asks by logical names and knows no mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.implementations import device_kind


def combine(y_NKD: jax.Array, gates_NK: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Each token's K expert results weighted by its gates and summed in float32: [N, D] in `dtype`."""
    return jnp.einsum("NKD,NK->ND", y_NKD.astype(jnp.float32), gates_NK).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Placement:
    """One device: nothing to place and nothing to send. `parallel.placement` has the one for meshes.

    Hashable: it is a static field of the network beside the precision.
    """

    @property
    def device_kind(self) -> str:
        """The kind of device it is compiled for: "cpu", "tpu", "sm90" (NVIDIA Hopper), …"""
        return device_kind(jax.devices()[0])

    @property
    def batch_shards(self) -> int:
        """Among how many devices the rows of a batch are divided."""
        return 1

    @property
    def token_shards(self) -> int:
        """Among how many devices the tokens of a batch are divided: its rows, and the positions in them."""
        return 1

    def schedule(self, block: type) -> type:
        """The layer that runs in the place of `block`: the same fields and parameters, in another order of work."""
        return block

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """`x`, laid out as the rules say for its logical axes; None is an axis nobody divides."""
        del axes
        return x

    def part(self, shape: Sequence[int], names: Sequence[str | None]) -> tuple[int, ...]:
        """The shape of what one device holds of a parameter."""
        del names
        return tuple(shape)

    def flatten(self, x_BTD: jax.Array) -> jax.Array:
        """[..., D] -> [N, D] where that moves nothing between devices, else as it is."""
        return x_BTD.reshape(-1, x_BTD.shape[-1])

    def multiply(self, multiply: Callable[..., jax.Array], w: Any, names: Sequence[str], *x: jax.Array) -> jax.Array:
        """multiply(*x, w): x [N, D] or [B, T, D], w [D, F] with logical axes `names`, for a `multiply` that the
        compiler cannot divide among devices and that takes numbers of D together in tiles of 128."""
        del names
        return multiply(*x, w)

    def look_up(self, table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        """Rows of an embedding with logical axes ("vocab", "embed"): [B, T, D]."""
        return jnp.take(table_VD, ids_BT, axis=0)

    def on_each_device(
        self, kernel: Callable[..., jax.Array], names: Sequence[Sequence[str | None]], *arrays: jax.Array
    ) -> jax.Array:
        """kernel(*arrays), which the compiler cannot divide among devices: each computes its part. `names` are the
        logical axes of the arrays; the result has as many as the first, and they are divided alike."""
        del names
        return kernel(*arrays)

    def attend(self, core: Callable[..., jax.Array], queries: Any, keys: Any, weights: Any) -> jax.Array:
        """Self-attention: core(queries, keys, weights, first) -> [B, T, heads, ·].

        `queries` are arrays [B, T, heads, ·], `keys` what attention needs of the whole sequence, [B, T, ·] or [B, T,
        heads, ·], `weights` arrays [·, heads, ·]. The first query stands at slot `first` of the keys.
        """
        return core(queries, keys, weights, 0)

    def experts(
        self,
        apply: Callable[..., jax.Array],
        weights: Any,
        axes: Any,
        x_BTD: jax.Array,
        ids_BTK: jax.Array,
        gates_BTK: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Routed experts: apply(weights, x [N, D], ids [N, K]) -> results [N, K, D], weighted by the gates.

        `weights` is a tuple of arrays with the experts as their first axis, `axes` their logical axes; `apply` takes
        any number of experts, numbered from 0, and gives zero for an id beyond the last. -> ([B, T, D], on how many
        devices more rows arrived than a buffer holds, so that the slower way was taken, int32).
        """
        del axes
        top_k = ids_BTK.shape[-1]
        x_ND, ids_NK, gates_NK = (
            x_BTD.reshape(-1, x_BTD.shape[-1]),
            ids_BTK.reshape(-1, top_k),
            gates_BTK.reshape(-1, top_k),
        )
        y_ND = combine(apply(weights, x_ND, ids_NK), gates_NK, x_BTD.dtype)
        return y_ND.reshape(x_BTD.shape), jnp.zeros((), jnp.int32)
