"""Eight virtual devices for the tests of meshes; without a mesh everything runs on the first.

Programs here run a few times on few numbers, so that compiling them is what takes time: XLA optimizes nothing but what
is compiled for hardware that is not here. JAX_DISABLE_MOST_OPTIMIZATIONS=0 makes it optimize as it does for users.
"""

import os
from importlib import metadata

import pytest

UNOPTIMISED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ.setdefault(UNOPTIMISED, "1")
FLAGS = {"--xla_force_host_platform_device_count": "8"}
# 0.11 does not know it, and refuses to start
if os.environ[UNOPTIMISED] == "1" and metadata.version("jaxlib").startswith("0.10."):
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"  # compiles in two thirds of the time
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()


def pytest_runtest_setup(item):
    """`@pytest.mark.aot(chip=…)`: needs the compiler for a chip."""
    import jax

    from deepseek_jax.accounting.chips import CHIPS
    from deepseek_jax.dry_run.topologies import installed

    compiled_for = [marker.kwargs["chip"] for marker in item.iter_markers("aot")]
    for chip in compiled_for:
        if not installed(CHIPS[chip]):
            pytest.skip(f"nothing here compiles for {chip}: pip install -e '.[aot]'")
    jax.config.update("jax_disable_most_optimizations", not compiled_for and os.environ[UNOPTIMISED] == "1")
