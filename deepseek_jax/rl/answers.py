"""Answers written as text, in any writing system: the number that an answer is, and whether two answers are the same.

One number is written in many ways: 1000, 1,000, 1.000,0, １０００, ١٠٠٠, 1000., $1000, 1000 apples, \\boxed{1{,}000}. A
comma parts thousands where three digits follow it, so "1,234" is 1234; anywhere else it parts the members of a list, so
"1,5" is neither 1.5 nor 15, but the text "1,5". Nothing is evaluated but one division. This module needs neither jax
nor a model, so that worker processes start fast.
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Hashable, Sequence
from fractions import Fraction

SPELT_AS = str.maketrans("−–﹣⁄∕٫٬٪", "---//.,%")
CURRENCY = "$¢£¤¥฿₩€₪₫₹₽₺₴₦﷼"
NO_UNITS = {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "or", "and", "to"}

DECIMAL = r"(?:\d{1,40}(?:\.\d{1,40})?|\.\d{1,40})"  # bounded: 1e999999 would be a number of a million digits
NUMBER = re.compile(rf"([+-]?)\s*(?:(\d{{1,40}}) )?({DECIMAL})(?:\s*/\s*({DECIMAL}))?", re.ASCII)
# 1,000,000 and, in India, 10,00,000
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{2,3}){0,12},\d{3}(?![\d,])", re.ASCII)
# 1.000,5
EUROPEAN = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\.\d{3}){1,12},\d{1,40}|(?:\.\d{3}){2,12})(?![\d.,])", re.ASCII)
# 1 000 with a space that does not break
SPACED = re.compile(r"(?<=\d)(?:['’\u00a0\u2009\u202f]|\\[,; ]|\{,\}|~)(?=\d{3}(?!\d))")
MEASURE = re.compile(r"(.*[\d.])(\s*)([^\d.]+)")

BOXED = re.compile(r"\\boxed\s*\{")
FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
DELIMITED = re.compile(r"\$\$(.+)\$\$|\$(.+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
LAYOUT = re.compile(r"\\!|\\(?:left|right|displaystyle|limits)(?![A-Za-z])")


@dataclasses.dataclass(frozen=True)
class Answer:
    """`text` in one spelling and, where it is a number, with or without a unit, its `value`."""

    text: str
    value: Fraction | None = None
    unit: str = ""


def same_answer(given: str, expected: str) -> bool:
    """True if two answers are the same number or the same text. An empty answer is never right.

    12, 12.0, 24/2 and 11 2/2 are one number. Units have to agree where both have one. A percentage is the same as its
    hundredths and as the number before the sign, since questions ask for either.
    """
    return _same(read_answer(given), read_answer(expected))


def votes(answers: Sequence[str | None]) -> list[int | None]:
    """The candidate that each answer is a vote for, by the index of its first vote; None for an answer that is None.

    Answers are one candidate if `same_answer` calls them the same, and each the same as the same others: 0.5, .5 and
    1/2 are one, and 5 and 5 cm, but not if 5 km is there too, since then 5 might be either. So the order of the answers
    decides nothing.
    """
    read = {answer: read_answer(answer) for answer in answers if answer is not None}
    # an empty answer is not even the same as itself
    alike = {
        answer: frozenset(other for other in read if _same(read[answer], read[other])) or answer for answer in read
    }
    first: dict[Hashable, int] = {}
    return [None if answer is None else first.setdefault(alike[answer], index) for index, answer in enumerate(answers)]


def _same(ours: Answer, theirs: Answer) -> bool:
    if ours.value is None or theirs.value is None:
        return ours.text == theirs.text != ""
    if ours.unit and theirs.unit:
        return (ours.unit, ours.value) == (theirs.unit, theirs.value)
    hundredths = [answer.value / 100 if answer.unit == "%" else answer.value for answer in (ours, theirs)]
    return ours.value == theirs.value or hundredths[0] == hundredths[1]


def read_answer(answer: str) -> Answer:
    """An answer's text in one spelling, and its number if it is one. Of a text with \\boxed{…} the last box is the
    answer."""
    content = boxed(answer)
    text = fold(SPACED.sub(",", LAYOUT.sub("", answer if content is None else content)))
    text = " ".join(_without_latex(text).split())
    text = text.rstrip(".。｡।۔").rstrip() or text
    plain = GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    plain = EUROPEAN.sub(lambda match: match[0].replace(".", "").replace(",", "."), plain)
    plain, unit = _measure(plain)
    return Answer(text=re.sub(r"\s*,\s*", ",", text), value=_number(plain), unit=unit)


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{…}; None without one, or where its end is missing."""
    start = max((match.end() for match in BOXED.finditer(text)), default=None)
    if start is None:
        return None
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def fold(text: str) -> str:
    """Text in one spelling: composed (NFC), letters and digits of one width and font, decimal digits of every script as
    0-9, signs as ASCII has them, without marks that only steer layout (directions, joiners, variation selectors)."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", "".join(map(_folded, unicodedata.normalize("NFC", text)))).translate(SPELT_AS)


@functools.cache
def _folded(char: str) -> str:
    if unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f":
        return ""
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    kind, _, decomposed = unicodedata.decomposition(char).partition(" ")
    if kind == "<fraction>":
        return " " + unicodedata.normalize("NFKC", char)  # 1½ is 1 1/2, not 11/2
    if kind in ("<wide>", "<narrow>", "<font>") or (kind == "<compat>" and " " not in decomposed):
        return unicodedata.normalize("NFKC", char)
    return char


def _without_latex(text: str) -> str:
    delimited = DELIMITED.fullmatch(text.strip())
    text = next(filter(None, delimited.groups())) if delimited else text
    text = FRACTION.sub(lambda match: f" {match[1] or match[2]}/{match[3] or match[4]}", TEXT.sub(r" \1 ", text))
    text = re.sub(r"\\[,; ]|~", " ", text)
    return re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "°", text).replace("\\%", "%").replace("\\$", "$")


def _measure(text: str) -> tuple[str, str]:
    """(number, unit) of "$5", "50 %", "5 cm", "5個"; of anything else (text, ""). Letters of an alphabet are a unit
    where they are a word of their own: 3x, 3 x and 2 pi are algebra."""
    sign, rest = (text[0], text[1:].lstrip()) if text[:1] in ("+", "-") else ("", text)
    if rest[:1] and rest[0] in CURRENCY:
        return sign + rest[1:].lstrip(), rest[0]
    match = MEASURE.fullmatch(text)
    if match is None:
        return text, ""
    number, gap, unit = match.groups()
    words = unit.split()
    a_word = (
        gap != ""
        and all(word.isalpha() and len(word) > 1 for word in words)
        and NO_UNITS.isdisjoint(unit.lower().split())
    )
    uncased = unit.upper() == unit.lower() and any(map(str.isalpha, unit))
    return (number, unit) if unit in CURRENCY or unit[0] in "%°" or a_word or uncased else (text, "")


def _number(text: str) -> Fraction | None:
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, numerator, denominator = match.groups()
    divisor = Fraction(denominator or 1)
    if divisor == 0 or (whole and denominator is None):
        return None
    value = Fraction(whole or 0) + Fraction(numerator) / divisor
    return -value if sign == "-" else value
