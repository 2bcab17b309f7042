"""Which answers are the same: numbers in any writing system and notation, texts in any encoding."""

import itertools
import unicodedata
from fractions import Fraction

import pytest

from deepseek_jax.rl.answers import boxed, fold, read_answer, same_answer, votes

SAME = {
    "decimals": [".5", "0.5", "0.50", "+.5", "1/2", "½", "2/4", r"\frac{1}{2}", r"\dfrac12", "٠٫٥"],
    "thousands": [
        "1000",
        "1,000",
        "1,000.0",
        "1000.",
        "１，０００",
        "１０００",
        "1\u202f000",
        "1’000",
        r"1{,}000",
        r"1\,000",
        "1.000,0",
        "١٬٠٠٠",
    ],
    "millions": ["1000000", "1,000,000", "1.000.000", "10,00,000", "१०,००,०००"],
    "digits": [
        "12",
        "12.0",
        "012",
        "１２",
        "१२",
        "١٢",
        "۱۲",
        "๑๒",
        "১২",
        "𝟏𝟐",
        "\u200f12\u200e",
        "12.",
        "12。",
        " 12 ",
        "24/2",
        "11 2/2",
    ],
    "negative": ["-3", "−3", "－3", "- 3", "–3", "-3.0", r"$-3$", r"\(-3\)"],
    "mixed": ["1.5", "1½", "1 1/2", r"1\frac{1}{2}", "3/2", r"\boxed{\frac32}", r"so it is \boxed{1.5}"],
    "money": ["$5", "5", r"\$5", "5 $", "$5.00", "＄5"],
    "yen": ["¥500", "￥500", "500¥", "500"],
    "percent": ["50%", r"50\%", "50 %", "50٪", "５０％"],
    "units": ["5 cm", r"5\text{ cm}", r"5\ \mathrm{cm}", "5", "5.0 cm"],
    "counters": ["5個", "5 個", "５個", "5"],
    "degrees": ["90°", r"90^\circ", r"90^{\circ}", "90"],
    "Vietnamese": ["tiếng", unicodedata.normalize("NFD", "tiếng")],
    "Korean": ["정답", unicodedata.normalize("NFD", "정답")],
    "Japanese": ["ガッコウ", "ｶﾞｯｺｳ"],
    "letters": ["ABC", "ＡＢＣ", "𝐀𝐁𝐂", r"\text{ABC}", "A\u200bBC"],
    "Greek": ["µ", "μ", "𝜇"],
    "emoji": ["✔", "✔\ufe0f"],
    "lists": ["1, 5", "1,5", "1 , 5", "１、5".replace("、", "，")],
    "sentences": ["yes", "yes.", " yes "],
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_answer_in_many_spellings(name):
    for given in SAME[name]:
        assert same_answer(given, SAME[name][0]) and same_answer(SAME[name][0], given), given


@pytest.mark.parametrize(
    "given,expected",
    [
        ("1,5", "1.5"), ("1,5", "15"), ("0,5", "5"), ("1.000", "1000"), ("1,0000", "10000"), ("12,34", "1234"),
        ("5 000", "5000"), ("3x", "3"), ("3 x", "3"), ("2 pi", "2"), (r"2\pi", "2"), ("2i", "2"), ("3!", "3"),
        ("10²", "102"), ("x²", "x2"), ("5 cm", "5 m2"), ("5 cm", "5 km"), ("$5", "€5"), ("5%", "500"), ("5%", "0.5"),
        ("50%", "50 cm"), ("12 13", "12"), ("12 or 13", "12"), ("-12", "12"), ("12/0", "12"), ("1/0", "2/0"),
        ("1.2e1", "12"), ("1½", "11/2"), ("", ""), ("", "0"), (" . ", "0"), ("x", "X"), (r"\boxed{12", "12"),
        ("四", "4"), ("yes", "no"), ("1.2.3", "1.2"), ("१२", "21"), ("९" * 500, "9"), ("--3", "3"),
    ],
)  # fmt: skip
def test_answers_that_differ(given, expected):
    assert not same_answer(given, expected) and not same_answer(expected, given)


def test_percentages_are_hundredths_or_the_number_before_the_sign():
    assert (
        same_answer("50%", "0.5")
        and same_answer("50%", "50")
        and same_answer("1/2", "50%")
        and not same_answer("0.5%", "50")
    )


@pytest.mark.parametrize(
    "answers, groups",
    [
        (["0.5", ".5", "7", "1/2", "seven", "７"], [{0, 1, 3}, {2, 5}, {4}]),
        (["5 cm", "5", "5.0 cm"], [{0, 1, 2}]),
        (["5 cm", "5", "5 km", "5.0"], [{0}, {1, 3}, {2}]),  # whose 5 it is cannot be told
        (["50%", "0.5"], [{0, 1}]),
        (["50%", "0.5", "50", "50 %"], [{0, 3}, {1}, {2}]),
        (["x", None, "x.", "X", None, " ", " "], [{0, 2}, {3}, {5, 6}]),
        ([None, None], []),
        ([], []),
    ],
)
def test_votes_for_one_answer_in_many_spellings(answers, groups):
    for order in list(itertools.permutations(range(len(answers))))[:: 1 if len(answers) < 5 else 97]:
        found = votes([answers[i] for i in order])
        assert [found[place] is None for place in range(len(order))] == [answers[i] is None for i in order]
        named = {}
        for place, i in enumerate(order):
            if found[place] is not None:
                named.setdefault(found[place], set()).add(i)
        assert sorted(map(sorted, named.values())) == sorted(map(sorted, groups))


def test_read():
    assert read_answer("-1,234.50") == read_answer(" −1234.5. ").__class__("-1,234.50", Fraction(-2469, 2))
    assert read_answer("12 apples").unit == "apples" and read_answer("$12").unit == "$"
    assert (
        read_answer(r"\boxed{1} or \boxed{2}").value == 2
        and boxed(r"\boxed{a{b}c}d") == "a{b}c"
        and boxed("none") is None
    )
    assert fold("ｶﾞ Ａ１ ٣") == "ガ A1 3" and fold("plain") == "plain" and fold("1½") == "1 1/2"
