"""The same parity without torch: checkpoints that transformers saved (bfloat16) and the float32 outputs it computed
from them.

`make_parity_data.py` made the files.
"""

from pathlib import Path

import jax_side
import numpy as np
import pytest

from deepseek_jax.interop import import_folder

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module", params=["v3", "v2"])
def stored(request):
    return *import_folder(DATA / request.param), np.load(DATA / request.param / "expected.npz")


def test_logits(stored):
    config, variables, expected = stored
    ours = jax_side.logits(config, variables, expected["tokens_BT"])
    assert expected["logits_BTV"].std() > 0.5
    np.testing.assert_allclose(ours, expected["logits_BTV"], rtol=0, atol=1e-4)


def test_greedy_tokens_through_the_absorbed_cache(stored):
    config, variables, expected = stored
    assert expected["greedy_BN"].shape == (2, 64)
    np.testing.assert_array_equal(jax_side.greedy(config, variables, expected["tokens_BT"]), expected["greedy_BN"])
