"""A model small enough to compile in seconds, and batches for it."""

import jax
import numpy as np
import pytest

from deepseek_jax.model.config import GQAConfig, ModelConfig, MoEConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer, init_variables

VOCAB = 67  # like no other size of the model, so that arrays over the vocabulary can be told


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(compilation_cache):
    """These tests compile more than they compute: little optimization, and each program once."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(compilation_cache),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def model():
    """One MoE layer and two MTP modules."""
    return Transformer(
        ModelConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=1,
            intermediate_size=32,
            attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8),
            moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=16),
            mtp_depth=2,
            init_std=0.1,
        ),
        Ops(runtime=RuntimeConfig(experts="dense")),
    )


@pytest.fixture(scope="session")
def variables(model):
    return init_variables(model, jax.random.key(0))


@pytest.fixture(scope="session")
def pack():
    """pack(rows, length): each row is a list of documents (token lists), padded to `length`; every token is trained
    on."""

    def pack(rows, length):
        batch = {
            name: np.zeros((len(rows), length), np.int32)
            for name in ("tokens", "segment_ids", "positions", "loss_mask")
        }
        for row, documents in enumerate(rows):
            start = 0
            for number, document in enumerate(documents, start=1):
                span = slice(start, start + len(document))
                batch["tokens"][row, span] = document
                batch["segment_ids"][row, span] = number
                batch["positions"][row, span] = np.arange(len(document))
                batch["loss_mask"][row, span] = 1
                start = span.stop
        return batch

    return pack


@pytest.fixture(scope="session")
def document():
    """document(length, seed): random token ids, none of them the last of the vocabulary."""
    return lambda length, seed: np.random.default_rng(seed).integers(0, VOCAB - 1, length).tolist()
