"""Expert dispatch: sends tokens to the devices that hold their experts, and the results back. Everything here runs
inside `shard_map`, on one device's arrays.

    N tokens on this device      K choices of a token      P peers, the devices among which the experts are divided
    E experts on this device     S slots to send           R slots to receive

A pair is a token and one of its choices; a buffer has a slot for each pair. Each round sends up to `slots` pairs to
each peer. Normally one round suffices. If any device's buffer would overflow, all devices run several smaller rounds
until every pair has been served: slower, exact, and in no more memory. No pair is ever dropped.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.permute import Permutation, invert, permute, rank_in_group, unpermute
from deepseek_jax.ranges import at_least, check, one_of
from kernels_pallas import PreQuantized, QTensor, Quantizer, dequantize, master, quantize, vary, varying_axes

EXCHANGES = ("auto", "ragged", "padded", "gather")
DTYPES = ("compute", "fp8")
SENT = Quantizer(power_of_two=True, min_amax=1e-30)  # activations and their gradients
Apply = Callable[[Any, jax.Array, jax.Array], jax.Array]  # see `Ops.experts`, for Combine too
Combine = Callable[[jax.Array, jax.Array, jnp.dtype], jax.Array]


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
    """Settings of the way that tokens travel to their experts.

    Every choice gives the same result, but for the rounding of "fp8".

    exchange       "ragged" sends the pairs there are (`ragged_all_to_all`; TPU and GPU); "padded" sends a fixed number
                   to each peer (`all_to_all`); "gather" sends every token to every device of the expert axis and sums
                   the results, which suits few peers or few tokens; "auto" is "padded" on a CPU and "ragged" elsewhere
    buffer_factor  buffers have this many times the slots of a balanced load; "gather" always has room
    dtype          "compute", or "fp8": E4M3 with a power-of-two scale for each 1 x 128 tile on the way to the experts,
                   forward and backward, as in V3 (§3.3.3). Experts in FP8 multiply these very numbers. The results
                   come back in the compute dtype
    dual_batch     every layer runs two halves of the sequences side by side (see `dual_batch.DualBatchBlock`)
    """

    exchange: str = "auto"
    buffer_factor: float = 2.0
    dtype: str = "compute"
    dual_batch: bool = False

    def __post_init__(self):
        check(
            self,
            "mesh.dispatch.",
            exchange=one_of(EXCHANGES),
            dtype=one_of(DTYPES),
            buffer_factor=at_least(1, why="a balanced load fills 1"),
        )

    def on(self, device: str) -> str:
        """The exchange that runs on a kind of device."""
        if self.exchange != "auto":
            return self.exchange
        return "padded" if device == "cpu" else "ragged"


def total(x: jax.Array) -> jax.Array:
    """Sum over all devices on which `x` differs."""
    axes = tuple(varying_axes(x))
    return lax.psum(x, axes) if axes else x


@flax.struct.dataclass
class Plan:
    """One round: every pair's slot, and how many slots go to each peer."""

    permutation: Permutation  # pairs <-> S slots to send
    ids_S: jax.Array  # int32, the slot's expert on its peer; E or more for an empty slot
    sent_P: jax.Array  # int32, slots to each peer and, if they are ragged, their offsets here and at the peer
    sent_offsets_P: jax.Array
    sent_at_peer_P: jax.Array
    received_P: jax.Array  # int32, likewise for the slots that come in
    received_offsets_P: jax.Array
    received_at_peer_P: jax.Array


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The buffers of one round: `slots` for each peer, to send and to receive; "ragged" fills the P · slots received in
    any proportion. Peers are numbered along `axes`, the first axis slowest."""

    axes: tuple[str, ...]
    peers: int
    slots: int
    ragged: bool
    fp8: bool

    def plan(self, dest_NK, rank_NK, ids_NK, sizes_P, low: jax.Array | int, whole: bool) -> Plan:
        """The round of the pairs whose ranks among those for the same peer are low … low + slots - 1; with `whole` of
        every rank, for which ragged buffers have room."""
        width = dest_NK.size if whole and self.ragged else self.slots
        sent_P = jnp.clip(sizes_P - low, 0, width)
        if self.ragged:
            num_slots = dest_NK.size if whole else self.peers * self.slots
            starts_P = jnp.cumsum(sent_P) - sent_P
        else:
            num_slots = self.peers * self.slots
            starts_P = jnp.arange(self.peers, dtype=jnp.int32) * self.slots
        inside_NK = (rank_NK >= low) & (rank_NK < low + width) & (dest_NK < self.peers)
        slots_NK = jnp.where(inside_NK, starts_P[jnp.minimum(dest_NK, self.peers - 1)] + rank_NK - low, num_slots)
        permutation = invert(slots_NK, num_slots)
        # An id beyond the last expert marks an empty slot.
        padded_ids = jnp.concatenate([ids_NK.reshape(-1), jnp.full((1,), jnp.iinfo(jnp.int32).max, jnp.int32)])
        received_P = self._to_peers(sent_P)
        received_offsets_P = jnp.cumsum(received_P) - received_P
        return Plan(
            permutation=permutation,
            ids_S=padded_ids[permutation.pairs_R],
            sent_P=sent_P,
            sent_offsets_P=starts_P,
            sent_at_peer_P=self._to_peers(received_offsets_P),
            received_P=received_P,
            received_offsets_P=received_offsets_P,
            received_at_peer_P=self._to_peers(starts_P),
        )

    def _to_peers(self, x_P: jax.Array) -> jax.Array:
        return lax.all_to_all(x_P, self.axes, 0, 0, tiled=True)

    def move(self, plan: Plan, x_S: jax.Array, fill: int = 0) -> jax.Array:
        """Slots to their peers: [S, …] -> [R, …]."""
        if not self.ragged:
            return lax.all_to_all(x_S, self.axes, 0, 0, tiled=True)
        empty_R = vary(jnp.full((self.peers * self.slots, *x_S.shape[1:]), fill, x_S.dtype), tuple(varying_axes(x_S)))
        return lax.ragged_all_to_all(
            x_S, empty_R, plan.sent_offsets_P, plan.sent_P, plan.sent_at_peer_P, plan.received_P, axis_name=self.axes
        )

    def move_back(self, plan: Plan, y_R: jax.Array) -> jax.Array:
        """Results to where their tokens came from: [R, …] -> [S, …]."""
        if not self.ragged:
            return lax.all_to_all(y_R, self.axes, 0, 0, tiled=True)
        empty_S = vary(
            jnp.zeros((plan.permutation.pairs_R.shape[0], *y_R.shape[1:]), y_R.dtype), tuple(varying_axes(y_R))
        )
        return lax.ragged_all_to_all(
            y_R,
            empty_S,
            plan.received_offsets_P,
            plan.received_P,
            plan.received_at_peer_P,
            plan.sent_P,
            axis_name=self.axes,
        )

    def move_tokens(self, plan: Plan, x_SD: jax.Array) -> jax.Array | PreQuantized:
        """Vectors to their peers, in the format of the dispatch: [S, D] -> [R, D]."""
        if not self.fp8:
            return self.move(plan, x_SD)
        q_SD = quantize(x_SD, SENT, implementation="xla")  # the compiler joins it to the gather of the tokens
        q_RD = QTensor(self.move(plan, q_SD.values), self.move(plan, q_SD.scales), q_SD.tile)
        return PreQuantized(dequantize(q_RD, x_SD.dtype), q_RD)

    def round(self, apply: Apply, combine: Combine, weights, x_ND, gates_NK, plan: Plan) -> jax.Array:
        """The experts' results for this round's pairs, combined: [N, D]."""
        x_RD = send(self, plan, permute(x_ND, plan.permutation))
        ids_R = self.move(plan, plan.ids_S, jnp.iinfo(jnp.int32).max)
        y_RD = apply(weights, x_RD, ids_R[:, None])[:, 0].astype(x_ND.dtype)
        return combine(unpermute(send_back(self, plan, y_RD), plan.permutation), gates_NK, x_ND.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(exchange: Exchange, plan: Plan, x_SD: jax.Array) -> jax.Array | PreQuantized:
    """Dispatch: [S, D] -> [R, D], quantized if that is how it travels: experts in FP8 multiply the very numbers that
    came (V3 §3.3.3). Its gradient is a combine, in x's dtype."""
    return exchange.move_tokens(plan, x_SD)


