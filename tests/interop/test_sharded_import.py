"""Import into shards and export from them: bit-equal to the plain way, reading no more than the shards hold."""

import builtins
import dataclasses
import math
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_checkpoints import TINY, assert_same, random_variables

from deepseek_jax.errors import CheckpointError
from deepseek_jax.interop import export_folder, import_folder, open_folder, safetensors_io
from deepseek_jax.interop.fp8_blocks import dequantize_rows, quantize
from deepseek_jax.interop.importer import read_slice, read_variables, specs_by_path
from deepseek_jax.interop.safetensors_io import ShardWriter, read_header, read_tensor
from deepseek_jax.interop.slices import overlaps, slice_of
from deepseek_jax.interop.tensors import tensor_table
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.arrays import variables_sharding
from deepseek_jax.parallel.mesh import build_mesh
from deepseek_jax.parallel.sharding import MeshOps

# Every size that is cut divides evenly, and no cut lies on the border of a block of 128: 256 / 2 would, 272 / 2 and 304
# / 8 don't.
MOE = dataclasses.replace(TINY.moe, num_experts=8, num_groups=4, intermediate_size=144)
CONFIG = TINY.replace(
    vocab_size=304,
    hidden_size=272,
    intermediate_size=336,
    moe=MOE,
    attention=dataclasses.replace(TINY.attention, num_heads=4, kv_lora_rank=136),
)
F32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """CONFIG's variables, stored as float32, bfloat16 and FP8 in several files."""
    root, variables = tmp_path_factory.mktemp("sharded"), random_variables(CONFIG)
    for dtype in ("float32", "bfloat16", "fp8"):
        export_folder(CONFIG, variables, root / dtype, dtype=dtype, max_shard_bytes=1_000_000)
    return root


def mesh(**axes):
    devices = np.array(jax.devices()[: math.prod(axes.values())]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes))


def shardings(device_mesh, rule):
    """A tree of shardings; `rule(path, shape)` gives the mesh axes of the variable's last axes, those before are
    unsharded."""

    def sharding(spec):
        axes = rule("/".join(spec.path), spec.leaf_shape)
        return NamedSharding(device_mesh, P(*[None] * (len(spec.leaf_shape) - len(axes)), *axes))

    return lambda config: traverse_util.unflatten_dict({spec.path: sharding(spec) for spec in tensor_table(config)})


def fsdp_and_experts(path, shape):
    """Model width over fsdp, experts over expert; layers unsharded."""
    widths = ["fsdp" if size == CONFIG.hidden_size else None for size in shape]
    if "experts" in path:
        return ["expert", *widths[-2:]]
    return widths


def vocabulary(path, shape):
    return ["x" if size == CONFIG.vocab_size else None for size in shape]


def heads(path, shape):
    """Of the query, key and value projections their outputs, of the output projection its inputs."""
    if path.endswith(("q_b/kernel", "kv_b/kernel")):
        return [None, "x"]
    return ["x", None] if path.endswith("attn/o/kernel") else []


def layers_and_both_sides(path, shape):
    """Stacked shared experts: their two layers apart and their matrices cut both ways; the rest lies on every
    device."""
    return ["layer", "in", "out"] if "moe_layers/ffn/shared" in path else []


