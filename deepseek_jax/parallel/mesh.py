"""The mesh: the sizes of its axes, and the order of the devices along them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from deepseek_jax.errors import ConfigError
from deepseek_jax.fields import build
from deepseek_jax.parallel.dispatch import DispatchConfig

LARGEST = 2**17  # devices of a mesh; a typing mistake should not be searched for its nearest neighbors
# Outermost first. Devices that communicate most are closest. Axes that divide the sequences of a batch come before the
# others, so that the sequences of a host are one block.
AXES = ("data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """`config.mesh` of an experiment. The sizes multiply to the number of devices; one of them may be -1, the rest.

    data     replicas of the weights, each with its share of the batch
    fsdp     shares of the batch and of weights and optimizer state
    expert   shares of the batch and of the experts: tokens travel to their experts and back
    context  shares of each sequence; attention gathers the compressed latents
    tensor   shares of heads, feed-forward width and vocabulary

    `dcn` says what factor of an axis lies across the slow network, between slices or hosts: {"data": 4}. `rules`
    replaces rows of `rules.RULES`. `dispatch` says how tokens travel.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    dcn: tuple[tuple[str, int], ...] = ()
    rules: tuple[tuple[str, str | tuple[str, ...] | None], ...] = ()
    dispatch: DispatchConfig = DispatchConfig()

    def __post_init__(self):
        for axis, size in self.sizes.items():
            if not isinstance(size, int) or (size < 1 and size != -1):
                raise ConfigError(f"mesh.{axis}={size!r}: a number of devices, or -1 for the rest")
        if sum(size == -1 for size in self.sizes.values()) > 1:
            raise ConfigError(f"mesh={self.sizes}: only one axis can be -1, the rest")
        devices = math.prod(size for size in self.sizes.values() if size != -1)
        if devices > LARGEST:
            raise ConfigError(f"mesh={self.sizes}: makes up {devices} devices, and at most {LARGEST} are thought of")
        for axis, factor in self.dcn:
            if axis not in AXES:
                raise ConfigError(f"mesh.dcn.{axis}: the axes are {', '.join(AXES)}")
            if factor < 1 or (self.sizes[axis] != -1 and self.sizes[axis] % factor):
                raise ConfigError(f"mesh.dcn.{axis}={factor}: it has to divide mesh.{axis}={self.sizes[axis]}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "MeshConfig":
        return build(cls, fields, "mesh")

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}


Check = Callable[[Mapping[str, int]], str | None]  # sizes of a mesh -> what is wrong with them in a sentence, or None


def resolve(config: MeshConfig, num_devices: int, check: Check = lambda sizes: None) -> dict[str, int]:
    """The sizes of all axes. Raises ConfigError, with the nearest mesh that works, if they don't multiply to
    `num_devices` or don't pass the `check` (see `rules.check_divisible`)."""
    sizes = config.sizes
    known = math.prod(size for size in sizes.values() if size != -1)
    wanted = {axis: max(num_devices // known, 1) if size == -1 else size for axis, size in sizes.items()}
    wrong = None
    if math.prod(wanted.values()) != num_devices:
        wrong = f"{_show(sizes)} does not make up {num_devices} device{'s' if num_devices > 1 else ''}"
    wrong = wrong or check(wanted)
    if wrong is None:
        return wanted
    near = nearest_mesh(wanted, num_devices, check)
    hint = f"the nearest mesh that works is {_show(near)}" if near else f"no mesh of {num_devices} devices works"
    raise ConfigError(f"mesh: {wrong}; {hint}")


def nearest_mesh(wanted: Mapping[str, int], num_devices: int, check: Check) -> dict[str, int] | None:
    """The mesh of `num_devices` that passes the check and whose sizes differ from `wanted` by the smallest factors.

    Among equals, one that uses no further axis, else fsdp rather than the others.
    """
    further = ("fsdp", "data", "expert", "context", "tensor")

    def distance(sizes: Mapping[str, int]) -> tuple[float, int]:
        apart = sum(abs(math.log2(sizes[axis] / wanted[axis])) for axis in AXES)
        return apart, sum(1 + further.index(axis) for axis in AXES if wanted[axis] == 1 < sizes[axis])

    candidates = (dict(zip(AXES, sizes, strict=True)) for sizes in _factorizations(num_devices, len(AXES)))
    return min((sizes for sizes in candidates if check(sizes) is None), key=distance, default=None)


def _factorizations(number: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return list(
        itertools.chain.from_iterable(
            ((d, *rest) for rest in _factorizations(number // d, parts - 1)) for d in divisors
        )
    )


def _show(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "one device"


def build_mesh(sizes: Mapping[str, int], dcn: Mapping[str, int], devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """A mesh with all of `AXES`. The factors in `dcn` run over slices, or hosts where devices have no slices: the slow
    network.

    Inside a slice, devices stand as XLA's collectives expect on its torus (`mesh_utils.create_device_mesh`). Raises
    ConfigError if the product of `dcn` is not the number of slices or hosts.
    """
    outer = [dcn.get(axis, 1) for axis in AXES]
    inner = [sizes[axis] // factor for axis, factor in zip(AXES, outer, strict=True)]
    granules = _granules(devices, math.prod(outer))
    blocks = np.stack([_arrange(inner, granule) for granule in granules]).reshape(*outer, *inner)
    # outer and inner part of an axis side by side
    order = [position for i in range(len(AXES)) for position in (i, len(AXES) + i)]
    return jax.sharding.Mesh(blocks.transpose(order).reshape([sizes[axis] for axis in AXES]), AXES)


def _arrange(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _granules(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice, or of each host: `count` equal groups with a fast network inside."""
    if count == 1:
        return [list(devices)]
    for name in ("slice_index", "process_index"):
        groups: dict[int, list[jax.Device]] = {}
        for device in devices:
            groups.setdefault(getattr(device, name, 0), []).append(device)
        if len(groups) == count:
            return [groups[key] for key in sorted(groups)]
        if len(groups) > 1 and len(groups) % count == 0 and name == "process_index":  # several hosts to a granule
            hosts = [groups[key] for key in sorted(groups)]
            share = len(hosts) // count
            return [sum(hosts[i * share : (i + 1) * share], []) for i in range(count)]
    if len({(getattr(d, "slice_index", 0), d.process_index) for d in devices}) == 1:  # one host stands in for many
        share = len(devices) // count
        return [list(devices[i * share : (i + 1) * share]) for i in range(count)]
    raise ConfigError(
        f"mesh.dcn multiplies to {count}, but the devices form {len({getattr(d, 'slice_index', 0) for d in devices})} "
        "slices "
        f"on {len({d.process_index for d in devices})} hosts: make it one of these numbers"
    )
