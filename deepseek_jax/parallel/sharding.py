"""The network's operations on a mesh of devices."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.model.ops import Ops, Weight
from deepseek_jax.parallel.dispatch import DispatchConfig, dispatched, gathered
from deepseek_jax.parallel.dual_batch import dual_batch_block
from deepseek_jax.parallel.rules import Rules, build_rules, divide
from kernels_pallas import QTensor, vary
from kernels_pallas.implementations import device_kind

TILE = 128  # numbers that share a scale where a product quantizes its weight itself


def quantization_tile(w: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a weight that comes quantized; None for any other."""
    tiles = [
        leaf.tile
        for leaf in jax.tree.leaves(w, is_leaf=lambda leaf: isinstance(leaf, QTensor))
        if isinstance(leaf, QTensor)
    ]
    return tiles[0] if tiles else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOps(Ops):
    """Divides arrays by `rules`; the compiler (GSPMD) moves what a product needs.

    `shard_map` writes out what the compiler cannot know or gets wrong: products that are kernels, experts that tokens
    travel to, attention over a divided sequence, and a divided embedding. A dimension that the mesh does not divide
    evenly stays whole.
    """

    mesh: Mesh
    rules: Rules = build_rules()
    dispatch: DispatchConfig = DispatchConfig()

    @property
    def device(self) -> str:
        return self.target or device_kind(self.mesh.devices.flat[0])

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    def _shards(self, *names: str) -> int:
        return math.prod(self.sizes[axis] for name in names for axis in dict(self.rules)[name])

    @property
    def batch_shards(self) -> int:
        return self._shards("batch")

    @property
    def token_shards(self) -> int:
        return self._shards("batch", "length")

    def wrap_layer(self, block: type) -> type:
        return dual_batch_block(block) if self.dispatch.dual_batch else block

    def mesh_axes(
        self, names: Sequence[str | None], shape: Sequence[int], prefix: str = ""
    ) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that divide each dimension of an array; `prefix` looks rules up under another name first."""
        return divide(dict(self.rules), self.sizes, names, shape, prefix)

    def spec(self, names: Sequence[str | None], shape: Sequence[int], prefix: str = "") -> PartitionSpec:
        return _spec(self.mesh_axes(names, shape, prefix))

    def sharding(self, names: Sequence[str | None], shape: Sequence[int], prefix: str = "") -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(names, shape, prefix))

    def shard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def local_shape(self, shape: Sequence[int], axes: Sequence[str | None]) -> tuple[int, ...]:
        return tuple(shape) if _inside_shard_map() else self.sharding(axes, shape).shard_shape(tuple(shape))

    def flatten(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [N, D]. Not where the mesh divides positions: two divided axes cannot become one without moving
        numbers between devices."""
        return x if self._shards("length") > 1 and not _inside_shard_map() else super().flatten(x)

    def divided(
        self, multiply: Callable[..., jax.Array], role: str, w: Any, axes: Sequence[str], *x: jax.Array
    ) -> Callable[..., jax.Array]:
        """The compiler divides a product, unless it is a kernel."""
        multiply = super().divided(multiply, role, w, axes, *x)
        kernel = self.precision.has_kernels(self.device) and not _inside_shard_map()
        return self.by_tokens(multiply, w, axes, *x) if kernel else multiply

    def by_tokens(
        self, multiply: Callable[..., jax.Array], w: Any, axes: Sequence[str], *x: jax.Array
    ) -> Callable[..., jax.Array]:
        """multiply(*x, w) of each device's own tokens: x [N, D] or [B, T, D], w [D, F].

        A dimension of w that the tokens' mesh axes divide is gathered here, and its gradient summed and divided again
        on the way back. One that other axes divide (tensor) divides the product, if its shards are whole tiles: sums
        over D are then added up.
        """
        tokens = self.mesh_axes(("batch", "length")[: x[0].ndim - 1], x[0].shape[:-1])
        token_axes = set(sum(tokens, ()))
        whole_tiles = [
            size % tile == 0
            for size, tile in zip(self.local_shape(w.shape, axes), quantization_tile(w) or (TILE, TILE), strict=True)
        ]

        def used(shape) -> tuple[tuple[str, ...], ...]:
            """The mesh axes that divide an array of w's where it enters."""
            by = zip(self.mesh_axes(axes, shape), whole_tiles, strict=True)
            return tuple(
                by_axes if token_axes.issuperset(by_axes) or (whole and token_axes.isdisjoint(by_axes)) else ()
                for by_axes, whole in by
            )

        w_specs = jax.tree.map(lambda leaf: _spec(used(leaf.shape)), w)
        inner, outer = (() if token_axes.issuperset(by_axes) else by_axes for by_axes in used(w.shape))

        def local(*operands):
            *x, w = operands
            y = multiply(*x, jax.tree.map(lambda leaf, spec: _gather(leaf, spec, token_axes), w, w_specs))
            return lax.psum(y, inner) if inner else y

        x_specs, y_spec = (_spec((*tokens, inner)),) * len(x), _spec((*tokens, outer))
        return jax.shard_map(local, mesh=self.mesh, in_specs=(*x_specs, w_specs), out_specs=y_spec)

    def embed(self, table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        """Every device looks up its columns of the embedding for the tokens of all its peers, and they exchange what
        they found: as many numbers as the result has, where gathering the table would move all of it."""
        table_VD = table_VD.astype(self.precision.compute_dtype)
        vocab_axes, width_axes = self.mesh_axes(("vocab", "embed"), table_VD.shape)
        token_spec = self.spec(("batch", "length"), ids_BT.shape)
        token_axes = sum(self.mesh_axes(("batch", "length"), ids_BT.shape), ())
        # the others' tokens are the same: gathered
        width_axes = tuple(axis for axis in width_axes if axis in token_axes)
        # the others' vectors are of other tokens: gathered
        vocab_axes = tuple(axis for axis in vocab_axes if axis not in token_axes)

        def local(table_vd, ids_bt):
            ids_PN = ids_bt.reshape(1, -1)
            if width_axes:
                ids_PN = lax.all_gather(ids_PN, width_axes, tiled=True)
            if vocab_axes:
                ids_PN = ids_PN - lax.axis_index(vocab_axes) * table_vd.shape[0]
            found_PNd = table_vd.at[ids_PN].get(mode="fill", fill_value=0, wrap_negative_indices=False)
            if vocab_axes:
                found_PNd = lax.psum(found_PNd, vocab_axes)
            if width_axes:
                found_PNd = lax.all_to_all(found_PNd, width_axes, split_axis=0, concat_axis=2, tiled=True)
            return found_PNd.reshape(*ids_bt.shape, -1)

        table_spec = PartitionSpec(vocab_axes or None, width_axes or None)
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=(table_spec, token_spec), out_specs=PartitionSpec(*token_spec, None)
        )(table_VD, ids_BT)

    def shard_mapped(
        self, kernel: Callable[..., jax.Array], axes: Sequence[Sequence[str | None]], *arrays: jax.Array
    ) -> jax.Array:
        if _inside_shard_map():
            return kernel(*arrays)
        specs = tuple(self.spec(names, x.shape) for names, x in zip(axes, arrays, strict=True))
        return jax.shard_map(kernel, mesh=self.mesh, in_specs=specs, out_specs=specs[0])(*arrays)

    def attention(self, core: Callable[..., jax.Array], q_inputs: Any, kv_inputs: Any, weights: Any) -> jax.Array:
        """Every device keeps its queries and gathers what keys and values are made of: for MLA c_kv and the rotary key,
        576 numbers a token in V3, not the keys and values of 128 heads."""
        names = ("batch", "length", "heads")
        _, length_axes, head_axes = self.mesh_axes(names, q_inputs[0].shape[:3])  # an axis of both divides the length
        if not length_axes:
            return super().attention(core, q_inputs, kv_inputs, weights)

        def local(q_inputs, kv_inputs, weights):
            kv_inputs = jax.tree.map(lambda x: lax.all_gather(x, length_axes, axis=1, tiled=True), kv_inputs)
            return core(q_inputs, kv_inputs, weights, lax.axis_index(length_axes) * q_inputs[0].shape[1])

        def along(x):
            """[B, T], [B, T, ·], or [B, T, heads, …]"""
            axes = (names if x.ndim > 3 else names[:2]) + (None,) * (x.ndim - 3 if x.ndim > 3 else x.ndim - 2)
            return self.spec(axes, x.shape)

        out_shape = jax.eval_shape(lambda *args: core(*args, 0), q_inputs, kv_inputs, weights).shape
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(
                jax.tree.map(along, q_inputs),
                jax.tree.map(along, kv_inputs),
                jax.tree.map(lambda x: PartitionSpec(None, head_axes or None, None), weights),
            ),
            out_specs=self.spec((*names, *(None,) * (len(out_shape) - 3)), out_shape),
        )(q_inputs, kv_inputs, weights)

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
        """Tokens travel to their experts (see `dispatch`), which any number of mesh axes may divide, those of the
        tokens or others.

        The feed-forward width stays divided by axes that do not divide tokens, and its partial sums are added up.
        Weights divided otherwise are gathered, and their gradients summed and divided again on the way back.
        """
        weights = self.expert_weights(weights, axes)
        num_experts, width = weights[0].shape[0], weights[0].shape[axes[0].index("expert_ffn")]
        by_expert, by_width = self.mesh_axes(("experts", "expert_ffn"), (num_experts, width))
        token_spec = self.spec(("batch", "length", None), x_BTD.shape)
        token_axes = sum(self.mesh_axes(("batch", "length"), x_BTD.shape[:2]), ())
        by_width = tuple(axis for axis in by_width if axis not in token_axes)
        local_width = width // math.prod(self.sizes[axis] for axis in by_width)
        if any(local_width % tile for w in weights for tile in quantization_tile(w) or ()):
            by_width = ()  # dividing it would cut tiles that share a scale
        gathered_axes = set(token_axes) - set(by_expert)

        def divided(w, names):
            """The mesh axes that divide a weight (one array, or values and scales) where it enters the shard_map, to be
            used or gathered there. The compiler gathers over the other axes: where tokens are not divided, all devices
            need the same."""
            use = {"experts": by_expert, "expert_ffn": by_width}

            def spec(leaf) -> PartitionSpec:
                return _spec(
                    use.get(name) or tuple(axis for axis in by_axes if axis in gathered_axes)
                    for name, by_axes in zip(names, self.mesh_axes(names, leaf.shape), strict=True)
                )

            return jax.tree.map(spec, w)

        weight_specs = tuple(divided(*pair) for pair in zip(weights, axes, strict=True))
        exchange = self.dispatch.on(self.device)

        def local(weights, x_BTD, ids_BTK, gates_BTK):
            weights = tuple(
                jax.tree.map(lambda leaf, spec: _gather(leaf, spec, gathered_axes), *pair)
                for pair in zip(weights, weight_specs, strict=True)
            )
            weights = vary(weights, token_axes)
            x_ND, ids_NK, gates_NK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, ids_BTK, gates_BTK))
            x_ND, overflows = vary(x_ND, by_width), jnp.zeros((), jnp.int32)
            given = (apply, combine, weights, x_ND, ids_NK, gates_NK)
            if not by_expert:
                y_ND = combine(apply(weights, x_ND, ids_NK), gates_NK, x_ND.dtype)
            elif exchange == "gather" or not set(by_expert) <= set(token_axes):
                y_ND = gathered(*given, axes=by_expert, token_axes=token_axes)
            else:
                ragged = exchange == "ragged"
                y_ND, overflows = dispatched(*given, axes=by_expert, config=self.dispatch, ragged=ragged)
            y_ND = lax.psum(y_ND, by_width) if by_width else y_ND
            return y_ND.reshape(x_BTD.shape), overflows

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(weight_specs, token_spec, token_spec, token_spec),
            out_specs=(token_spec, PartitionSpec()),
        )(weights, x_BTD, ids_BTK, gates_BTK)


def _inside_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _spec(axes: Iterable[tuple[str, ...]]) -> PartitionSpec:
    """From the mesh axes of each dimension."""
    return PartitionSpec(*(by_axes or None for by_axes in axes))


def _gather(w: jax.Array, spec: PartitionSpec, axes: Collection[str]) -> jax.Array:
    """`w`, divided as `spec` says, made whole along those dimensions that `axes` divide."""
    for dimension, by_axes in enumerate(spec):
        by_axes = (by_axes,) if isinstance(by_axes, str) else by_axes or ()
        if by_axes and set(by_axes) <= set(axes):
            w = lax.all_gather(w, by_axes, axis=dimension, tiled=True)
    return w
