"""Text rewards on good, bad and malicious strings."""

import time
import unicodedata

import pytest

from deepseek_jax.rl.text_rewards import (
    accuracy_reward,
    format_reward,
    language_consistency_reward,
    scripts,
    split_completion,
)

GOOD = "<think>2 and 2 make 4</think><answer>4</answer>"


@pytest.mark.parametrize(
    "completion",
    [
        GOOD,
        "<think></think><answer>4</answer>",
        "<think>a\nb</think>\n\n<answer> 4 </answer>\n",
        "<think>a < b</think><answer>4</answer>",
    ],
)
def test_good_format(completion):
    assert format_reward("", completion, "") == 1.0 and accuracy_reward("", completion, "4") == 1.0


@pytest.mark.parametrize(
    "completion",
    {
        "empty": "",
        "no tags": "4",
        "truncated": "<think>2 and 2 make 4</think><answer>4",
        "truncated chain": "<think>2 and 2 make",
        "answer in the chain only": "<think>2 + 2 <answer>4</answer></think>",
        "no chain": "<answer>4</answer>",
        "two answers": "<think>a</think><answer>4</answer><answer>5</answer>",
        "two chains": "<think>a</think><think>b</think><answer>4</answer>",
        "nested": "<think><think>a</think></think><answer>4</answer>",
        "stuffed chain": "<think></think></think><answer>4</answer>",
        "stuffed answer": "<think>a</think><answer><answer>4</answer></answer>",
        "answer twice, once inside": "<think><answer>5</answer></think><answer>4</answer>",
        "wrong order": "<answer>4</answer><think>a</think>",
        "crossed": "<think>a<answer></think>4</answer>",
        "text before": "Sure! " + GOOD,
        "text between": "<think>a</think>so<answer>4</answer>",
        "text after": GOOD + " I hope this helps",
        "upper case": "<THINK>a</THINK><ANSWER>4</ANSWER>",
    }.items(),
    ids=lambda item: item[0],
)
def test_bad_format_scores_nothing(completion):
    assert format_reward("", completion[1], "") == 0.0 and accuracy_reward("", completion[1], "4") == 0.0
    assert language_consistency_reward("", completion[1], "4") == 0.0


@pytest.mark.parametrize(
    "given,expected,right",
    [
        ("12", "12", True),
        (" 12.0", "12", True),
        ("24/2", "12", True),
        ("-3", "-3", True),
        ("07", "7", True),
        ("x = 3", "x  =  3", True),
        ("", "12", False),
        ("12 13", "12", False),
        ("-12", "12", False),
        ("1.2e1", "12", False),
        ("3*4", "12", False),
        ("2**9**9", "12", False),
        ("12/0", "12", False),
        ("1/0", "1/0", True),
        ("__import__('os').system('true')", "12", False),
        ("9" * 5000, "12", False),
        ("1e999999999", "12", False),
        ("", "", False),
    ],
)
def test_accuracy(given, expected, right):
    start = time.monotonic()
    assert accuracy_reward("what?", f"<think>it is 12</think><answer>{given}</answer>", expected) == float(right)
    assert time.monotonic() - start < 1.0


R1_PROMPT = "<｜User｜>What is 3+4?<｜Assistant｜><think>\n"


def test_a_prompt_may_open_the_think_block():
    """As R1's chat template does; without it the same completion is half a block."""
    completion = "3+4=7</think><answer>7</answer>"
    assert format_reward(R1_PROMPT, completion, "7") == accuracy_reward(R1_PROMPT, completion, "7") == 1.0
    assert language_consistency_reward(R1_PROMPT, "three and four</think><answer>7</answer>", "7") == 1.0
    assert format_reward("What is 3+4?", completion, "7") == accuracy_reward("What is 3+4?", completion, "7") == 0.0
    assert format_reward(R1_PROMPT, "<think>" + completion, "7") == 0.0, "two blocks"


