import pytest
from tiny_checkpoints import TINY, random_variables

from deepseek_jax.interop import export_folder


@pytest.fixture(scope="session")
def variables():
    return random_variables(TINY)


@pytest.fixture
def folder(tmp_path, variables):
    """A float32 export of TINY in several shards."""
    export_folder(TINY, variables, tmp_path / "hf", dtype="float32", max_shard_bytes=300_000)
    return tmp_path / "hf"
