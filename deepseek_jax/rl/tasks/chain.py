"""Chains of modular arithmetic, reasoned in steps of variable size, in one or two digit alphabets.

A long chain writes down every intermediate value; a leap of g writes every g-th and must do g operations in the head.
Ladder: 4, 6, 8, 10, 14, 20 operations modulo 10, then modulo 97. With two alphabets a language token in the prompt asks
for '0'-'9' or 'a'-'j', demonstrations mix both, and the language-consistency reward (R1 eq. 7) has something to do.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import ConfigError
from deepseek_jax.ranges import PROBABILITY, at_least
from deepseek_jax.rl.tasks import base

ZERO, LETTER_A, STEP_A = ord("0"), ord("a"), ord("A")
OPERATORS = "+*-"
LANGUAGES = "#$"  # digits, letters


@flax.struct.dataclass
class Chain:
    start_B: jax.Array  # int32, 0 <= start < modulus
    operators_BK: jax.Array  # int32 index into OPERATORS
    operands_BK: jax.Array  # int32, one digit
    language_B: jax.Array  # int32: 0 digits, 1 letters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainTask(base.Task):
    """Prompt: [language] start, then `operations` times an operator and a digit, applied from left to right modulo
    `modulus`.

    Chain: for every g-th operation its index as a capital letter and the value after it, zero-padded. Answer: the last
    value. g is drawn from `leaps`: the first with `cot_probability`, the others in equal shares; g >= `operations` is
    an empty chain. With two `alphabets` each digit of a demonstrated chain is in the wrong one with
    `wrong_alphabet_probability`; an answer may be in either.
    """

    operations: int = 10
    modulus: int = 10
    leaps: tuple[int, ...] = (1, 2, 5, 10)
    alphabets: int = 1
    wrong_alphabet_probability: float = 0.35

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "leaps", tuple(self.leaps))
        self.check(
            operations=at_least(2, at_most=26, why="steps are numbered with capital letters"),
            modulus=at_least(2, at_most=100, why="values have one or two digits"),
            alphabets=at_least(1, at_most=2),
            wrong_alphabet_probability=PROBABILITY,
        )
        if not self.leaps or min(self.leaps) < 1:
            raise ConfigError(f"{type(self).__name__}.leaps={self.leaps}: must be at least one leap, each at least 1")

    @property
    def width(self) -> int:
        return 1 if self.modulus <= 10 else 2

    @property
    def prompt_length(self) -> int:
        return 3 + (self.alphabets - 1) + self.width + 2 * self.operations

    @property
    def completion_length(self) -> int:
        return 5 + self.width + self.operations * (1 + self.width)

    def draw(self, key, n):
        start_key, operator_key, operand_key, language_key = jax.random.split(key, 4)
        return Chain(
            jax.random.randint(start_key, (n,), 0, self.modulus),
            jax.random.randint(operator_key, (n, self.operations), 0, len(OPERATORS)),
            jax.random.randint(operand_key, (n, self.operations), 0, min(self.modulus, 10)),
            jax.random.randint(language_key, (n,), 0, self.alphabets),
        )

    def hashed(self, instances):
        """A problem is the same in either alphabet."""
        return jnp.concatenate([instances.start_B[:, None], instances.operators_BK, instances.operands_BK], 1)

    def values(self, instances: Chain, slips_BK: jax.Array | int = 0) -> jax.Array:
        """The value after each operation; `slips_BK` is added to it before the next. int32[B, K]."""

        def step(value_B, operation):
            operator_B, operand_B, slip_B = operation
            value_B = jnp.select(
                [operator_B == 0, operator_B == 1], [value_B + operand_B, value_B * operand_B], value_B - operand_B
            )
            value_B = (value_B + slip_B) % self.modulus
            return value_B, value_B

        slips_BK = jnp.broadcast_to(slips_BK, instances.operands_BK.shape)
        operations = (instances.operators_BK.T, instances.operands_BK.T, slips_BK.T)
        return jax.lax.scan(step, instances.start_B, operations)[1].T

    def prompts(self, instances):
        operator_bytes = jnp.array([ord(c) for c in OPERATORS])
        pairs_BK2 = jnp.stack([operator_bytes[instances.operators_BK], ZERO + instances.operands_BK], 2)
        pieces = [ZERO + base.digits(instances.start_B, self.width), pairs_BK2.reshape(pairs_BK2.shape[0], -1)]
        if self.alphabets == 2:
            pieces.insert(0, jnp.array([ord(c) for c in LANGUAGES])[instances.language_B][:, None])
        return base.prompt(jnp.concatenate(pieces, 1))

    def demonstrations(self, key, instances, good=None):
        """A wrong chain has one operation whose result is off by 1 to modulus - 1; the rest follows from it."""
        n, operations = instances.operands_BK.shape
        leap_key, good_key, place_key, slip_key, alphabet_key = jax.random.split(key, 5)
        others = len(self.leaps) - 1
        shares = [self.cot_probability] + [(1 - self.cot_probability) / others] * others if others else [1.0]
        leap_B1 = jax.random.choice(leap_key, jnp.array(self.leaps), (n, 1), p=jnp.array(shares))
        good_B = self.draw_good(good_key, n, good)
        place_B = jax.random.randint(place_key, (n,), 0, operations)
        slip_B = jax.random.randint(slip_key, (n,), 1, self.modulus)
        slips_BK = jnp.where(~good_B[:, None] & (jnp.arange(operations) == place_B[:, None]), slip_B[:, None], 0)
        values_BK = self.values(instances, slips_BK)

        digits_BKW = base.digits(values_BK, self.width)
        wrong_BKW = jax.random.bernoulli(alphabet_key, self.wrong_alphabet_probability, digits_BKW.shape) & (
            self.alphabets == 2
        )
        letters_BKW = (instances.language_B[:, None, None] == 1) ^ wrong_BKW
        symbols_BKW = digits_BKW + jnp.where(letters_BKW, LETTER_A, ZERO)
        number_K = jnp.arange(1, operations + 1)
        index_BK1 = jnp.broadcast_to((STEP_A - 1 + number_K)[None, :, None], (n, operations, 1))
        chain_BKX = jnp.concatenate([index_BK1, symbols_BKW], 2)
        written_BK = (number_K % leap_B1 == 0) & (leap_B1 < operations)
        keep_BKX = jnp.broadcast_to(written_BK[:, :, None], chain_BKX.shape)
        answer_BW = digits_BKW[:, -1] + jnp.where(instances.language_B[:, None] == 1, LETTER_A, ZERO)
        return base.completion(
            chain_BKX.reshape(n, -1),
            keep_BKX.reshape(n, -1),
            answer_BW,
            jnp.ones(answer_BW.shape, bool),
            self.completion_length,
        )

    def accuracy(self, instances, completions_BN, mask_BN):
        parsed = base.parse(completions_BN, mask_BN)
        answer_BW = base.answer_symbols(completions_BN, parsed, self.width)
        digit_BW = jnp.where(answer_BW >= LETTER_A, answer_BW - LETTER_A, answer_BW - ZERO)
        same_alphabet_B = (answer_BW >= LETTER_A).all(1) | (answer_BW < LETTER_A).all(1)
        right_B = (digit_BW == base.digits(self.values(instances)[:, -1], self.width)).all(1)
        return (parsed.ok_B & (parsed.answer_length_B == self.width) & same_alphabet_B & right_B).astype(jnp.float32)

    def in_alphabet(self, instances: Chain, completions_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(target_BN, symbol_BN), bool: tokens that are digits of the prompt's alphabet, and digits of any."""
        digit_BN = (completions_BN >= ZERO) & (completions_BN <= ZERO + 9)
        letter_BN = (completions_BN >= LETTER_A) & (completions_BN <= LETTER_A + 9)
        return jnp.where(instances.language_B[:, None] == 1, letter_BN, digit_BN), digit_BN | letter_BN

    def prompt_text(self, instances):
        texts = []
        for start, operators, operands, language in zip(*_lists(instances), strict=True):
            prefix = LANGUAGES[language] if self.alphabets == 2 else ""
            steps = "".join(OPERATORS[o] + str(c) for o, c in zip(operators, operands, strict=True))
            texts.append(f"{prefix}{start:0{self.width}d}{steps}")
        return texts

    def answer_text(self, instances):
        values = np.asarray(self.values(instances))[:, -1].tolist()
        texts = [f"{value:0{self.width}d}" for value in values]
        languages = np.asarray(instances.language_B).tolist()
        return [
            text.translate(TO_LETTERS) if language else text for text, language in zip(texts, languages, strict=True)
        ]

    def check_text(self, prompt, completion):
        answer = base.answer_in(completion)
        if answer is None or len(answer) != self.width:
            return False
        text = prompt.lstrip(LANGUAGES)
        value, steps = int(text[: self.width]), text[self.width :]
        for operator, operand in zip(steps[::2], steps[1::2], strict=True):
            value = {"+": value + int(operand), "*": value * int(operand), "-": value - int(operand)}[operator]
        expected = f"{value % self.modulus:0{self.width}d}"
        return answer in (expected, expected.translate(TO_LETTERS))


TO_LETTERS = str.maketrans("0123456789", "abcdefghij")


def _lists(instances: Chain) -> list[list]:
    return [
        np.asarray(x).tolist()
        for x in (instances.start_B, instances.operators_BK, instances.operands_BK, instances.language_B)
    ]