@pytest.mark.parametrize(
    "prompt,completion,right",
    [
        ("", r"<think>3+4</think>The answer is \boxed{7}.", 1.0),
        (R1_PROMPT, r"3+4</think>So \boxed{6}, no, \boxed{\frac{14}{2}}", 1.0),
        ("", r"<think>3+4</think><answer>\boxed{7}</answer>", 1.0),
        ("", r"<think>3+4 = \boxed{7}</think>I do not know.", 0.0),
        ("", r"<think>3+4</think>The answer is \boxed{7", 0.0),
        ("", r"<think>3+4</think>The answer is \boxed{8}", 0.0),
        ("", r"The answer is \boxed{7}", 0.0),
        ("", r"<think>a</think><think>b</think>\boxed{7}", 0.0),
        ("", r"<think>a</think><answer>7 \boxed{7}", 0.0),
    ],
)
def test_a_boxed_answer_is_an_answer_behind_the_reasoning(prompt, completion, right):
    assert accuracy_reward(prompt, completion, "7") == right
    assert format_reward(prompt, completion, "7") == float("</answer>" in completion)


def test_long_hostile_text_is_read_in_linear_time():
    start = time.monotonic()
    for text in (
        "<think>" * 100_000,
        "<think>" + "</think " * 100_000,
        "<think>" + "a<" * 500_000 + "</think><answer>4</answer>",
    ):
        format_reward("", text, "4")
        language_consistency_reward("", text, "4")
    assert time.monotonic() - start < 5.0


def think(chain):
    return f"<think>{chain}</think><answer>4</answer>"


@pytest.mark.parametrize(
    "prompt,chain,share",
    [
        ("How many?", "first we count, then we add", 1.0),
        ("How many?", "", 0.0),
        ("How many?", "1 + 2 = 3", 0.0),
        ("How many?", "we count 一二三", 2 / 5),
        ("有多少?", "我们数 one two", 3 / 5),
        ("有多少?", "only English", 0.0),
        ("Сколько?", "сначала считаем then add", 2 / 4),
        ("いくつですか", "まず数えます", 1.0),
        ("How many?", r"so \frac{1}{2} is half", 1.0),
        ("有多少?", r"\frac{1}{2} 一半", 1.0),
        ("Combien?", "élève e\u0301lève", 1.0),
        ("3+4?", "plain words", 1.0),
        ("कितने?", "हिन्दी में गिनते हैं then add", 4 / 6),
        ("كم؟", "نَحْسِبُ العدد ثم one", 3 / 4),
        ("כמה?", "סופרים את המספרים", 1.0),
        ("몇 개?", "하나씩 셉니다 one", 2 / 3),
        ("몇 개?", unicodedata.normalize("NFD", "하나씩 셉니다 one"), 2 / 3),
        ("เท่าไร?", "นับทีละตัว one two", 2 / 4),  # eight letters and their vowel marks
        ("bao nhiêu?", unicodedata.normalize("NFD", "đếm từng số 一"), 3 / 4),
        ("几个人?", "人们数〇 々", 1.0),
        ("いくつ?", "人々がﾗｰﾒﾝを数える", 1.0),
        ("how many?", "ＴＷＯ ｗｏｒｄｓ 一二", 2 / 4),
        ("多少?", "设 x = α + 𝜋 为数", 1.0),
        ("多少?", r"\begin{align} x \end{align} 所以 \mathbf{x}", 1.0),
        ("how many?", "👍🏽 don't worry", 1.0),
        ("چند؟", "می‌شود سه", 1.0),
        ("Πόσα;", "μετράμε ένα ένα one", 3 / 4),
    ],
)
def test_language_consistency(prompt, chain, share):
    assert language_consistency_reward(prompt, think(chain), "") == pytest.approx(share)


def test_answer_language_does_not_count():
    assert language_consistency_reward("How many?", "<think>we count</think><answer>四</answer>", "") == 1.0


def test_words_are_runs_with_their_marks():
    assert scripts("हिन्दी में") == ["DEVANAGARI"] * 2 and scripts("می\u200cشود") == ["ARABIC"]
    assert scripts("ｶﾞｯｺｳ") == ["KATAKANA"] * 4 == scripts("ガッコウ") and scripts("ラーメン") == ["KATAKANA"] * 3
    assert scripts("人々") == ["CJK"] * 2 and scripts("é e\u0301te\u0301") == ["LATIN"]
    assert scripts("நாம் எண்ணுவோம்") == ["TAMIL"] * 2 and scripts("៥ រាប់លេខ") == ["KHMER"]


def test_strict_splitting_allows_no_spaces():
    spaced = "<think>a</think> <answer>4</answer>"
    assert split_completion(spaced) == ("a", "4") and split_completion(spaced, spaces=False) is None
