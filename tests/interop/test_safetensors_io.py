"""Reading and writing safetensors against the reference implementation."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from deepseek_jax.errors import CheckpointError
from deepseek_jax.interop.safetensors_io import ShardWriter, read_header, read_tensor

ARRAYS = {
    "odd": np.arange(5, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
}
KINDS = {"odd": "BF16", "matrix": "F32", "half": "F16"}


def write(file, names=tuple(ARRAYS)):
    with ShardWriter(file, {name: (KINDS[name], ARRAYS[name].shape) for name in names}) as writer:
        for name in reversed(names):
            writer.write(name, ARRAYS[name])


def test_reference_reads_what_we_write(tmp_path):
    write(tmp_path / "x.safetensors")
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_we_read_what_the_reference_writes(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: tensor.dtype for name, tensor in header.items()} == KINDS
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read_tensor(header[name]), array)


def test_tensors_are_aligned_to_their_item_size(tmp_path):
    with ShardWriter(
        tmp_path / "x", {"fp8": ("F8_E4M3", (3,)), "scale": ("F32", (1, 1)), "bf16": ("BF16", (3,))}
    ) as writer:
        writer.write("fp8", np.ones(3, ml_dtypes.float8_e4m3fn))
        writer.write("scale", np.ones((1, 1), np.float32))
        writer.write("bf16", np.ones(3, ml_dtypes.bfloat16))
    header = read_header(tmp_path / "x")
    assert header["scale"].offset % 4 == 0 and header["bf16"].offset % 2 == 0


def test_truncated_file_is_refused(tmp_path):
    write(tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-3])
    with pytest.raises(
        CheckpointError,
        match=rf"x\.safetensors: damaged or cut off after {len(whole) - 3} bytes .* download the file again",
    ):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"\xff" * 40, (2).to_bytes(8, "little") + b"[]", (3).to_bytes(8, "little") + b"{,}"]
)
def test_damaged_header_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_header_that_contradicts_itself_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(CheckpointError, match="shape, data type, or offset for tensor"):
        read_header(tmp_path / "x")


def test_writer_refuses_a_tensor_it_did_not_declare_so(tmp_path):
    shards = ShardWriter(tmp_path / "x", {"w": ("F32", (2,))})
    with pytest.raises(ValueError, match="declared F32"), shards as writer:
        writer.write("w", np.ones(3, np.float32))
    with pytest.raises(ValueError, match="not written"), ShardWriter(tmp_path / "x", {"w": ("F32", (2,))}):
        pass
