"""Roofline: the least time a step can take on matrix units, main memory and links, each for itself.

Compute: FLOPs over the matrix units' peak, float32 products at the bf16 rate. Memory: bytes over HBM bandwidth. Links:
for every chip, bytes over the bandwidth of all its links together, times the hops that an all-to-all or a permute takes
across the torus; an all-gather, a reduce-scatter and an all-reduce pass each piece on from neighbor to neighbor and
take one. Host network: bytes that leave a slice (TPU) or a host (GPU), in the best arrangement: a piece that several
devices of one host need crosses once.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from deepseek_jax.accounting.chips import Chip
from deepseek_jax.dry_run.collectives import Collective
from deepseek_jax.dry_run.topologies import Topology, places

TERMS = ("compute", "hbm", "links", "host_network")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one call of the program on the busiest device; the largest term binds."""

    compute: float
    hbm: float
    links: float
    host_network: float

    @property
    def binding(self) -> str:
        return max(TERMS, key=lambda term: getattr(self, term))

    @property
    def seconds(self) -> float:
        """The lower bound: everything overlaps with the binding term."""
        return getattr(self, self.binding)

    @property
    def seconds_without_overlap(self) -> float:
        """The terms one after another."""
        return sum(getattr(self, term) for term in TERMS)


def roofline(
    flops: Mapping[str, float], hbm_bytes: float, collectives: Iterable[Collective], topology: Topology, mesh_devices
) -> Roofline:
    """The roofline of `flops` of the whole mesh by number format (program_flops), of `hbm_bytes` per device and of the
    traffic; `mesh_devices` in the mesh's order."""
    share = topology.chip.devices  # a device has this part of its chip
    devices = np.asarray(mesh_devices, dtype=object).size
    compute = (
        sum(count / topology.chip.peak(unit(number_format)) for number_format, count in flops.items()) * share / devices
    )
    links, host_network = link_bytes(collectives, topology, mesh_devices)
    return Roofline(
        compute=compute,
        hbm=hbm_bytes * share / topology.chip.hbm_bandwidth,
        links=links * share / link_bandwidth(topology),
        host_network=host_network * share / topology.chip.host_bandwidth,
    )


def unit(number_format: str) -> str:
    """The mode of the matrix unit that multiplies numbers of this format."""
    if number_format.startswith("float8"):
        return "fp8"
    return "int8" if number_format in ("int8", "uint8") else "bf16"


def link_bandwidth(topology: Topology) -> float:
    """Bytes/s one way over all links that a chip of this topology can use; an axis of two chips has one link, an axis
    of one none."""
    chip: Chip = topology.chip
    if not topology.torus:
        return chip.links * chip.link_bandwidth
    links = sum(2 if wraps else min(size - 1, 2) for size, wraps in zip(topology.torus, topology.wraps, strict=True))
    return max(links, 1) * chip.link_bandwidth


def link_bytes(collectives: Iterable[Collective], topology: Topology, mesh_devices) -> tuple[float, float]:
    """Bytes per device and call of the program: (over fast links, times their hops; over the host network)."""
    where = places(mesh_devices)
    on_links = on_hosts = 0.0
    seen: dict[bytes, tuple[float, float, float]] = {}
    for collective in collectives:
        key = collective.kind.encode() + collective.groups.tobytes()
        if key not in seen:
            seen[key] = _shares(collective, where, topology)
        leaves_chip, leaves_island, hops = seen[key]
        scale = collective.buffer_bytes * collective.times
        on_links += scale * (leaves_chip - leaves_island) * hops
        on_hosts += scale * leaves_island
    return float(on_links), float(on_hosts)


def _shares(collective: Collective, where: Mapping[str, np.ndarray], topology: Topology) -> tuple[float, float, float]:
    """The shares of the buffer that one device sends out of its chip and out of its island, and the mean hops inside
    the island."""
    groups, kind = collective.groups, collective.kind
    if kind == "collective-permute":
        out = []
        for domain in (where["chip"], where["island"]):
            source, target = domain[groups[:, 0]], domain[groups[:, 1]]
            leaving = np.bincount(source[source != target], minlength=domain.max() + 1)
            out.append(float((leaving / np.bincount(domain)).max()))
        return *out, _mean_hops(groups[:, :1], groups[:, 1:], where, topology)
    n = groups.shape[1]
    out = []
    for domain in (where["chip"], where["island"]):
        together = max(np.unique(domain[group], return_counts=True)[1].max() for group in groups)
        alone = (n - together) / n
        out.append(alone if kind.endswith("all-to-all") else alone / together * (2 if kind == "all-reduce" else 1))
    return *out, _mean_hops(groups[:64], groups[:64], where, topology) if kind.endswith("all-to-all") else 1.0


def _mean_hops(sources: np.ndarray, targets: np.ndarray, where: Mapping[str, np.ndarray], topology: Topology) -> float:
    """Mean length of the shortest path between different chips of one island, over all (source, target) pairs of a
    row."""
    if not topology.torus:
        return 1.0
    chip, island, coords = where["chip"], where["island"], where["coords"]
    distance = np.abs(coords[sources][:, :, None] - coords[targets][:, None])
    for axis, (size, wraps) in enumerate(zip(topology.torus, topology.wraps, strict=True)):
        if wraps:
            distance[..., axis] = np.minimum(distance[..., axis], size - distance[..., axis])
    counts = (chip[sources][:, :, None] != chip[targets][:, None]) & (
        island[sources][:, :, None] == island[targets][:, None]
    )
    hops = distance.sum(-1)[counts]
    return float(hops.mean()) if hops.size else 1.0
