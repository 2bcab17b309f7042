"""Sizes of a mesh, its order of devices, the rules, and what is refused before anything is compiled."""

import dataclasses

import jax
import numpy as np
import pytest
from meshes import CONFIG, MODEL, mesh_ops, on

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.presets import preset
from deepseek_jax.model.router import choose_experts
from deepseek_jax.model.transformer import logical_axes
from deepseek_jax.parallel.arrays import global_batch, host_share
from deepseek_jax.parallel.mesh import AXES, MeshConfig, build_mesh, resolve
from deepseek_jax.parallel.rules import build_rules, check_divisible, divide


def test_the_rest_goes_to_the_axis_that_asks_for_it():
    assert resolve(MeshConfig(fsdp=-1, expert=4), 8) == {"data": 1, "fsdp": 2, "expert": 4, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp": 3}, r"fsdp 3 does not make up 8 devices; the nearest mesh that works is fsdp"),
        ({"fsdp": 16}, r"fsdp 16 does not make up 8 devices; the nearest mesh that works is fsdp 8"),
        ({"fsdp": -1, "data": -1}, "only one axis can be -1"),
        ({"fsdp": 0}, "mesh.fsdp=0: a number of devices, or -1"),
        ({"experts": 8}, "unknown field mesh.experts: did you mean 'expert'"),
        ({"fsdp": 8, "dcn": {"fsdp": 3}}, r"mesh.dcn.fsdp=3: it has to divide mesh.fsdp=8"),
        ({"fsdp": 8, "dispatch": {"exchange": "pigeon"}}, "mesh.dispatch.exchange='pigeon'"),
        ({"fsdp": 8, "dispatch": {"buffer_factor": 0.5}}, "at least 1"),
    ],
)
def test_impossible_meshes_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        resolve(MeshConfig.from_dict(fields), 8)