CASES = {
    "fsdp2_expert4": (dict(fsdp=2, expert=4), fsdp_and_experts),
    "vocabulary8": (dict(x=8), vocabulary),
    "heads2_over_all": (dict(x=2, rest=4), heads),
    "layers2_both_sides": ({"layer": 2, "in": 2, "out": 2}, layers_and_both_sides),
    "some_devices": (dict(fsdp=2, expert=2), fsdp_and_experts),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stored, dtype", [("float32", "float32"), ("fp8", "bfloat16"), ("bfloat16", "float32")])
def test_sharded_import_equals_the_plain_one(folders, case, stored, dtype):
    axes, rule = CASES[case]
    tree = shardings(mesh(**axes), rule)
    config, arrays = import_folder(folders / stored, dtype, shardings=tree)
    _, plain = import_folder(folders / stored, dtype)
    assert config == CONFIG
    wanted = traverse_util.flatten_dict(tree(config))
    cut = 0
    for path, leaf in traverse_util.flatten_dict(arrays).items():
        assert leaf.sharding == wanted[path] and leaf.committed
        cut += not leaf.sharding.is_fully_replicated
    assert cut
    assert_same(jax.tree.map(np.asarray, arrays), plain)


def test_import_for_a_placed_network_lies_as_it_asks(folders):
    device_mesh = build_mesh(dict(data=1, fsdp=2, expert=2, context=1, tensor=2), {}, jax.devices()[:8])

    def placed(config):
        return variables_sharding(Transformer(config, MeshOps(mesh=device_mesh)))

    config, arrays = import_folder(folders / "fp8", "bfloat16", shardings=placed)
    assert jax.tree.map(lambda leaf: leaf.sharding, arrays) == placed(config)
    assert_same(jax.tree.map(np.asarray, arrays), import_folder(folders / "fp8", "bfloat16")[1])


@pytest.mark.parametrize(
    "case, dtype", [("some_devices", "fp8"), ("vocabulary8", "float32"), ("layers2_both_sides", "float32")]
)
def test_export_from_shards_gives_the_same_files(folders, case, dtype, tmp_path):
    axes, rule = CASES[case]
    config, arrays = import_folder(folders / "float32", shardings=shardings(mesh(**axes), rule))
    export_folder(config, arrays, tmp_path / "hf", dtype=dtype, max_shard_bytes=1_000_000)
    for file in sorted((folders / dtype).iterdir()):
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


def test_export_refuses_what_lies_on_other_hosts(tmp_path):
    class Elsewhere(np.ndarray):
        is_fully_addressable = False

    variables = random_variables(CONFIG)
    variables["params"]["embed"]["embedding"] = variables["params"]["embed"]["embedding"].view(Elsewhere)
    with pytest.raises(CheckpointError, match="params/embed/embedding lies partly on other hosts"):
        export_folder(CONFIG, variables, tmp_path / "hf")


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts the bytes that really come out of safetensors files."""
    counts = {"bytes": 0}

    class Counting:
        def __init__(self, *args, **kwargs):
            self._stream = builtins.open(*args, **kwargs)  # noqa: SIM115, it stands in for open

        def readinto(self, buffer):
            count = self._stream.readinto(buffer)
            counts["bytes"] += count
            return count

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._stream.close()

        def __getattr__(self, name):
            return getattr(self._stream, name)

    monkeypatch.setattr(safetensors_io, "open", Counting, raising=False)
    return counts


@pytest.mark.parametrize("stored", ["float32", "fp8"])
def test_a_device_with_an_eighth_of_the_experts_reads_an_eighth_of_their_bytes(folders, stored, bytes_read):
    opened = open_folder(folders / stored)
    variables = read_variables(opened)
    experts = {path: specs for path, specs in specs_by_path(opened).items() if "experts" in path}
    assert len(experts) == 6
    for path, specs in experts.items():
        sharding = NamedSharding(mesh(expert=8), P(*["expert" if size == 8 else None for size in specs[0].leaf_shape]))
        of_tensors = sum(
            opened.stored[name].nbytes
            for spec in specs
            for name in (spec.name, spec.scale_name)
            if name in opened.stored
        )
        for index in list(sharding.devices_indices_map(specs[0].leaf_shape).values())[::3]:
            bytes_read["bytes"] = 0
            values = read_slice(specs, opened.stored, slice_of(index, specs[0].leaf_shape), F32)
            np.testing.assert_array_equal(values, traverse_util.flatten_dict(variables)[path][index])
            assert bytes_read["bytes"] * 8 == of_tensors


def test_cut_rows_and_columns_read_their_own_bytes(folders, bytes_read):
    """[272, 336] on our side, [336, 272] in the file: a quarter of the columns, a half of the rows."""
    opened = open_folder(folders / "float32")
    path = ("params", "dense_layers", "ffn", "up", "kernel")
    specs = specs_by_path(opened)[path]
    bytes_read["bytes"] = 0
    values = read_slice(specs, opened.stored, (range(1), range(68, 136), range(168, 336)), F32)
    assert bytes_read["bytes"] == 68 * 168 * 4
    np.testing.assert_array_equal(values, traverse_util.flatten_dict(read_variables(opened))[path][:, 68:136, 168:])


def test_what_several_devices_hold_is_read_once(folders, bytes_read):
    opened = open_folder(folders / "fp8")
    read_variables(opened)
    plain, bytes_read["bytes"] = bytes_read["bytes"], 0
    read_variables(opened, shardings=shardings(mesh(x=8), lambda path, shape: [])(CONFIG))
    assert bytes_read["bytes"] == plain
    bytes_read["bytes"] = 0
    read_variables(
        opened,
        shardings=shardings(
            mesh(expert=4, rest=2), lambda path, shape: ["expert", None, None] if "experts" in path else []
        )(CONFIG),
    )
    assert bytes_read["bytes"] == plain


@pytest.mark.parametrize("seed", range(4))
def test_any_rectangle_of_a_matrix_is_dequantized_as_in_the_whole(seed):
    rng = np.random.default_rng(seed)
    shape = (300, 400)
    values, scale_inv = quantize(rng.standard_normal(shape, np.float32) * np.exp(3 * rng.standard_normal(shape)))
    whole = np.concatenate([rows for _, rows in dequantize_rows(values, scale_inv)])
    for _ in range(50):
        (top, bottom), (left, right) = (sorted(rng.choice(size + 1, 2, replace=False)) for size in shape)
        blocks = scale_inv[top // 128 : -(-bottom // 128), left // 128 : -(-right // 128)]
        found = np.full((bottom - top, right - left), np.nan, np.float32)
        for rows, dequantized in dequantize_rows(values[top:bottom, left:right], blocks, corner=(top, left)):
            found[rows] = dequantized
        np.testing.assert_array_equal(found, whole[top:bottom, left:right])


def test_any_rectangle_of_a_stored_tensor(tmp_path, bytes_read):
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.standard_normal((7, 9)).astype(ml_dtypes.bfloat16),
        "vector": rng.standard_normal(11).astype(ml_dtypes.bfloat16),
    }
    with ShardWriter(tmp_path / "x", {name: ("BF16", array.shape) for name, array in arrays.items()}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    header = read_header(tmp_path / "x")
    for name, array in arrays.items():
        for _ in range(40):
            ranges = [range(*sorted(rng.integers(0, size + 1, 2).tolist())) for size in array.shape]
            bytes_read["bytes"] = 0
            found = read_tensor(header[name], ranges)
            np.testing.assert_array_equal(found, array[np.ix_(*ranges)])
            assert bytes_read["bytes"] == found.nbytes


def test_file_that_shrank_while_reading(tmp_path):
    with ShardWriter(tmp_path / "x", {"w": ("F32", (4, 4))}) as writer:
        writer.write("w", np.ones((4, 4), np.float32))
    tensor = read_header(tmp_path / "x")["w"]
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-6])
    np.testing.assert_array_equal(read_tensor(tensor, [range(3), range(4)]), np.ones((3, 4)))
    for ranges in (None, [range(4), range(3, 4)]):
        with pytest.raises(CheckpointError, match=r"x: ends \d bytes too early; it is truncated"):
            read_tensor(tensor, ranges)


def test_one_differing_number_in_a_copy_of_the_embedding_leaves_the_mtp_module_out_on_every_host(folders, tmp_path):
    """Whatever its devices hold, a host compares the whole: all come to the same network."""
    for file in (folders / "float32").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copy = open_folder(tmp_path).stored["model.layers.3.embed_tokens.weight"]
    with open(copy.file, "r+b") as stream:
        stream.seek(copy.offset + 4 * (100 * CONFIG.hidden_size + 5))
        stream.write(np.float32(1e9).tobytes())
    config, variables = import_folder(tmp_path, shardings=lambda config: shardings(mesh(x=8), vocabulary)(config))
    assert config == CONFIG.replace(mtp_depth=0) and "mtp_0" not in variables["params"]


def test_progress_counts_the_parts_that_are_read(folders):
    seen = []
    import_folder(
        folders / "fp8",
        progress=lambda done, total: seen.append((done, total)),
        shardings=shardings(mesh(fsdp=2, expert=4), fsdp_and_experts),
    )
    opened = open_folder(folders / "fp8")
    table = [spec for spec in opened.table if not spec.duplicate]
    halves = sum(CONFIG.hidden_size in spec.shape for spec in table)
    assert len(table) + halves == len(seen)
    assert seen == [(i, len(seen)) for i in range(1, len(seen) + 1)]


def test_shardings_of_another_network_are_refused(folders):
    with pytest.raises(CheckpointError, match="params/mtp_0/.*: in the folder and not in the tree of shardings"):
        import_folder(
            folders / "fp8", shardings=lambda config: shardings(mesh(x=8), vocabulary)(config.replace(mtp_depth=0))
        )


def test_layers_and_experts_of_a_part():
    spec = next(spec for spec in tensor_table(CONFIG) if spec.name == "model.layers.2.mlp.experts.5.up_proj.weight")
    assert spec.index == (1, 5)
    for layers, experts, inside in [
        (slice(None), slice(4, 6), True),
        (slice(1, 2), slice(5, 6), True),
        (slice(0, 1), slice(4, 6), False),
        (slice(None), slice(6, 8), False),
        (slice(None), slice(0, 5), False),
    ]:
        assert overlaps(spec, slice_of((layers, experts, slice(None), slice(None)), spec.leaf_shape)) is inside


def test_peak_host_memory_is_about_one_slice(tmp_path):
    """Devices on the CPU share the host's memory, so what is left over by reading one slice at a time is measured."""
    config = TINY.replace(
        hidden_size=256, intermediate_size=2048, vocab_size=2000, num_layers=9, first_k_dense=8, mtp_depth=0
    )
    export_folder(config, random_variables(config), tmp_path / "hf", dtype="fp8")
    opened = open_folder(tmp_path / "hf")
    specs = specs_by_path(opened)[("params", "dense_layers", "ffn", "up", "kernel")]
    read_slice(specs, opened.stored, (range(1), range(1), range(1)), F32)
    tracemalloc.start()
    for ranges in ((range(8), range(256), range(256, 512)), (range(8), range(32, 64), range(2048))):
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        values = read_slice(specs, opened.stored, ranges, F32)
        assert values.nbytes <= tracemalloc.get_traced_memory()[1] - before < 1.3 * values.nbytes
        del values
    tracemalloc.stop()
