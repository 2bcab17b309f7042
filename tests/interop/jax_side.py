"""Our side of the parity tests, compiled once per network and shape."""

import functools

import jax
import numpy as np

from deepseek_jax.generation import SamplingConfig, generate
from deepseek_jax.model.transformer import Transformer

PROMPT, NEW_TOKENS = 24, 64
_generate = jax.jit(generate, static_argnames=("model", "sampling"))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, tokens_BT):
    return model.apply(variables, model.apply(variables, tokens_BT).hidden_BTD, method="unembed")


def tokens(vocab_size: int, seed: int) -> np.ndarray:
    """Two random prompts, int32 [2, PROMPT]."""
    return np.random.default_rng(100 + seed).integers(0, vocab_size, (2, PROMPT)).astype(np.int32)


def logits(config, variables, tokens_BT: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(Transformer(config), variables, tokens_BT))


def greedy(config, variables, prompts_BP: np.ndarray) -> np.ndarray:
    """NEW_TOKENS greedy tokens [B, N] of whole prompts through the cached, absorbed decode; never stops early."""
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0, eos_id=-1, pad_id=0)
    lengths = np.full(len(prompts_BP), prompts_BP.shape[1], np.int32)
    return np.asarray(
        _generate(Transformer(config), variables, prompts_BP, lengths, jax.random.key(0), sampling).tokens_BN
    )
