"""Topologies: devices that are not there, by a name such as v5p:8x8x16 or h100:64, for XLA to compile for.

TPUs come from libtpu, NVIDIA GPUs from the CUDA plugin and a description of the device; neither needs hardware or a
driver.
"""

import dataclasses
import functools
import importlib.metadata
import os
import re

import jax
import numpy as np
from jax.experimental import topologies

from deepseek_jax.accounting.chips import CHIPS, Chip
from deepseek_jax.errors import ConfigError, UserError, nearest
from kernels_pallas.targets import B200, H100, H200

INSTALL = "pip install -e '.[aot]'"
GPUS_PER_HOST = 8

# What libtpu and the CUDA plugin ask their surroundings, answered for a host that has neither TPU nor GPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server
    # any that libtpu knows: the topology is named in full, and one that it does not know makes it complain
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no hold of a chip, so several processes may
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no cuDNN
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`devices` in XLA's order, on `slices` slices joined by the host network; `torus` is the shape of one slice in
    chips, () behind a switch."""

    name: str
    chip: Chip
    devices: tuple
    torus: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return len(self.devices) // self.chip.devices

    @property
    def hbm_bytes_per_device(self) -> int:
        return self.chip.hbm_bytes // self.chip.devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """True for the axes that close to a ring: 3D slices made of whole 4x4x4 cubes, and the full 16 of a 2D pod."""
        if len(self.torus) == 3:
            return (all(size % 4 == 0 for size in self.torus),) * 3
        return tuple(size == 16 for size in self.torus)


def topology(name: str) -> Topology:
    """The topology called `name`: CHIP:AxB (v5e, v6e), CHIP:AxBxC (v4, v5p, tpu7x), either with *SLICES, or GPU:COUNT
    (h100, h200, h800, b200).

    Raises ConfigError for an unknown name and UserError where libtpu or the CUDA plugin is missing.
    """
    prepare()
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if match is None:
        raise ConfigError(
            f"topology {name!r}: give a chip and its arrangement, such as v5p:8x8x16, v6e:16x16*2 (two slices) or "
            f"h100:64; chips: {', '.join(CHIPS)}"
        )
    if match[1] not in CHIPS:
        raise ConfigError(f"topology {name!r}: no chip {match[1]!r}; {nearest(match[1], CHIPS)}")
    chip, shape, slices = CHIPS[match[1]], tuple(map(int, match[2].split("x"))), int(match[3] or 1)
    if min(*shape, slices) < 1:
        raise ConfigError(f"topology {name!r}: every size must be at least 1")
    return _tpus(name, chip, shape, slices) if chip.torus_axes else _gpus(name, chip, shape, slices)


def prepare() -> None:
    """Sets the environment variables of libtpu and the CUDA plugin, unless they are set. Call it before jax starts its
    backends."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)


def installed(chip: Chip) -> bool:
    """True if the compiler for this chip is installed: libtpu or the CUDA plugin."""
    packages = ("libtpu",) if chip.torus_axes else ("jax-cuda13-plugin", "jax-cuda12-plugin")
    return any(_version(package) for package in packages)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tpus(name: str, chip: Chip, shape: tuple[int, ...], slices: int) -> Topology:
    if len(shape) != chip.torus_axes:
        example = "x".join(["4"] * chip.torus_axes)
        raise ConfigError(
            f"topology {name!r}: {chip.name} chips form a {chip.torus_axes}D torus, for example {chip.name}:{example}"
        )
    if not installed(chip):
        raise UserError(f"topology {name!r} needs libtpu, which is not installed: {INSTALL}")
    try:
        devices = _tpu_devices(f"{chip.name}:{'x'.join(map(str, shape))}", slices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology {name!r}: libtpu refuses it ({str(error).splitlines()[0]})") from error
    return Topology(name, chip, devices, shape, slices)


@functools.cache
def _tpu_devices(name: str, slices: int) -> tuple:
    # Hosts hold 2x2 chips; a smaller arrangement is one host of its own.
    shape = list(map(int, name.partition(":")[2].split("x"))) + [1]
    bounds = tuple(min(size, limit) for size, limit in zip(shape, (2, 2, 1), strict=False))
    options = {"chips_per_host_bounds": bounds} if bounds != (2, 2, 1) else {}
    if slices > 1:
        options["num_slices"] = slices
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def _gpus(name: str, chip: Chip, shape: tuple[int, ...], slices: int) -> Topology:
    if len(shape) != 1 or slices != 1:
        raise ConfigError(f"topology {name!r}: give the number of GPUs, for example {chip.name}:64")
    count = shape[0]
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise ConfigError(
            f"topology {name!r}: {GPUS_PER_HOST} GPUs a host; {count} is not a multiple, "
            f"{count - count % GPUS_PER_HOST} is"
        )
    if not installed(chip):
        raise UserError(f"topology {name!r} needs the CUDA plugin, which is not installed: {INSTALL}")
    try:
        devices = _gpu_devices(chip.name, max(count // GPUS_PER_HOST, 1), min(count, GPUS_PER_HOST))
    except NotImplementedError as error:
        raise UserError(
            f"topology {name!r}: the CUDA plugin did not start; set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 before jax is "
            "used for the first time"
        ) from error
    return Topology(name, chip, devices, ())


@functools.cache
def _gpu_devices(name: str, hosts: int, per_host: int) -> tuple:
    description = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{hosts}x{per_host}", target_config=target_config(CHIPS[name])
    )
    return tuple(description.devices)


_LIKE = {"h100": H100, "h200": H200, "h800": H100, "b200": B200}


def target_config(chip: Chip) -> str:
    """The text of stream_executor.GpuTargetConfigProto that describes a GPU to XLA."""
    kind = f"NVIDIA {chip.name.upper()}"
    return dataclasses.replace(
        _LIKE[chip.name], kind=kind, memory=chip.hbm_bytes, bandwidth=round(chip.hbm_bandwidth)
    ).proto()


def places(devices) -> dict[str, np.ndarray]:
    """The location of each device of a mesh, in its order: int [N] "chip" and "island" (slice of a TPU, host of GPUs:
    the chips that fast links join), int [N, 3] "coords" in the torus (zeros for GPUs)."""
    flat = np.asarray(devices, dtype=object).reshape(-1)
    if flat[0].platform != "tpu":
        return {
            "chip": np.arange(len(flat)),
            "island": np.array([device.process_index for device in flat]),
            "coords": np.zeros((len(flat), 3), int),
        }
    island = np.array([getattr(device, "slice_index", None) or 0 for device in flat])
    coords = np.array([device.coords for device in flat])
    _, chip = np.unique(np.column_stack([island, coords]), axis=0, return_inverse=True)
    return {"chip": chip.reshape(-1), "island": island, "coords": coords}