@pytest.mark.parametrize(
    ("sizes", "rows", "lengths", "message", "hint"),
    [
        ({"expert": 16}, {}, {}, "expert of 16 in all does not divide model.moe.num_experts=8", "fsdp 2 × expert 8"),
        (
            {"tensor": 4, "fsdp": 4},
            {},
            {},
            "tensor of 4 in all does not divide the attention heads=2",
            "fsdp 8 × tensor 2",
        ),
        (
            {"fsdp": 16},
            {"pretrain.batch_size": 24},
            {},
            "fsdp of 16 in all does not divide pretrain.batch_size=24",
            "8",
        ),
        (
            {"context": 16},
            {},
            {"pretrain.seq_len": 24},
            "context of 16 in all does not divide pretrain.seq_len=24",
            "context 8",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_mesh_that_works(sizes, rows, lengths, message, hint):
    config = MeshConfig(**sizes)
    with pytest.raises(ConfigError, match=message) as error:
        resolve(
            config, 16, lambda mesh: check_divisible(mesh, config, CONFIG, tuple(rows.items()), tuple(lengths.items()))
        )
    assert hint in str(error.value).partition("nearest mesh that works is")[2]


def test_a_mesh_over_a_slow_network_keeps_slices_together():
    """Each slice of four neighbors holds whole inner axes; the outer factor of an axis runs over slices."""
    devices = jax.devices()
    mesh = build_mesh({"data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}, {"data": 2}, devices)
    assert mesh.axis_names == AXES
    slice_of = {device: i // 4 for i, device in enumerate(devices)}
    slices = np.vectorize(slice_of.get)(mesh.devices).reshape(4, 2)
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])
    with pytest.raises(ConfigError, match="multiplies to 2, but the devices form 3 slices"):
        build_mesh(
            {"data": 6, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1},
            {"data": 2},
            [_Device(i, slice_index=i // 2) for i in range(6)],
        )


@dataclasses.dataclass(frozen=True)
class _Device:
    id: int
    slice_index: int = 0
    process_index: int = 0
    platform: str = "gpu"


def test_a_token_crosses_the_slow_network_to_at_most_its_groups_places():
    """Eight groups of experts over eight nodes: whole groups on each, so that a token reaches at most topk_groups of
    them."""
    config = dataclasses.replace(preset("v3_671b").moe, topk_groups=2)
    scores = jax.random.uniform(jax.random.key(0), (512, config.num_experts))
    chosen = np.asarray(choose_experts(scores, config))
    model, sizes = (
        preset("v3_671b").replace(moe=config),
        {"data": 1, "fsdp": 1, "expert": 64, "context": 1, "tensor": 1},
    )
    assert check_divisible(sizes, MeshConfig(expert=64, dcn=(("expert", 8),)), model) is None
    places = chosen // (config.num_experts // 8)
    assert max(len(set(row)) for row in places) <= 2
    cut = check_divisible(sizes, MeshConfig(expert=64, dcn=(("expert", 16),)), model)
    assert "cuts through the 8 expert groups" in cut


def test_rules_divide_dimensions_in_order_as_far_as_they_go():
    sizes = {"data": 1, "fsdp": 2, "expert": 4, "context": 1, "tensor": 2}
    rules = dict(build_rules())
    assert divide(rules, sizes, ("layers", "experts", "embed", "expert_ffn"), (3, 8, 16, 6)) == (
        (),
        ("expert",),
        ("fsdp",),
        ("tensor",),
    )
    assert divide(rules, sizes, ("embed", "heads"), (16, 6)) == (("fsdp", "expert"), ("tensor",))
    # 4 does not divide 3, 2 does not divide 5
    assert divide(rules, sizes, ("embed", "heads"), (6, 5)) == (("fsdp",), ())
    zero1 = dict(build_rules((("embed", None), ("optimizer.embed", "fsdp"))))
    assert divide(zero1, sizes, ("embed",), (16,)) == ((),)
    assert divide(zero1, sizes, ("embed",), (16,), "optimizer.") == (("fsdp",),)
    assert divide(zero1, sizes, ("heads",), (16,), "optimizer.") == (("tensor",),)
    for changes, message in (
        ((("embedd", None),), "did you mean 'embed'"),
        ((("embed", "fsd"),), "did you mean 'fsdp'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_rules(changes)


def test_an_attention_brings_rows_for_its_own_axes():
    sizes = {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    own = {"compressed": ("tensor",), "gate": None}
    assert divide(dict(build_rules((), own)), sizes, ("compressed", "gate"), (8, 8)) == (("tensor",), ())
    assert divide(dict(build_rules((("gate", "fsdp"),), own)), sizes, ("gate",), (8,)) == (("fsdp",),)
    with pytest.raises(ConfigError, match="'compressed' has no rule: .* `sharding_rules` of its config class"):
        divide(dict(build_rules()), sizes, ("compressed",), (8,))
    with pytest.raises(ConfigError, match="sharding_rules of the attention: 'embed' has a rule already"):
        build_rules((), {"embed": "fsdp"})
    with pytest.raises(ConfigError, match="sharding_rules of the attention: gate='fsd': did you mean 'fsdp'"):
        build_rules((), {"gate": "fsd"})


def test_every_logical_axis_of_the_network_has_a_rule():
    names = {
        name
        for spec in jax.tree.leaves(dict(logical_axes(MODEL)), is_leaf=lambda x: isinstance(x, jax.P))
        for name in spec
    }
    assert names - {None} <= set(dict(build_rules()))


class _Hosted:
    """Ops on devices of two hosts, as far as `host_share` looks at it."""

    @staticmethod
    def on(sizes: dict, hosts: int):
        one = on(sizes).ops
        per_host = 8 // hosts
        devices = np.array([_Device(d.id, process_index=i // per_host) for i, d in enumerate(one.mesh.devices.flat)])

        class Mesh:
            devices_ = devices.reshape(one.mesh.devices.shape)
            shape, axis_names = one.mesh.shape, one.mesh.axis_names

        Mesh.devices = Mesh.devices_
        return dataclasses.replace(one, mesh=Mesh)


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ({"data": 8}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"fsdp": 2, "expert": 4}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"fsdp": 2, "context": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two hosts share the sequences of a row block
        ({"tensor": 8}, [(0, 1)] * 4),
    ],
)
def test_which_rows_a_host_loads(sizes, shares):
    hosted = _Hosted.on(sizes, hosts=4)
    assert [host_share(hosted, process) for process in range(4)] == shares


def test_global_batch_puts_every_row_where_it_belongs():
    batch = {"tokens": np.arange(8 * 12, dtype=np.int32).reshape(8, 12), "num_bytes": np.arange(8, dtype=np.int32)}
    for sizes in ({"fsdp": 2, "expert": 4}, {"context": 4, "fsdp": 2}):
        arrays = global_batch(mesh_ops(sizes), batch)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, batch[name])
            assert len({shard.device for shard in array.addressable_shards}) == 8
    assert arrays["tokens"].sharding.shard_shape((8, 12)) == (4, 3)
