"""The network on a mesh."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.model.placement import Placement, combine
from deepseek_jax.parallel.dispatch import DispatchConfig, dispatched, gathered
from deepseek_jax.parallel.dual_batch import dual_batch_block
from deepseek_jax.parallel.rules import Rules, build_rules, divide
from kernels_pallas import QTensor, vary
from kernels_pallas.implementations import device_kind

TILE = 128  # numbers that share a scale where a product quantizes its weight itself


def tile_of(w: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a weight that comes quantized; None for any other."""
    tiles = [
        leaf.tile
        for leaf in jax.tree.leaves(w, is_leaf=lambda leaf: isinstance(leaf, QTensor))
        if isinstance(leaf, QTensor)
    ]
    return tiles[0] if tiles else None


@dataclasses.dataclass(frozen=True)
class MeshPlacement(Placement):
    """Places by `rules`; the compiler (GSPMD) moves whatever a product needs. What it can't know or gets wrong is
    written out with `shard_map`: experts that tokens travel to, attention over a divided sequence, and the look-up in a
    divided embedding. A dimension that the mesh does not divide evenly stays whole."""

    mesh: Mesh
    rules: Rules = build_rules()
    dispatch: DispatchConfig = DispatchConfig()

    @property
    def device_kind(self) -> str:
        return device_kind(self.mesh.devices.flat[0])

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

    def schedule(self, block: type) -> type:
        return dual_batch_block(block) if self.dispatch.dual_batch else block

    def mesh_axes(
        self, names: Sequence[str | None], shape: Sequence[int], prefix: str = ""
    ) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that divide each dimension of an array; `prefix` looks rows up under another name first."""
        return divide(dict(self.rules), self.sizes, names, shape, prefix)

    def spec(self, names: Sequence[str | None], shape: Sequence[int], prefix: str = "") -> PartitionSpec:
        return PartitionSpec(*(axes or None for axes in self.mesh_axes(names, shape, prefix)))

    def sharding(self, names: Sequence[str | None], shape: Sequence[int], prefix: str = "") -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(names, shape, prefix))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def part(self, shape: Sequence[int], names: Sequence[str | None]) -> tuple[int, ...]:
        if jax.sharding.get_abstract_mesh().manual_axes:  # in a `shard_map` already
            return tuple(shape)
        return self.sharding(names, shape).shard_shape(tuple(shape))

    def flatten(self, x_BTD: jax.Array) -> jax.Array:
        """Two divided axes can't become one without moving their parts."""
        return x_BTD if self._shards("length") > 1 else super().flatten(x_BTD)

    def multiply(self, multiply: Callable[..., jax.Array], w: Any, names: Sequence[str], *x: jax.Array) -> jax.Array:
        """Every device multiplies its rows. What divides the rows too is gathered here, and w's gradient summed and
        divided again on the way back; what does not (tensor) divides the product, if its parts are whole tiles: sums
        over D are then added up."""
        if jax.sharding.get_abstract_mesh().manual_axes:  # in a `shard_map` already
            return multiply(*x, w)
        rows = self.mesh_axes(("batch", "length")[: x[0].ndim - 1], x[0].shape[:-1])
        row_axes = set(sum(rows, ()))

        def divided(leaf) -> tuple[tuple[str, ...], ...]:
            parts = self.mesh_axes(names, leaf.shape)
            gathered = (bool(axes) and row_axes.issuperset(axes) for axes in parts)
            tiled = (
                part % tile == 0
                for part, tile in zip(self.part(w.shape, names), tile_of(w) or (TILE, TILE), strict=True)
            )
            return tuple(
                axes if here or (whole and row_axes.isdisjoint(axes)) else ()
                for axes, here, whole in zip(parts, gathered, tiled, strict=True)
            )

        specs = jax.tree.map(lambda leaf: PartitionSpec(*(axes or None for axes in divided(leaf))), w)
        inner, outer = (() if row_axes.issuperset(axes) else axes for axes in divided(w))

        def local(w, *x):
            w = jax.tree.map(lambda leaf, spec: self._gather(leaf, spec, row_axes), w, specs)
            y = multiply(*x, w)
            return lax.psum(y, inner) if inner else y

        x_spec, y_spec = (PartitionSpec(*(axes or None for axes in (*rows, last))) for last in (inner, outer))
        return jax.shard_map(local, mesh=self.mesh, in_specs=(specs, *(x_spec for _ in x)), out_specs=y_spec)(w, *x)

    def look_up(self, table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        """Every device looks up its columns of the embedding for the tokens of all its peers, and they exchange what
        they found: as many numbers as the result has, where gathering the table would move all of it."""
        vocab_axes, width_axes = self.mesh_axes(("vocab", "embed"), table_VD.shape)
        token_spec = self.spec(("batch", "length"), ids_BT.shape)
        token_axes = sum(self.mesh_axes(("batch", "length"), ids_BT.shape), ())
        # the others' tokens are the same: gathered
        width_axes = tuple(axis for axis in width_axes if axis in token_axes)
        # the others' rows are of other tokens: gathered
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

    def on_each_device(
        self, kernel: Callable[..., jax.Array], names: Sequence[Sequence[str | None]], *arrays: jax.Array
    ) -> jax.Array:
        if jax.sharding.get_abstract_mesh().manual_axes:  # in a `shard_map` already
            return kernel(*arrays)
        specs = tuple(self.spec(axes, x.shape) for axes, x in zip(names, arrays, strict=True))
        return jax.shard_map(kernel, mesh=self.mesh, in_specs=specs, out_specs=specs[0])(*arrays)

    def attend(self, core: Callable[..., jax.Array], queries: Any, keys: Any, weights: Any) -> jax.Array:
        """Every device keeps its queries; what the keys are made of is gathered: for MLA c_kv and the rotary key, 576
        numbers a token in V3, not the keys and values of 128 heads."""
        names = ("batch", "length", "heads")
        first_query = jax.tree.leaves(queries)[0]
        _, length_axes, head_axes = self.mesh_axes(names, first_query.shape[:3])  # an axis of both divides the length
        if not length_axes:
            return super().attend(core, queries, keys, weights)

        def local(queries, keys, weights):
            keys = jax.tree.map(lambda x: lax.all_gather(x, length_axes, axis=1, tiled=True), keys)
            local_queries = jax.tree.leaves(queries)[0].shape[1]
            return core(queries, keys, weights, lax.axis_index(length_axes) * local_queries)

        def along(x):
            """[B, T], [B, T, ·], or [B, T, heads, …]"""
            axes = (names if x.ndim > 3 else names[:2]) + (None,) * (x.ndim - 3 if x.ndim > 3 else x.ndim - 2)
            return self.spec(axes, x.shape)

        out_shape = jax.eval_shape(lambda *args: core(*args, 0), queries, keys, weights).shape
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(
                jax.tree.map(along, queries),
                jax.tree.map(along, keys),
                jax.tree.map(lambda x: PartitionSpec(None, head_axes or None, None), weights),
            ),
            out_specs=self.spec((*names, *(None,) * (len(out_shape) - 3)), out_shape),
        )(queries, keys, weights)

    def experts(
        self,
        apply: Callable[..., jax.Array],
        weights: Any,
        axes: Any,
        x_BTD: jax.Array,
        ids_BTK: jax.Array,
        gates_BTK: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens travel to their experts (see `dispatch`), which any number of mesh axes may divide, those of the
        tokens or others.

        The feed-forward width stays divided by axes that do not divide tokens, and its partial sums are added up.
        Weights divided otherwise are gathered, and their gradients summed and divided again on the way back.
        """
        num_experts, width = weights[0].shape[0], weights[0].shape[axes[0].index("expert_ffn")]
        by_expert, by_width = self.mesh_axes(("experts", "expert_ffn"), (num_experts, width))
        token_spec = self.spec(("batch", "length", None), x_BTD.shape)
        token_axes = sum(self.mesh_axes(("batch", "length"), x_BTD.shape[:2]), ())
        by_width = tuple(axis for axis in by_width if axis not in token_axes)
        width_part = width // math.prod(self.sizes[axis] for axis in by_width)
        if any(width_part % tile for w in weights for tile in tile_of(w) or ()):
            by_width = ()  # a part would cut tiles that share a scale
        gathered_axes = set(token_axes) - set(by_expert)

        def divided(w, names):
            """Where parts of a weight, which may be several arrays such as values and scales, are used or gathered in
            here. What else divides it, the compiler gathers: where tokens are not divided, all devices need the
            same."""
            use = {"experts": by_expert, "expert_ffn": by_width}

            def spec(leaf) -> PartitionSpec:
                parts = (
                    use.get(name) or tuple(axis for axis in part if axis in gathered_axes)
                    for name, part in zip(names, self.mesh_axes(names, leaf.shape), strict=True)
                )
                return PartitionSpec(*(part or None for part in parts))

            return jax.tree.map(spec, w)

        weight_specs = tuple(divided(*pair) for pair in zip(weights, axes, strict=True))
        kind = self.dispatch.on(self.device_kind)

        def local(weights, x_BTD, ids_BTK, gates_BTK):
            weights = tuple(
                jax.tree.map(lambda leaf, spec: self._gather(leaf, spec, gathered_axes), *pair)
                for pair in zip(weights, weight_specs, strict=True)
            )
            weights = vary(weights, token_axes)
            x_ND, ids_NK, gates_NK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, ids_BTK, gates_BTK))
            x_ND, overflows = vary(x_ND, by_width), jnp.zeros((), jnp.int32)
            if not by_expert:
                y_ND = combine(apply(weights, x_ND, ids_NK), gates_NK, x_ND.dtype)
            elif kind == "gather" or not set(by_expert) <= set(token_axes):
                y_ND = gathered(apply, weights, x_ND, ids_NK, gates_NK, axes=by_expert, token_axes=token_axes)
            else:
                y_ND, overflows = dispatched(
                    apply, weights, x_ND, ids_NK, gates_NK, axes=by_expert, config=self.dispatch, kind=kind
                )
            y_ND = lax.psum(y_ND, by_width) if by_width else y_ND
            return y_ND.reshape(x_BTD.shape), overflows

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(weight_specs, token_spec, token_spec, token_spec),
            out_specs=(token_spec, PartitionSpec()),
        )(weights, x_BTD, ids_BTK, gates_BTK)

    def _gather(self, w: jax.Array, spec: PartitionSpec, axes: Collection[str]) -> jax.Array:
        """`w`, of which this device has a part as `spec` says, whole along those dimensions that `axes` divide."""
        for dimension, part in enumerate(spec):
            part = (part,) if isinstance(part, str) else part or ()
            if part and set(part) <= set(axes):
                w = lax.all_gather(w, part, axis=dimension, tiled=True)
        return w
