"""Chips that a program can be compiled for: peak rates, memory and links, each with its source.

A price is that of one chip for an hour on demand, without discounts, in a US region. TPUs: Google Cloud, as SkyPilot's
catalog lists it (github.com/skypilot-org/skypilot-catalog, catalogs/v8/gcp/vms.csv: v5e us-central1, v5p us-east5, v6e
us-central1; read 2026-11-28). H100: an eighth of AWS p5.48xlarge, $55.04 in us-east-1 (2026-11-09). H200: an eighth of
AWS p5en.48xlarge, $63.296 in us-east-1 (2026-08-06). H800: the rent that the V3 report assumes. Prices change;
`--dollars_per_hour` takes yours.

All figures are per chip and dense (no sparsity): FLOP/s, bytes, bytes/s in one direction. JAX shows some chips as
several devices (`devices`): a TPU v4 and a TPU7x as their two cores, each with half of the chip.
"""

import dataclasses
from collections.abc import Iterable

import jax

from deepseek_jax.errors import ConfigError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    `bf16`, `fp8`, `int8` are peak operations per second, None where the matrix unit lacks the mode (it then runs at the
    bf16 rate or not at all). `hbm_bytes` is what a program may use: the compiler's own limit for TPUs, the device's
    memory for GPUs. `links` go to neighbors in a torus of `torus_axes` axes, or (0 axes) to a switch that joins a
    host's chips; each carries `link_bandwidth` each way. `host_bandwidth` is a chip's share of the network between
    slices (TPU) or hosts (GPU). `dollars_per_hour` is an on-demand list price, None where none is published;
    `price_source` names the seller and the day. `offloads`: the compiler moves collectives, gathers and sorts to
    SparseCores unless it is told not to.
    """

    name: str
    devices: int
    bf16: float
    fp8: float | None
    int8: float | None
    hbm_bytes: int
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    torus_axes: int
    host_bandwidth: float
    sources: str
    dollars_per_hour: float | None = None
    price_source: str = ""
    offloads: bool = False

    def peak(self, number_format: str = "bf16") -> float:
        """FLOP/s of matrix products in `number_format`; a format that the matrix unit lacks runs as bf16."""
        return getattr(self, number_format) or self.bf16


# host: one 400 Gb/s port a GPU
_HOPPER = dict(devices=1, bf16=989.5e12, fp8=1979e12, int8=1979e12, torus_axes=0, host_bandwidth=50e9)
_CLOUD = "docs.cloud.google.com/tpu/docs/"
_GOOGLE = "Google Cloud on demand, 2026-11-28"

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 2, 275e12, None, 275e12, round(2 * 15.25 * GIB), 1228e9, 6, 50e9, 3, 3.1e9,
             f"{_CLOUD}v4; HBM: libtpu 0.0.42"),
        Chip("v5e", 1, 197e12, None, 393e12, round(15.75 * GIB), 819e9, 4, 50e9, 2, 3.1e9,
             f"{_CLOUD}v5e; HBM: libtpu 0.0.42", 1.20, _GOOGLE),
        Chip("v5p", 1, 459e12, None, 918e12, round(95.74 * GIB), 2765e9, 6, 100e9, 3, 6.25e9,
             f"{_CLOUD}v5p; int8: jax tpu_info; HBM: libtpu 0.0.42", 4.20, _GOOGLE),
        Chip("v6e", 1, 918e12, None, 1836e12, round(31.25 * GIB), 1640e9, 4, 100e9, 2, 12.5e9,
             f"{_CLOUD}v6e; HBM: libtpu 0.0.42", 2.70, _GOOGLE),
        Chip("tpu7x", 2, 2307e12, 4614e12, None, round(2 * 94.75 * GIB), 7380e9, 6, 100e9, 3, 12.5e9,
             f"{_CLOUD}tpu7x; HBM: libtpu 0.0.42", offloads=True),
        Chip("h100", hbm_bytes=84_929_347_584, hbm_bandwidth=3352e9, links=18, link_bandwidth=25e9,
             sources="NVIDIA H100 SXM data sheet; memory: OpenXLA h100_sxm target",
             dollars_per_hour=6.88, price_source="AWS p5.48xlarge, 2026-11-09", **_HOPPER),
        Chip("h200", hbm_bytes=151_397_597_184, hbm_bandwidth=4800e9, links=18, link_bandwidth=25e9,
             sources="NVIDIA H200 SXM data sheet; memory: OpenXLA h200 target",
             dollars_per_hour=7.912, price_source="AWS p5en.48xlarge, 2026-08-06", **_HOPPER),
        # V3's machine: an H100 with less NVLink (§3.1-3.2 and "Insights into DeepSeek-V3": 160 GB/s that arrive, IB 50
        # GB/s) and the price of its Table 1.
        Chip("h800", hbm_bytes=84_929_347_584, hbm_bandwidth=3352e9, links=8, link_bandwidth=25e9,
             sources="V3 §3.2, Table 1; otherwise H100",
             dollars_per_hour=2.0, price_source="V3 report, Table 1, 2024-12", **_HOPPER),
        Chip("b200", 1, 2250e12, 4500e12, 4500e12, 191_514_411_008, 7672e9, 18, 50e9, 0, 50e9,
             "NVIDIA HGX B200 data sheet (1000 W); memory: OpenXLA b200 target"),
    )
}  # fmt: skip


def chip(name: str) -> Chip:
    """The chip called `name`; raises ConfigError with the nearest name."""
    if name not in CHIPS:
        raise ConfigError(f"unknown chip {name!r}: {nearest(name, CHIPS)}")
    return CHIPS[name]


# jax's names for the devices of a chip. Cards of the same name at another rate (an H100 PCIe, an H200 NVL) are left
# out.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA H800": "h800",
    "NVIDIA B200": "b200",
}


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """FLOP/s in bfloat16 of the chips that the devices belong to; None if one is not in the table.

    Two devices may be the cores of one chip, and one device may be a whole chip of two cores: TPUs say where on the
    chip they are.
    """
    chips = {}
    for device in devices:
        if device.device_kind not in DEVICE_KINDS:
            return None
        place = getattr(device, "coords", device.id)
        chips[getattr(device, "slice_index", 0), place if isinstance(place, int) else tuple(place)] = CHIPS[
            DEVICE_KINDS[device.device_kind]
        ]
    return sum(chip.bf16 for chip in chips.values())
