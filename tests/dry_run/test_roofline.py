"""The terms of the bound against arithmetic by hand on meshes whose traffic is plain to see."""

import dataclasses
import types

import numpy as np
import pytest

from deepseek_jax.accounting.chips import CHIPS
from deepseek_jax.dry_run.collectives import Collective
from deepseek_jax.dry_run.dry_run import bounds
from deepseek_jax.dry_run.roofline import link_bandwidth, link_bytes, roofline
from deepseek_jax.dry_run.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a jax.Device as tells where it stands."""

    process_index: int
    platform: str = "gpu"
    coords: tuple[int, ...] = ()
    slice_index: int = 0


def gpus(hosts: int) -> Topology:
    return Topology("", CHIPS["h100"], tuple(Device(host) for host in range(hosts) for _ in range(8)), ())


def tpus(chip: str, torus: tuple[int, ...], slices: int = 1) -> Topology:
    devices = [
        Device(0, "tpu", coords[::-1], island)
        for island in range(slices)
        for coords in np.ndindex(*torus[::-1])
        for _ in range(CHIPS[chip].devices)
    ]
    return Topology("", CHIPS[chip], tuple(devices), torus, slices)


def collective(kind: str, groups, size: int = 1000, times: int = 1) -> Collective:
    return Collective(kind, size, times, np.array(groups), "", "")


def moved(kind: str, groups, topology: Topology, **changes) -> tuple[float, float]:
    return link_bytes([collective(kind, groups, **changes)], topology, topology.devices)


HOSTS = np.arange(16).reshape(2, 8)


@pytest.mark.parametrize(
    "kind, groups, links, hosts",
    [
        ("all-gather", HOSTS, 875, 0),  # inside a host: 7/8
        ("all-reduce", HOSTS, 1750, 0),
        ("all-to-all", HOSTS, 875, 0),
        # Across both hosts: half of the buffer has to arrive, once a host, by eight ports; the rest of 15/16 comes from
        # next door.
        ("all-gather", HOSTS.reshape(1, 16), 937.5 - 62.5, 62.5),
        ("reduce-scatter", HOSTS.reshape(1, 16), 937.5 - 62.5, 62.5),
        ("all-reduce", HOSTS.reshape(1, 16), 2 * (937.5 - 62.5), 125),
        ("all-to-all", HOSTS.reshape(1, 16), 437.5, 500),  # 7/16 stay, 8/16 leave
        ("ragged-all-to-all", HOSTS.reshape(1, 16), 437.5, 500),
        ("all-gather", HOSTS.T, 0, 500),  # pairs with one GPU on each host
        ("collective-permute", [[0, 1], [1, 2]], 1000, 0),
    ],
)
def test_gpu_hosts(kind, groups, links, hosts):
    assert moved(kind, groups, gpus(2)) == pytest.approx((links, hosts))


def test_runs_add_up():
    assert moved("all-to-all", HOSTS, gpus(2), size=80, times=5) == pytest.approx((5 * 70, 0))


def test_hops_across_a_torus():
    """A ring of 4 has distances 1, 2, 1; on an open line of 4 the mean over ordered pairs is 5/3."""
    ring, line = tpus("v5p", (4, 4, 4)), tpus("v5e", (4, 1))
    everybody = np.arange(4).reshape(1, 4)
    assert moved("all-to-all", everybody, ring) == pytest.approx((750 * 4 / 3, 0))
    assert moved("all-to-all", everybody, line) == pytest.approx((750 * 5 / 3, 0))
    assert moved("all-gather", everybody, ring) == pytest.approx((750, 0))
    assert moved("collective-permute", [[0, 3], [3, 0]], ring)[0] == pytest.approx(1000)
    assert moved("collective-permute", [[0, 3], [3, 0]], line)[0] == pytest.approx(3000)


def test_two_devices_of_one_chip():
    """Traffic between the two cores of a TPU7x uses no link, and data that both need crosses a link once."""
    target = tpus("tpu7x", (2, 1, 1))
    assert moved("all-reduce", [[0, 1], [2, 3]], target) == (0, 0)
    assert moved("all-gather", [[0, 2], [1, 3]], target) == pytest.approx((500, 0))
    assert moved("all-gather", [[0, 1, 2, 3]], target) == pytest.approx((250, 0))
    assert moved("all-to-all", [[0, 1, 2, 3]], target) == pytest.approx((500, 0))


def test_slices_talk_over_the_host_network():
    target = tpus("v5e", (2, 2), slices=2)
    assert moved("all-reduce", [[i, i + 4] for i in range(4)], target) == pytest.approx((0, 1000))
    assert moved("all-gather", [range(8)], target) == pytest.approx((875 - 125, 125))


@pytest.mark.parametrize(
    "chip, torus, links",
    [("v5p", (8, 8, 16), 6), ("v5p", (2, 2, 1), 2), ("v5e", (16, 16), 4), ("v5e", (1, 1), 1), ("v6e", (2, 4), 3)],
)
def test_usable_links(chip, torus, links):
    assert link_bandwidth(tpus(chip, torus)) == links * CHIPS[chip].link_bandwidth


def test_terms_and_what_binds():
    target = gpus(1)
    bound = roofline(
        {"bfloat16": 8 * 989.5e12, "float8_e4m3fn": 8 * 1979e12},
        3352e9 / 2,
        [collective("all-gather", [range(8)], size=10**12)],
        target,
        target.devices,
    )
    assert (bound.compute, bound.hbm, bound.host_network) == pytest.approx((2.0, 0.5, 0.0))
    assert bound.links == pytest.approx(10**12 * 7 / 8 / 450e9)
    assert (bound.binding, bound.seconds) == ("compute", bound.compute)
    assert bound.seconds_without_overlap == pytest.approx(bound.compute + bound.hbm + bound.links)


def test_a_device_has_its_part_of_the_chip():
    """Half a TPU7x has half the peak, the bandwidth and the links: the whole mesh's work takes as long as on whole
    chips."""
    target = tpus("tpu7x", (2, 2, 1))
    bound = roofline({"bfloat16": 4 * 2307e12}, 7380e9 / 2, [], target, target.devices)
    assert (bound.compute, bound.hbm) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    "chip, price, dollars, source",
    [
        ("h100", None, 6.88, "AWS p5.48xlarge, 2026-11-09"),
        ("h100", 3.5, 3.5, "--dollars_per_hour"),
        ("b200", None, None, None),
        ("b200", 9.0, 9.0, "--dollars_per_hour"),
    ],
)
def test_hours_and_dollars(chip, price, dollars, source):
    """A step of two seconds on eight chips, 1,800 times: an hour. A price that is given comes before the list's;
    without either there is none."""
    target = dataclasses.replace(gpus(1), chip=CHIPS[chip])
    plan = types.SimpleNamespace(tokens=1000, calls=1800.0, model_flops=4 * target.chip.bf16)
    found = bounds(plan, target, {"roofline": {"seconds": 2.0}}, price, is_v3=False)
    assert (found["hours_lower_bound"], found["dollars_per_chip_hour"], found["price_source"]) == (1.0, dollars, source)
    assert found["dollars_lower_bound"] == (None if dollars is None else pytest.approx(8 * dollars))
    assert (found["tokens_per_second_upper_bound"], found["mfu_upper_bound"], found["v3_bill"]) == (
        500,
        pytest.approx(1 / 4),
        None,
    )
    none = bounds(plan, target, {"roofline": None}, price, is_v3=True)
    assert (none["hours_lower_bound"], none["dollars_lower_bound"], none["v3_bill"]) == (
        None,
        None,
        {"h800_hours": 2_788_000, "dollars": 5_576_000.0},
    )
