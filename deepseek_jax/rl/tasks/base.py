"""Base of all tasks: the token format, the split into train and held-out problems, and whole documents.

A problem is an `Instance`: a pytree of integer arrays with a leading axis of problems. Prompts are
<bos><user>TEXT<assistant>, completions <think>chain</think><answer>answer</answer><eos>, both in the ids of the byte
tokenizer. Everything but the text forms works on static shapes and runs inside jit.
"""

import abc
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.tokenizers import ByteTokenizer
from deepseek_jax.ranges import PROBABILITY, Range, at_least, check
from deepseek_jax.rl.text_rewards import split_completion

TOKENIZER = ByteTokenizer()
PAD, BOS, EOS = TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id
THINK, END_THINK, ANSWER, END_ANSWER, USER, ASSISTANT = (
    TOKENIZER.specials[tag] for tag in ("<think>", "</think>", "<answer>", "</answer>", "<user>", "<assistant>")
)
FIRST_SPECIAL = 256

Instance = Any


@flax.struct.dataclass
class Parsed:
    """The positions of a completion's sections. Only meaningful where `ok_B`: elsewhere the format doesn't hold."""

    ok_B: jax.Array  # bool: starts with <think>, each tag once and in order, nothing else outside, ends with <eos>
    think_BN: jax.Array  # bool: inside <think>…</think>
    answer_start_B: jax.Array  # int32: first position inside <answer>…</answer>
    answer_length_B: jax.Array  # int32


def parse(completions_BN: jax.Array, mask_BN: jax.Array) -> Parsed:
    """Strict reading of <think>…</think><answer>…</answer><eos>. A truncated completion, a tag too many, a special
    token inside: not ok."""
    tokens_BN = jnp.where(mask_BN > 0, completions_BN, PAD)
    lengths_B = (mask_BN > 0).sum(1)

    def only(token):
        is_token_BN = tokens_BN == token
        return is_token_BN.argmax(1), is_token_BN.sum(1) == 1

    end_think_B, one_end_think_B = only(END_THINK)
    answer_B, one_answer_B = only(ANSWER)
    end_answer_B, one_end_answer_B = only(END_ANSWER)
    eos_B, one_eos_B = only(EOS)
    specials_B = ((tokens_BN >= FIRST_SPECIAL) & (mask_BN > 0)).sum(1)
    ok_B = one_end_think_B & one_answer_B & one_end_answer_B & one_eos_B & (specials_B == 5)
    ok_B &= (tokens_BN[:, 0] == THINK) & (answer_B == end_think_B + 1) & (end_answer_B > answer_B)
    ok_B &= (eos_B == end_answer_B + 1) & (lengths_B == eos_B + 1)
    positions_N = jnp.arange(tokens_BN.shape[1])
    think_BN = ok_B[:, None] & (positions_N > 0) & (positions_N < end_think_B[:, None])
    return Parsed(ok_B, think_BN, answer_B + 1, end_answer_B - answer_B - 1)


def answer_symbols(completions_BN: jax.Array, parsed: Parsed, width: int) -> jax.Array:
    """The first `width` tokens of each answer, PAD beyond its end. int32[B, width]."""
    offsets_W = jnp.arange(width)
    index_BW = jnp.clip(parsed.answer_start_B[:, None] + offsets_W, 0, completions_BN.shape[1] - 1)
    symbols_BW = jnp.take_along_axis(completions_BN, index_BW, axis=1)
    return jnp.where(parsed.ok_B[:, None] & (offsets_W < parsed.answer_length_B[:, None]), symbols_BW, PAD)


