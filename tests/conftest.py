"""Eight virtual devices for the tests of meshes; without a mesh everything runs on the first. Tests that compile for what is not there say so."""

import os

import pytest

FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()


def pytest_runtest_setup(item):
    """`@pytest.mark.aot(chip)`: needs the compiler for a chip."""
    for marker in item.iter_markers("aot"):
        from deepseek_jax.accounting.chips import CHIPS
        from deepseek_jax.accounting.topologies import installed

        if not installed(CHIPS[marker.args[0]]):
            pytest.skip(f"nothing here compiles for {marker.args[0]}: pip install -e '.[aot]'")