send.defvjp(
    lambda exchange, plan, x_SD: (send(exchange, plan, x_SD), plan),
    lambda exchange, plan, dx_RD: (None, exchange.move_back(plan, master(dx_RD))),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_back(exchange: Exchange, plan: Plan, y_RD: jax.Array) -> jax.Array:
    """Combine: [R, D] -> [S, D], in y's dtype. Its gradient is a dispatch."""
    return exchange.move_back(plan, y_RD)


send_back.defvjp(
    lambda exchange, plan, y_RD: (send_back(exchange, plan, y_RD), plan),
    lambda exchange, plan, dy_SD: (None, master(exchange.move_tokens(plan, dy_SD))),
)


def buffer_slots(pairs: int, peers: int, factor: float) -> int:
    """Slots for each peer: `factor` times a balanced share, and at least 16, since smaller shares vary too much."""
    return min(pairs, max(-(-int(factor * pairs) // peers), 16))


def dispatched(
    apply: Apply,
    combine: Combine,
    weights,
    x_ND,
    ids_NK,
    gates_NK,
    *,
    axes: tuple[str, ...],
    config: DispatchConfig,
    ragged: bool,
) -> tuple[jax.Array, jax.Array]:
    """The experts' combined results for this device's tokens, [N, D], and the number of devices whose buffers
    overflowed, int32.

    weights: this device's E experts of the P · E that `axes` divide; ids_NK are numbered over all of them. Each device
    has other tokens.
    """
    peers, experts = lax.axis_size(axes), jax.tree.leaves(weights)[0].shape[0]
    slots = buffer_slots(ids_NK.size, peers, config.buffer_factor)
    exchange = Exchange(axes, peers, slots, ragged, config.dtype == "fp8")
    dest_NK, local_ids_NK = ids_NK // experts, ids_NK % experts
    rank_NK, sizes_P = rank_in_group(dest_NK, peers)
    arriving = jnp.sum(lax.all_to_all(sizes_P, axes, 0, 0, tiled=True)) if exchange.ragged else jnp.max(sizes_P)
    overflows = total((arriving > exchange.slots * (peers if exchange.ragged else 1)).astype(jnp.int32))

    def one_round(x_ND, gates_NK, low, whole):
        plan = exchange.plan(dest_NK, rank_NK, local_ids_NK, sizes_P, low, whole)
        return exchange.round(apply, combine, weights, x_ND, gates_NK, plan)

    def rounds(x_ND, gates_NK):
        def add(y_ND, low):
            wanted = total(jnp.max(sizes_P) > low) > 0
            y_ND += lax.cond(
                wanted,
                jax.checkpoint(lambda: one_round(x_ND, gates_NK, low, False).astype(jnp.float32)),
                lambda: jnp.zeros_like(y_ND),
            )
            return y_ND, None

        lows = jnp.arange(0, ids_NK.size, exchange.slots, dtype=jnp.int32)
        zeros_ND = vary(jnp.zeros(x_ND.shape, jnp.float32), varying)
        return lax.scan(add, zeros_ND, lows)[0].astype(x_ND.dtype)

    whole_round = functools.partial(one_round, low=0, whole=True)
    varying = tuple(frozenset().union(*(varying_axes(x) for x in (x_ND, gates_NK, *jax.tree.leaves(weights)))))
    return lax.cond(overflows > 0, rounds, whole_round, x_ND, gates_NK), overflows


def gathered(
    apply: Apply,
    combine: Combine,
    weights,
    x_ND,
    ids_NK,
    gates_NK,
    *,
    axes: tuple[str, ...],
    token_axes: tuple[str, ...],
) -> jax.Array:
    """The same, with all tokens gathered on all devices of the experts' `axes`. Along those that are among `token_axes`
    devices hold different tokens before, along the others the same."""
    own, alike = (tuple(axis for axis in axes if (axis in token_axes) == differ) for differ in (True, False))
    experts = jax.tree.leaves(weights)[0].shape[0]
    first = lax.axis_index(axes) * experts
    if own:
        x_ND, ids_NK, gates_NK = (lax.all_gather(x, own, tiled=True) for x in (x_ND, ids_NK, gates_NK))
    here_NK = (ids_NK >= first) & (ids_NK < first + experts)
    local_ids_NK = jnp.where(here_NK, ids_NK - first, experts)
    y_ND = combine(apply(weights, *vary((x_ND, local_ids_NK), axes)), gates_NK, x_ND.dtype)
    y_ND = lax.psum(y_ND, alike) if alike else y_ND
    return lax.psum_scatter(y_ND, own, tiled=True) if own else y_ND
