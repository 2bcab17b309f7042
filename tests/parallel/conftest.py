"""These tests compile more than they compute: each program is compiled once and little optimized."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    settings = {"jax_disable_most_optimizations": True}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
