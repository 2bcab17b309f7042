"""Bit parity: is the number of ones odd? Short answers can only guess; a chain of running parities can't go wrong by
much.

The task of "How reinforcement learning after next-token prediction facilitates learning" (arXiv 2510.11495). Ladder: 8,
12, 16, 20, 32, 50 bits.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ranges import at_least
from deepseek_jax.rl.tasks import base

ZERO = ord("0")


@flax.struct.dataclass
class Bits:
    bits_BK: jax.Array  # int32, 0 or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityTask(base.Task):
    """Prompt: `bits` binary digits. Long chain: the running parities. Short chain: nothing. Answer: the parity of
    all."""

    bits: int = 20

    def __post_init__(self):
        super().__post_init__()
        self.check(bits=at_least(8, why="fewer are memorized, and leave too few problems to hold out"))

    @property
    def prompt_length(self) -> int:
        return self.bits + 3

    @property
    def completion_length(self) -> int:
        return self.bits + 6

    def draw(self, key, n):
        return Bits(jax.random.bernoulli(key, 0.5, (n, self.bits)).astype(jnp.int32))

    def hashed(self, instances):
        return instances.bits_BK

    def prompts(self, instances):
        return base.prompt(ZERO + instances.bits_BK)

    def demonstrations(self, key, instances, good=None):
        """Long with `cot_probability`. Where it goes wrong, one running parity is miscounted and the rest follows from
        it."""
        n = instances.bits_BK.shape[0]
        long_key, good_key, slip_key = jax.random.split(key, 3)
        long_B = jax.random.bernoulli(long_key, self.cot_probability, (n,))
        good_B = self.draw_good(good_key, n, good)
        slip_B = jax.random.randint(slip_key, (n,), 0, self.bits)
        slipped_BK = ~good_B[:, None] & (jnp.arange(self.bits) == slip_B[:, None])
        parities_BK = (jnp.cumsum(instances.bits_BK, axis=1) + jnp.cumsum(slipped_BK, axis=1)) % 2
        chain_BK = ZERO + parities_BK
        keep_BK = jnp.broadcast_to(long_B[:, None], chain_BK.shape)
        return base.completion(chain_BK, keep_BK, chain_BK[:, -1:], jnp.ones((n, 1), bool), self.completion_length)

    def accuracy(self, instances, completions_BN, mask_BN):
        parsed = base.parse(completions_BN, mask_BN)
        answer_B = base.answer_symbols(completions_BN, parsed, 1)[:, 0]
        right_B = answer_B == ZERO + instances.bits_BK.sum(1) % 2
        return (parsed.ok_B & (parsed.answer_length_B == 1) & right_B).astype(jnp.float32)

    def prompt_text(self, instances):
        return ["".join(map(str, bits)) for bits in np.asarray(instances.bits_BK).tolist()]

    def answer_text(self, instances):
        return [str(sum(bits) % 2) for bits in np.asarray(instances.bits_BK).tolist()]

    def check_text(self, prompt, completion):
        answer = base.answer_in(completion)
        return answer == str(prompt.count("1") % 2)
