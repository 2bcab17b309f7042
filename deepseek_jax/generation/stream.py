"""Completions as they are made, a few tokens at a time, and a chat that keeps the ids of its earlier turns."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.tokenizers import Tokenizer
from deepseek_jax.errors import DataError
from deepseek_jax.generation.generate import advance, start
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.model.transformer import Transformer

PROMPT_SLOTS = 64  # prompts are padded to a multiple of this, so that the turns of a chat share a few programs
TOKENS_PER_CALL = 4

_start = jax.jit(start, static_argnames=("model", "sampling"))
_advance = jax.jit(advance, static_argnames=("model", "sampling"), donate_argnames="state")


def stream(model: Transformer, variables, prompt_ids: Sequence[int], rng: jax.Array, sampling: SamplingConfig) -> Iterator[list[int]]:
    """Yields the ids of one completion, at most `TOKENS_PER_CALL` at a time, eos included.

    Raises DataError for an empty prompt.
    """
    length = len(prompt_ids)
    if length == 0:
        raise DataError("the prompt has no tokens: give at least a begin-of-sequence token")
    prompts_BP = np.full((1, -(-length // PROMPT_SLOTS) * PROMPT_SLOTS), sampling.pad_id, np.int32)
    prompts_BP[0, :length] = prompt_ids
    state = _start(model, variables, prompts_BP, np.asarray([length], np.int32), rng, sampling)
    advance_some = functools.partial(_advance, model, variables, sampling=sampling, steps=jnp.asarray(TOKENS_PER_CALL))
    sent = 0
    while True:
        made, live = int(state.lengths_B[0]), bool(state.live_B[0]) and int(state.step) < sampling.max_new_tokens
        if made > sent:
            yield state.tokens_BN[0, sent:made].tolist()
            sent = made
        if not live:
            return
        state = advance_some(state=state)


class Chat:
    """A conversation as token ids. What was sampled is kept as it is and never rendered to text and back, so the model
    sees exactly what it wrote, reasoning included."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.ids: list[int] = []

    def ask(self, text: str) -> list[int]:
        """Adds the user's turn and returns the whole conversation, ready for the answer."""
        user = {"role": "user", "content": text}
        if not self.ids:
            self.ids = self._tokenizer.chat([user])
            return self.ids
        # What the template adds to a finished exchange for one more question does not depend on that exchange's words.
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        before = self._tokenizer.chat(exchange, add_generation_prompt=False)
        after = self._tokenizer.chat([*exchange, user])
        if after[: len(before)] != before:
            raise DataError("this tokenizer's chat template rewrites earlier turns; a chat that keeps them can't use it")
        self.ids = self.ids + after[len(before) :]
        return self.ids

    def answer(self, ids: Sequence[int]) -> None:
        """Adds what the model said; an answer that was cut off is closed with eos."""
        eos = self._tokenizer.eos_id
        self.ids = self.ids + list(ids) + ([] if list(ids[-1:]) == [eos] else [eos])
