"""Countdown: reach a target with the given numbers, each used once. Many right answers, found by search.

Expressions are written in reverse Polish notation without separators, numbers with a fixed count of digits: 35+2* is (3
+ 5) * 2. Only the stack machine below evaluates them, in exact fractions; a text cannot make it evaluate anything else.
"""

import dataclasses
import functools
import re
from fractions import Fraction

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import ConfigError
from deepseek_jax.ranges import at_least
from deepseek_jax.rl.tasks import base

ZERO = ord("0")
OPERATORS = "+-*/"
OPERATOR_BYTES = [ord(c) for c in OPERATORS]


@flax.struct.dataclass
class Goal:
    numbers_BM: jax.Array  # int32, 1 <= number <= max_number, ascending
    target_B: jax.Array  # int32, 1 <= target <= max_target
    solution_BA: jax.Array  # int32: bytes of one expression that reaches the target


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountdownTask(base.Task):
    """Prompt: the numbers and the target, as in `2,3,5=16`. Answer: an expression over all numbers that is exactly the
    target.

    Long chain: up to `max_tries` expressions with their values, `352*+=13,…`, until one hits (`x` stands for a value
    that is not an integer from 0 to `max_target`). Short chain: nothing. Ladder: 3 numbers up to 9, then 4 up to 20.
    """

    numbers: int = 3
    max_number: int = 9
    max_target: int = 50
    max_tries: int = 8

    def __post_init__(self):
        super().__post_init__()
        self.check(
            numbers=at_least(2, at_most=6),
            max_number=at_least(2, at_most=99, why="numbers have one or two digits"),
            max_target=at_least(10, at_most=999),
            max_tries=at_least(1),
        )
        if 2 ** (self.numbers - 1) * self.max_number**self.numbers >= 2**31:
            raise ConfigError(
                f"{type(self).__name__}.max_number={self.max_number}: fractions of {self.numbers} such numbers "
                "overflow 32 bits; lower max_number or numbers"
            )

    @property
    def width(self) -> int:
        return len(str(self.max_number))

    @property
    def target_width(self) -> int:
        return len(str(self.max_target))

    @property
    def expression_length(self) -> int:
        return self.numbers * self.width + self.numbers - 1

    @property
    def prompt_length(self) -> int:
        return 3 + self.numbers * (self.width + 1) + self.target_width

    @property
    def completion_length(self) -> int:
        return 5 + self.max_tries * (self.expression_length + 2 + self.target_width) + self.expression_length

    def draw(self, key, n):
        numbers_key, expression_key = jax.random.split(key)
        numbers_BM = jnp.sort(jax.random.randint(numbers_key, (n, self.numbers), 1, self.max_number + 1), axis=1)
        solution_BA = self.expressions(expression_key, numbers_BM)
        return Goal(numbers_BM, self.value(solution_BA, numbers_BM), solution_BA)

    def usable(self, instances):
        return (instances.target_B >= 1) & (instances.target_B <= self.max_target)

    def hashed(self, instances):
        return jnp.concatenate([instances.numbers_BM, instances.target_B[:, None]], 1)

    def expressions(self, key: jax.Array, numbers_BM: jax.Array) -> jax.Array:
        """A random expression over each row of numbers: bytes, int32[B, expression_length]."""
        n, count = numbers_BM.shape
        order_key, operator_key, shape_key = jax.random.split(key, 3)
        order_BM = jnp.argsort(jax.random.uniform(order_key, (n, count)), axis=1)
        number_bytes_BX = ZERO + base.digits(jnp.take_along_axis(numbers_BM, order_BM, 1), self.width).reshape(n, -1)
        operators_BX = jnp.array(OPERATOR_BYTES)[jax.random.randint(operator_key, (n, count - 1), 0, len(OPERATORS))]
        layouts_SA = jnp.array(_layouts(count, self.width))
        layout_BA = layouts_SA[jax.random.randint(shape_key, (n,), 0, layouts_SA.shape[0])]
        return jnp.take_along_axis(jnp.concatenate([number_bytes_BX, operators_BX], 1), layout_BA, 1)

    def value(self, expression_BA: jax.Array, numbers_BM: jax.Array) -> jax.Array:
        """The integer an expression over exactly these numbers is worth; -1 for anything else: another value, a
        division by zero, a number missing, repeated or made up, a stack that under- or overflows, a byte that belongs
        to no expression. int32[B].

        Fractions stay below 2^(M-1) * max_number^M, which the constructor keeps below 2^31.
        """
        n, count = numbers_BM.shape
        rows_B = jnp.arange(n)

        def step(state, byte_B):
            stack_B2M, used_BM, depth_B, pushed_B, pending_B, pending_digits_B, ok_B = state
            is_digit_B = (byte_B >= ZERO) & (byte_B <= ZERO + 9)
            operator_B = (byte_B[:, None] == jnp.array(OPERATOR_BYTES)).argmax(1)
            is_operator_B = (byte_B[:, None] == jnp.array(OPERATOR_BYTES)).any(1)
            is_end_B = byte_B == base.PAD
            ok_B &= is_digit_B | is_operator_B | is_end_B

            number_B = jnp.where(is_digit_B, 10 * pending_B + byte_B - ZERO, 0)
            pending_digits_B = jnp.where(is_digit_B, pending_digits_B + 1, pending_digits_B)
            complete_B = is_digit_B & (pending_digits_B == self.width)
            ok_B &= is_digit_B | (pending_digits_B == 0)
            ok_B &= ~complete_B | ((pushed_B < count) & (number_B >= 1) & (number_B <= self.max_number))
            push_B = complete_B & ok_B
            used_BM = used_BM.at[rows_B, pushed_B].set(
                jnp.where(push_B, number_B, used_BM[rows_B, pushed_B]), mode="drop"
            )
            pushed_B += push_B

            ok_B &= ~is_operator_B | (depth_B >= 2)
            apply_B = is_operator_B & ok_B
            first_B2 = stack_B2M[rows_B, :, jnp.maximum(depth_B - 2, 0)]
            second_B2 = stack_B2M[rows_B, :, jnp.maximum(depth_B - 1, 0)]
            result_B2 = _apply(operator_B, first_B2, second_B2)
            ok_B &= ~apply_B | (result_B2[:, 1] != 0)
            result_B2 = jnp.where((apply_B & ok_B)[:, None], result_B2, jnp.array([0, 1]))

            slot_B = jnp.where(push_B, depth_B, jnp.maximum(depth_B - 2, 0))
            fraction_B2 = jnp.where(push_B[:, None], jnp.stack([number_B, jnp.ones_like(number_B)], 1), result_B2)
            write_B1 = (push_B | apply_B)[:, None]
            fraction_B2 = jnp.where(write_B1, fraction_B2, stack_B2M[rows_B, :, jnp.minimum(slot_B, count - 1)])
            stack_B2M = stack_B2M.at[rows_B, :, slot_B].set(fraction_B2, mode="drop")
            depth_B = depth_B + push_B - apply_B
            pending_B, pending_digits_B = jnp.where(complete_B, 0, number_B), jnp.where(complete_B, 0, pending_digits_B)
            return (stack_B2M, used_BM, depth_B, pushed_B, pending_B, pending_digits_B, ok_B), None

        zeros_B = jnp.zeros(n, jnp.int32)
        empty_B2M = jnp.stack([jnp.zeros((n, count), jnp.int32), jnp.ones((n, count), jnp.int32)], 1)
        state = (empty_B2M, jnp.zeros((n, count), jnp.int32), zeros_B, zeros_B, zeros_B, zeros_B, jnp.ones(n, bool))
        stack_B2M, used_BM, depth_B, _, _, pending_digits_B, ok_B = jax.lax.scan(step, state, expression_BA.T)[0]
        numerator_B, denominator_B = stack_B2M[:, 0, 0], stack_B2M[:, 1, 0]
        ok_B &= (
            (depth_B == 1)
            & (pending_digits_B == 0)
            & (jnp.sort(used_BM, axis=1) == jnp.sort(numbers_BM, axis=1)).all(1)
        )
        quotient_B = numerator_B // denominator_B
        whole_B = (quotient_B * denominator_B == numerator_B) & (quotient_B >= 0)
        return jnp.where(ok_B & whole_B, quotient_B, -1)

    def prompts(self, instances):
        n = instances.target_B.shape[0]
        numbers_BMW = ZERO + base.digits(instances.numbers_BM, self.width)
        separators_M = jnp.array([ord(",")] * (self.numbers - 1) + [ord("=")])
        separators_BM1 = jnp.broadcast_to(separators_M[None, :, None], (n, self.numbers, 1))
        list_BX = jnp.concatenate([numbers_BMW, separators_BM1], 2).reshape(n, -1)
        return base.prompt(jnp.concatenate([list_BX, ZERO + base.digits(instances.target_B, self.target_width)], 1))

    def demonstrations(self, key, instances, good=None):
        """Tries are random; the last one, if none hit before, is the known solution. Where it goes wrong, the last try
        is a miss that is written down as a hit, and answered with."""
        n, tries = instances.target_B.shape[0], self.max_tries
        long_key, good_key, try_key = jax.random.split(key, 3)
        long_B = jax.random.bernoulli(long_key, self.cot_probability, (n,))
        good_B = self.draw_good(good_key, n, good)
        repeated_XM = jnp.repeat(instances.numbers_BM, tries, axis=0)
        tries_XA = self.expressions(try_key, repeated_XM)
        tries_BTA = tries_XA.reshape(n, tries, -1)
        values_BT = self.value(tries_XA, repeated_XM).reshape(n, tries)

        hit_BT = values_BT == instances.target_B[:, None]
        last_B = jnp.where(good_B & hit_BT.any(1), hit_BT.argmax(1), tries - 1)
        last_BT = jnp.arange(tries) == last_B[:, None]
        miss_BA = self._miss(instances, tries_BTA, hit_BT)
        final_BA = jnp.where(good_B[:, None], instances.solution_BA, miss_BA)
        final_BA = jnp.where((good_B & hit_BT.any(1))[:, None], tries_BTA[jnp.arange(n), last_B], final_BA)
        tries_BTA = jnp.where(last_BT[:, :, None], final_BA[:, None], tries_BTA)
        values_BT = jnp.where(last_BT, instances.target_B[:, None], values_BT)

        written_BT = (jnp.arange(tries) <= last_B[:, None]) & (good_B[:, None] | ~hit_BT | last_BT)
        shown_BT = (values_BT >= 0) & (values_BT <= self.max_target)
        value_BTW = ZERO + base.digits(jnp.maximum(values_BT, 0), self.target_width)
        value_BTW = jnp.where(shown_BT[:, :, None], value_BTW, ord("x"))

        def column(byte):
            return jnp.full((n, tries, 1), byte, jnp.int32)

        chain_BTX = jnp.concatenate([tries_BTA, column(ord("=")), value_BTW, column(ord(","))], 2)
        keep_BTX = jnp.broadcast_to((long_B[:, None] & written_BT)[:, :, None], chain_BTX.shape)
        digit = jnp.arange(chain_BTX.shape[2]) - self.expression_length - 1
        keep_BTX &= shown_BT[:, :, None] | (digit <= 0) | (digit >= self.target_width)  # a single x
        return base.completion(
            chain_BTX.reshape(n, -1),
            keep_BTX.reshape(n, -1),
            final_BA,
            jnp.ones(final_BA.shape, bool),
            self.completion_length,
        )

    def _miss(self, instances: Goal, tries_BTA: jax.Array, hit_BT: jax.Array) -> jax.Array:
        """A try that misses; where all hit, the sum or else the product of all numbers, whichever isn't the target."""
        n = instances.target_B.shape[0]
        number_bytes_BX = ZERO + base.digits(instances.numbers_BM, self.width).reshape(n, -1)

        def folded(operator):
            return jnp.pad(number_bytes_BX, ((0, 0), (0, self.numbers - 1)), constant_values=ord(operator))

        sum_hits_B1 = (instances.numbers_BM.sum(1) == instances.target_B)[:, None]
        fallback_BA = jnp.where(sum_hits_B1, folded("-"), folded("+"))
        missed_BA = tries_BTA[jnp.arange(n), (~hit_BT).argmax(1)]
        return jnp.where((~hit_BT).any(1)[:, None], missed_BA, fallback_BA)

    def accuracy(self, instances, completions_BN, mask_BN):
        parsed = base.parse(completions_BN, mask_BN)
        expression_BA = base.answer_symbols(completions_BN, parsed, self.expression_length)
        right_B = self.value(expression_BA, instances.numbers_BM) == instances.target_B
        return (parsed.ok_B & (parsed.answer_length_B == self.expression_length) & right_B).astype(jnp.float32)

    def prompt_text(self, instances):
        numbers, targets = np.asarray(instances.numbers_BM).tolist(), np.asarray(instances.target_B).tolist()
        return [
            ",".join(f"{x:0{self.width}d}" for x in row) + f"={target:0{self.target_width}d}"
            for row, target in zip(numbers, targets, strict=True)
        ]

    def answer_text(self, instances):
        return [bytes(row).decode() for row in np.asarray(instances.solution_BA).tolist()]

    def check_text(self, prompt, completion):
        answer = base.answer_in(completion)
        if answer is None:
            return False
        given, target = prompt.split("=")
        tokens = re.findall(rf"[0-9]{{{self.width}}}|[-+*/]", answer)
        if "".join(tokens) != answer or len(tokens) > 2 * self.numbers:
            return False
        stack = []
        for token in tokens:
            if token not in OPERATORS:
                stack.append(Fraction(int(token)))
                continue
            if len(stack) < 2 or (token == "/" and stack[-1] == 0):
                return False
            b, a = stack.pop(), stack.pop()
            stack.append(a + b if token == "+" else a - b if token == "-" else a * b if token == "*" else a / b)
        used = sorted(int(token) for token in tokens if token not in OPERATORS)
        return stack == [Fraction(int(target))] and used == sorted(map(int, given.split(",")))


def _apply(operator_B: jax.Array, a_B2: jax.Array, b_B2: jax.Array) -> jax.Array:
    """a (operator) b on fractions [numerator, denominator]; the denominator is 0 where b is 0 under a division."""
    (a, c), (b, d) = a_B2.T, b_B2.T
    numerators = [a * d + b * c, a * d - b * c, a * b]
    return jnp.stack(
        [
            jnp.select([operator_B == 0, operator_B == 1, operator_B == 2], numerators, a * d),
            jnp.where(operator_B == 3, c * b, c * d),
        ],
        axis=1,
    )


@functools.cache
def _layouts(count: int, width: int) -> np.ndarray:
    """Every order of `count` numbers and their operators that is an expression: for each byte its index in the number
    bytes, then the operators."""

    def orders(numbers: int, operators: int):
        if numbers == count and operators == count - 1:
            yield []
        if numbers < count:
            for rest in orders(numbers + 1, operators):
                yield [*range(numbers * width, (numbers + 1) * width), *rest]
        if operators < numbers - 1:
            for rest in orders(numbers, operators + 1):
                yield [count * width + operators, *rest]

    return np.array(list(orders(0, 0)))