def compact(tokens_BM: jax.Array, keep_BM: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Moves the kept tokens of each row to its front: (tokens_BN, mask_BN) of width `length`, PAD behind."""
    order_BM = jnp.argsort(~keep_BM, axis=1, stable=True)[:, :length]
    mask_BN = jnp.take_along_axis(keep_BM, order_BM, axis=1)
    tokens_BN = jnp.where(mask_BN, jnp.take_along_axis(tokens_BM, order_BM, axis=1), PAD)
    pad = ((0, 0), (0, length - tokens_BN.shape[1]))
    return jnp.pad(tokens_BN, pad, constant_values=PAD).astype(jnp.int32), jnp.pad(mask_BN, pad).astype(jnp.int32)


def completion(
    chain_BM: jax.Array, keep_BM: jax.Array, answer_BA: jax.Array, keep_answer_BA: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Wraps chains and answers, of which some tokens are kept, into tagged completions: (tokens_BN, mask_BN)."""
    batch = chain_BM.shape[0]

    def column(*tokens):
        return jnp.broadcast_to(jnp.array(tokens, jnp.int32), (batch, len(tokens)))

    pieces = [column(THINK), chain_BM, column(END_THINK, ANSWER), answer_BA, column(END_ANSWER, EOS)]
    kept = [column(1) > 0, keep_BM, column(1, 1) > 0, keep_answer_BA, column(1, 1) > 0]
    return compact(jnp.concatenate(pieces, 1), jnp.concatenate(kept, 1), length)


def digits(values: jax.Array, width: int) -> jax.Array:
    """Decimal digits of non-negative integers, zero-padded: [...] -> int32[..., width], as numbers 0..9."""
    powers_W = 10 ** jnp.arange(width - 1, -1, -1)
    return (values[..., None] // powers_W) % 10


def hash_words(words_BW: jax.Array) -> jax.Array:
    """A fixed 32-bit hash of each row of integers, the same on every backend. uint32[B]."""

    def mix(h):
        h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
        h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
        return h ^ (h >> 16)

    places_W = jnp.uint32(0x9E3779B9) * jnp.arange(1, words_BW.shape[1] + 1, dtype=jnp.uint32)
    return mix(mix(words_BW.astype(jnp.uint32) ^ places_W).sum(1, dtype=jnp.uint32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A family of problems with exact answers; frozen, so that it can be a static argument of jit.

    A problem belongs to the held-out split if its hash falls into class 0 of `split_classes`, to the training split
    otherwise: which one is a property of the problem, so the splits can't overlap. `cot_probability` is the share of
    long chains among demonstrations, `corrupt_probability` the share of wrong ones.
    """

    split_classes: int = 8
    cot_probability: float = 0.1
    corrupt_probability: float = 0.0

    def __post_init__(self):
        self.check(
            split_classes=at_least(2, why="one class in that many is held out"),
            cot_probability=PROBABILITY,
            corrupt_probability=PROBABILITY,
        )

    def check(self, **ranges: Range) -> None:
        """Raises ConfigError for a field outside its range; see `deepseek_jax.ranges`."""
        check(self, f"{type(self).__name__}.", **ranges)

    @property
    @abc.abstractmethod
    def prompt_length(self) -> int:
        """Tokens of the longest prompt."""

    @property
    @abc.abstractmethod
    def completion_length(self) -> int:
        """Tokens of the longest demonstration: the least that `max_completion_length` should be."""

    @abc.abstractmethod
    def draw(self, key: jax.Array, n: int) -> Instance:
        """`n` independent problems of either split."""

    @abc.abstractmethod
    def hashed(self, instances: Instance) -> jax.Array:
        """The key of each problem, integers [n, W]: problems with equal keys go to the same split."""

    def usable(self, instances: Instance) -> jax.Array:
        """bool[n]: drawn problems that may be asked."""
        return jnp.ones(self.hashed(instances).shape[:1], bool)

    @abc.abstractmethod
    def prompts(self, instances: Instance) -> tuple[jax.Array, jax.Array]:
        """(prompts_BP int32, right-padded; lengths_B int32)."""

    @abc.abstractmethod
    def demonstrations(
        self, key: jax.Array, instances: Instance, good: jax.Array | bool | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The cold-start writer: (completions_BN, mask_BN). Where `good` is false the reasoning goes wrong; None draws
        it with `corrupt_probability`."""

    @abc.abstractmethod
    def accuracy(self, instances: Instance, completions_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
        """1.0 where the completion is well-formed and its answer right, else 0.0. float32[B]."""

    @abc.abstractmethod
    def prompt_text(self, instances: Instance) -> list[str]:
        """The problems as TEXT of their prompts. Host only."""

    @abc.abstractmethod
    def answer_text(self, instances: Instance) -> list[str]:
        """A right answer to each problem, for Python rewards. Host only."""

    @abc.abstractmethod
    def check_text(self, prompt: str, completion: str) -> bool:
        """True if `completion` answers `prompt`, both as text, by code that shares nothing with `accuracy`. Host
        only."""

    def heldout(self, instances: Instance) -> jax.Array:
        """bool[n]: the problem belongs to the held-out split."""
        return hash_words(self.hashed(instances)) % jnp.uint32(self.split_classes) == 0

    def sample(self, key: jax.Array, n: int, split: str = "train") -> Instance:
        """`n` problems of one split, "train" or "heldout": those in the wrong one are drawn again until none is
        left."""
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r}: 'train' or 'heldout'")

        def redraw(state):
            key, instances, wrong_B = state
            key, draw_key = jax.random.split(key)
            fresh = self.draw(draw_key, n)

            def choose(new, old):
                return jnp.where(wrong_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            instances = jax.tree.map(choose, fresh, instances)
            return key, instances, (self.heldout(instances) != (split == "heldout")) | ~self.usable(instances)

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: self.draw(key, n)))
        return jax.lax.while_loop(lambda state: state[2].any(), redraw, (key, nothing, jnp.ones(n, bool)))[1]

    def documents(
        self, key: jax.Array, n: int, split: str = "train", completion_only: bool = False
    ) -> dict[str, jax.Array]:
        """`n` prompts with their demonstrations: tokens_BT, mask_BT (1 on real tokens) and loss_mask_BT (1 on the
        tokens that are trained on: the completion's, or all of them), int32 with T = prompt_length + completion_length;
        for cold-start SFT and for mixing into pre-training.
        """
        sample_key, write_key = jax.random.split(key)
        instances = self.sample(sample_key, n, split)
        prompts_BP, lengths_B = self.prompts(instances)
        completions_BN, mask_BN = self.demonstrations(write_key, instances)
        in_prompt_BP = jnp.arange(self.prompt_length) < lengths_B[:, None]
        length = self.prompt_length + self.completion_length
        tokens_BT, mask_BT = compact(
            jnp.concatenate([prompts_BP, completions_BN], 1), jnp.concatenate([in_prompt_BP, mask_BN > 0], 1), length
        )
        trained_BT = mask_BT * (jnp.arange(length) >= lengths_B[:, None]) if completion_only else mask_BT
        return {"tokens_BT": tokens_BT, "mask_BT": mask_BT, "loss_mask_BT": trained_BT.astype(jnp.int32)}

    def draw_good(self, key: jax.Array, n: int, good: jax.Array | bool | None) -> jax.Array:
        if good is None:
            return ~jax.random.bernoulli(key, self.corrupt_probability, (n,))
        return jnp.broadcast_to(jnp.asarray(good, bool), (n,))


def prompt(text_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chat prompts of texts of one length: (prompts_BP, lengths_B)."""
    tokens_BP = jnp.pad(text_BX, ((0, 0), (2, 1)), constant_values=ASSISTANT).at[:, :2].set(jnp.array([BOS, USER]))
    return tokens_BP.astype(jnp.int32), jnp.full(text_BX.shape[:1], tokens_BP.shape[1], jnp.int32)


def to_texts(tokens_BN: jax.Array, mask_BN: jax.Array) -> list[str]:
    """Token ids to strings, tags included and <eos> left out: what text rewards and sample tables read. Host only."""
    rows = zip(np.asarray(tokens_BN), np.asarray(mask_BN), strict=True)
    return [TOKENIZER.decode([int(t) for t in tokens[mask > 0] if t != EOS]) for tokens, mask in rows]


def answer_in(completion: str) -> str | None:
    """The answer of a completion in text form, None where the format doesn't hold to the letter. Host only."""
    parts = split_completion(completion, spaces=False)
    return None if parts is None else parts[1]
