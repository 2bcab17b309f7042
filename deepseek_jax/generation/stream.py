"""Streaming: completions a few tokens at a time, and a chat that keeps the ids of its earlier turns."""

import bisect
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.tokenizers import Tokenizer
from deepseek_jax.errors import DataError, NumericsError
from deepseek_jax.generation.generate import advance, check_prompts, start
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.model.transformer import Transformer

PROMPT_SLOTS = 64  # prompts are padded to a multiple of this, so that the turns of a chat share a few programs
TOKENS_PER_CALL = 4

_start = jax.jit(start, static_argnames=("model", "sampling"))
_advance = jax.jit(advance, static_argnames=("model", "sampling"), donate_argnames="state")


def stream(
    model: Transformer, variables, prompt_ids: Sequence[int], rng: jax.Array, sampling: SamplingConfig
) -> Iterator[list[int]]:
    """Yields the ids of one completion, at most `TOKENS_PER_CALL` at a time, eos included.

    Raises DataError for an empty prompt or ids outside the vocabulary, and NumericsError, after the ids that came
    before, where the network's logits are not finite.
    """
    length = len(prompt_ids)
    if length == 0:
        raise DataError("the prompt has no tokens: give at least a begin-of-sequence token")
    prompts_BP = np.full((1, -(-length // PROMPT_SLOTS) * PROMPT_SLOTS), sampling.pad_id, np.int32)
    prompts_BP[0, :length] = prompt_ids
    lengths_B = np.asarray([length], np.int32)
    check_prompts(prompts_BP, lengths_B, model.config.vocab_size)
    state = _start(model, variables, prompts_BP, lengths_B, rng, sampling)
    advance_some = functools.partial(_advance, model, variables, sampling=sampling, steps=jnp.asarray(TOKENS_PER_CALL))
    sent = 0
    while True:
        made, live = int(state.lengths_B[0]), bool(state.live_B[0]) and int(state.step) < sampling.max_new_tokens
        if made > sent:
            yield state.tokens_BN[0, sent:made].tolist()
            sent = made
        if not state.finite_B[0]:
            raise NumericsError(
                f"the network's numbers are not finite (NaN or infinity) at token {made + 1} of the answer: its "
                "weights are damaged, or its training diverged; use an earlier checkpoint"
            )
        if not live:
            return
        state = advance_some(state=state)


class Chat:
    """A conversation, rendered by the tokenizer's template at every turn.

    Where the template leaves an answer as it is, the ids that were sampled are kept, so that the model sees exactly
    what it wrote. Where it rewrites earlier answers, as R1's drops their reasoning, the model sees what the template
    writes.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._messages: list[dict[str, str]] = []
        self.ids: list[int] = []

    def ask(self, text: str) -> list[int]:
        """Adds the user's turn and returns the whole conversation, ready for the answer."""
        messages = [*self._messages, {"role": "user", "content": text}]
        rendered = self._tokenizer.chat(messages)
        place = self._place_in(rendered)
        self._messages = messages
        self.ids = rendered if place is None else [*self.ids, *rendered[place:]]
        return self.ids

    def _place_in(self, rendered: Sequence[int]) -> int | None:
        """The number of ids at the start of `rendered` that write the conversation so far; None where the template has
        rewritten it."""

        def written(count: int) -> str:
            return self._tokenizer.decode(rendered[:count])

        said = self._tokenizer.decode(self.ids)
        place = bisect.bisect_left(range(len(rendered)), len(said), key=lambda count: len(written(count)))
        return place if written(place) == said else None

    def answer(self, ids: Sequence[int]) -> None:
        """Adds the model's answer, which may have been cut off."""
        said = list(ids[:-1]) if ids and ids[-1] in self._tokenizer.stop_ids else list(ids)
        self._messages.append(
            {"role": "assistant", "content": self._tokenizer.answer_opening + self._tokenizer.decode(said)}
        )
        self.ids = self.ids + said
