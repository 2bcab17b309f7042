"""Chips against what jax and libtpu know of them; names of topologies, and what is wrong with a wrong one."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.accounting.chips import CHIPS, DEVICE_KINDS, GIB, chip, peak_flops
from deepseek_jax.dry_run import topologies
from deepseek_jax.dry_run.topologies import places, topology
from deepseek_jax.errors import ConfigError, UserError

TPUS = [name for name, chip in CHIPS.items() if chip.torus_axes]
NEEDS_LIBTPU, NEEDS_CUDA = pytest.mark.aot(chip="v5p"), pytest.mark.aot(chip="h100")


@pytest.mark.parametrize(
    "name, kind, cores",
    [("v5e", "TPU v5 lite", 1), ("v5p", "TPU v5", 2), ("v6e", "TPU v6 lite", 1), ("tpu7x", "TPU7x", 2)],
)
def test_chips_as_jax_knows_them(name, kind, cores):
    """jax's own table, which is for one of a chip's `cores`; it rounds, and has v5p's memory 11% slower than Google's
    page."""
    from jax.experimental.pallas import tpu as pltpu
    from jax.sharding import AbstractDevice, AbstractMesh

    ours = CHIPS[name]
    device = AbstractDevice(device_kind=kind, num_cores=cores // ours.devices, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("d",), abstract_device=device)):
        theirs = pltpu.get_tpu_info()
    assert ours.bf16 == pytest.approx(theirs.bf16_ops_per_second * cores, rel=0.01)
    assert (ours.fp8 or 0) == pytest.approx(theirs.fp8_ops_per_second * cores, rel=0.01) or name == "v6e"
    assert ours.hbm_bandwidth == pytest.approx(theirs.mem_bw_bytes_per_second * cores, rel=0.13)
    assert ours.hbm_bytes == pytest.approx(theirs.hbm_capacity_bytes * cores, rel=0.1)


@NEEDS_LIBTPU
@pytest.mark.parametrize("name", TPUS)
def test_memory_is_what_libtpu_allows(name):
    """A program that needs far too much is refused with the limit."""
    device = topology(f"{name}:{'2x2x1' if CHIPS[name].torus_axes == 3 else '2x2'}").devices[0]
    x = jax.ShapeDtypeStruct((2**20, 2**18), jnp.int8, sharding=NamedSharding(Mesh(np.array([device]), ("d",)), P()))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refused:
        jax.jit(lambda x: x.T + 1).lower(x).compile()
    limit = float(re.search(r"(?:HBM \(|of )([\d.]+)G", str(refused.value))[1])
    assert limit * GIB == pytest.approx(CHIPS[name].hbm_bytes / CHIPS[name].devices, rel=1e-3)


def test_peaks_by_number_format():
    assert chip("h100").peak("fp8") == 2 * chip("h100").peak()
    assert chip("v5p").peak("fp8") == chip("v5p").peak("bf16") == 459e12
    with pytest.raises(ConfigError, match="did you mean 'v5p'"):
        chip("v5pp")


def test_prices_have_a_source_and_a_date():
    prices = {name: chip.dollars_per_hour for name, chip in CHIPS.items() if chip.dollars_per_hour is not None}
    assert prices == {"v5e": 1.20, "v5p": 4.20, "v6e": 2.70, "h100": 55.04 / 8, "h200": 63.296 / 8, "h800": 2.0}
    assert all(re.search(r", 20\d\d-\d\d", CHIPS[name].price_source) for name in prices)


@NEEDS_LIBTPU
@pytest.mark.parametrize(
    "name, devices, chips, wraps",
    [
        ("v5e:1x1", 1, 1, (False, False)),
        ("v5e:8x16", 128, 128, (False, True)),
        ("v6e:4x4*2", 32, 32, (False, False)),
        ("v4:2x2x1", 8, 4, (False, False, False)),
        ("v5p:8x8x16", 1024, 1024, (True, True, True)),
        ("tpu7x:4x4x8", 256, 128, (True, True, True)),
    ],
)
def test_tpu_topologies(name, devices, chips, wraps):
    target = topology(name)
    assert (len(target.devices), target.num_chips, target.wraps) == (devices, chips, wraps)
    where = places(target.devices)
    assert len(set(where["chip"])) == chips
    assert len(set(where["island"])) == target.slices
    assert where["coords"].max(axis=0)[: len(target.torus)].tolist() == [size - 1 for size in target.torus]


@NEEDS_CUDA
@pytest.mark.parametrize("name, hosts", [("h100:4", 1), ("h200:64", 8), ("b200:2048", 256), ("h800:2048", 256)])
def test_gpu_topologies(name, hosts):
    target = topology(name)
    assert target.num_chips == len(target.devices) == int(name.partition(":")[2])
    assert len(set(places(target.devices)["island"])) == hosts
    assert target.devices[0].device_kind == f"NVIDIA {target.chip.name.upper()}"


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5p", "such as v5p:8x8x16"),
        ("v7x:4x4x4", "no chip 'v7x'.*v6e"),
        ("v5p:4x4", "3D torus, for example v5p:4x4x4"),
        ("v6e:0x4", "at least 1"),
        ("h100:2x4", "the number of GPUs"),
        ("h100:12", "not a multiple, 8 is"),
        pytest.param("v6e:3x5", "libtpu refuses it", marks=NEEDS_LIBTPU),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ConfigError, match=message):
        topology(name)


@pytest.mark.parametrize("name", ["v5e:2x2", "h100:8"])
def test_missing_compilers_say_what_to_install(name, monkeypatch):
    monkeypatch.setattr(topologies, "_version", lambda package: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[aot\]'"):
        topology(name)


def test_the_environment_that_is_set_stays(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    topologies.prepare()
    assert topologies.os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert topologies.os.environ["TPU_SKIP_MDS_QUERY"] == "1"


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as jax describes it."""

    id: int
    device_kind: str


@dataclasses.dataclass(frozen=True)
class Core(Device):
    coords: tuple[int, int, int] = (0, 0, 0)
    slice_index: int = 0


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([Device(i, "NVIDIA H100 80GB HBM3") for i in range(8)], 8 * 989.5e12),
        ([Core(0, "TPU v5 lite")], 197e12),
        ([Core(i, "TPU v5p", (i, 0, 0)) for i in range(4)], 4 * 459e12),
        ([Core(i, "TPU7x", (i // 2, 0, 0)) for i in range(4)], 2 * 2307e12),  # two cores to a chip
        ([Core(i, "TPU v4", (i, 0, 0)) for i in range(4)], 4 * 275e12),  # a device that is a whole chip
        ([Core(i, "TPU v6 lite", (0, 0, 0), slice_index=i) for i in range(2)], 2 * 918e12),
        ([Device(0, "NVIDIA H100 PCIe")], None),
        ([Device(0, "cpu")], None),
        ([Device(0, "NVIDIA H200"), Device(1, "something new")], None),
    ],
)
def test_peak_of_the_devices_that_jax_names(devices, expected):
    assert peak_flops(devices) == expected


def test_every_chip_has_a_name_that_jax_gives():
    assert set(DEVICE_KINDS.values()) == set(CHIPS)


@NEEDS_LIBTPU
def test_libtpu_makes_no_noise():
    """It is told of a machine that it knows, on a host that has none."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    code = "from deepseek_jax.dry_run.topologies import topology; print(len(topology('v5e:2x2').devices))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=unset | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "4\n", "")
