"""Documents and readers that the data tests share."""

import numpy as np
import pytest

from deepseek_jax.data.tokenizers import load_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    return load_tokenizer("byte")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The folder in which the test session prepares its TFDS datasets."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="session")
def documents():
    """Sixty documents of 1 to 40 ids; no id occurs twice, so that every token can be traced. Every third id is not
    trained on."""
    lengths = np.random.default_rng(0).integers(1, 41, size=60)
    starts = np.concatenate([[1000], 1000 + np.cumsum(lengths)])
    ids = [np.arange(start, start + length, dtype=np.int32) for start, length in zip(starts, lengths, strict=False)]
    return [{"tokens": tokens, "loss_mask": (tokens % 3 > 0).astype(np.int32)} for tokens in ids]
