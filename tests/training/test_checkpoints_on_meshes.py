"""A checkpoint saved on one mesh is restored on any other bit for bit, and what is damaged is noticed on all of
them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from deepseek_jax.errors import CheckpointError
from deepseek_jax.model.presets import preset
from deepseek_jax.training.checkpoints import Checkpoints, load_variables
from deepseek_jax.training.state import TrainState

CONFIG = preset("moonlight_16b")
MESHES = {"2x4": (2, 4), "4x2": (4, 2), "8": (8, 1), "one device": None}


def fresh():
    """A stage's state: float32 weights, bfloat16 and float32 moments, a key, int32 scalars. Numbers no two of
    which are alike."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32))
    params = {"kernel": kernel, "experts": kernel.reshape(8, 2, 24) * 3, "scale": jnp.arange(5.0).astype(jnp.bfloat16)}
    moments = optax.adam(0.1, mu_dtype=jnp.bfloat16)
    _, opt_state = moments.update(jax.tree.map(jnp.sin, params), moments.init(params))
    return TrainState(jnp.int32(7), params, {"r": jnp.arange(4.0) / 3}, opt_state, jax.random.key(11), jnp.int32(2))


def shardings(shape):
    """A sharding for each leaf: matrices divided along two axes, experts along one, the rest on every device."""
    if shape is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), fresh())
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {(16, 24): PartitionSpec("data", "fsdp"), (8, 2, 24): PartitionSpec(("data", "fsdp"))}
    return jax.tree.map(lambda leaf: NamedSharding(mesh, specs.get(leaf.shape, PartitionSpec())), fresh())


def on(name):
    return jax.device_put(fresh(), shardings(MESHES[name]))


def abstract(name):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        fresh(),
        shardings(MESHES[name]),
    )


def bits(leaf):
    leaf = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(leaf).reshape(-1).view(np.uint8)


@pytest.fixture(scope="module", params=MESHES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    store = Checkpoints(folder / "checkpoints", CONFIG)
    store.save(on(request.param), {"position": 3})
    store.close()
    return folder


def test_restored_on_every_mesh_bit_for_bit(saved):
    for name in MESHES:
        wanted = abstract(name)
        store = Checkpoints(saved / "checkpoints", CONFIG)
        store.require_space(wanted)
        restored = store.restore(wanted)
        store.close()
        assert restored.loader_state == {"position": 3}
        for leaf, original, like in zip(*map(jax.tree.leaves, (restored.state, fresh(), wanted)), strict=True):
            assert leaf.dtype == original.dtype and leaf.sharding == like.sharding
            np.testing.assert_array_equal(bits(leaf), bits(original))


def test_weights_land_in_their_shards_or_on_the_first_device(saved):
    wanted = shardings((4, 2))
    for placing in (
        None,
        lambda config: {"params": wanted.params, "router_bias": wanted.router_bias} if config == CONFIG else 1 / 0,
    ):
        variables = load_variables(saved, shardings=placing)[1]
        assert variables["params"]["kernel"].sharding == (
            wanted.params["kernel"] if placing else SingleDeviceSharding(jax.devices()[0])
        )
        jax.tree.map(
            lambda leaf, original: np.testing.assert_array_equal(bits(leaf), bits(original)),
            variables,
            fresh().variables,
        )


def test_one_flipped_bit_is_noticed_on_every_mesh(tmp_path):
    """In the last expert, which one device in eight holds; written with the checksum of the unflipped array."""
    store = Checkpoints(tmp_path / "checkpoints", CONFIG)
    store.save(on("2x4"))
    store.wait()
    meta = (tmp_path / "checkpoints/7/meta/metadata").read_text()
    flipped = fresh()
    kernel = np.asarray(flipped.params["experts"]).copy()
    kernel.view(np.uint32)[-1, -1, -1] ^= 1 << 20
    store = Checkpoints(tmp_path / "flipped/checkpoints", CONFIG)
    store.save(
        jax.device_put(flipped.replace(params=flipped.params | {"experts": jnp.asarray(kernel)}), shardings((8, 1)))
    )
    store.wait()
    (store.directory / "7/meta/metadata").write_text(meta)
    for name in MESHES:
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(steps \[7\]\)"):
            Checkpoints(store.directory, CONFIG).restore(abstract(name))
    with pytest.raises(CheckpointError, match="the bytes of params/experts are not those that were saved"):
        load_variables(store.directory)
