"""Rewards on text: plain Python functions of (prompt, completion, answer). None of them evaluates what it is given.

Completions come as text with their tags and without the end-of-sequence token. This module needs neither jax nor a model,
so that worker processes start fast.
"""

import collections
import re
import unicodedata
from fractions import Fraction

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{1,40})?(/\d{1,40})?", re.ASCII)  # bounded: 1e999999 would be a number of a million digits


def split_completion(completion: str, *, spaces: bool = True) -> tuple[str, str] | None:
    """(chain, answer) of <think>chain</think><answer>answer</answer>, or None where a tag is missing, repeated or out of order, or
    anything else stands outside. `spaces` allows white space between and around the blocks, as language models write it."""
    if any(completion.count(tag) != 1 for tag in TAGS):
        return None
    text = completion.strip() if spaces else completion
    head, _, tail = text.partition("</think>")
    tail = tail.strip() if spaces else tail
    if not (head.startswith("<think>") and tail.startswith("<answer>") and tail.endswith("</answer>")):
        return None
    return head.removeprefix("<think>"), tail.removeprefix("<answer>").removesuffix("</answer>")


def format_reward(prompt: str, completion: str, answer: str) -> float:
    """1.0 for exactly one think block followed by exactly one answer block and nothing else (R1 §2.1), else 0.0."""
    return float(split_completion(completion) is not None)


def accuracy_reward(prompt: str, completion: str, answer: str) -> float:
    """1.0 where the answer block holds `answer`: the same number (12, 12.0 and 24/2 are one), or the same text up to white space."""
    parts = split_completion(completion)
    return float(parts is not None and canonical(parts[1]) == canonical(answer))


def canonical(answer: str) -> Fraction | str:
    """A number as a fraction, anything else as text with single spaces."""
    text = " ".join(answer.split())
    if NUMBER.fullmatch(text) is None:
        return text
    numerator, _, denominator = text.partition("/")
    if denominator and int(denominator) == 0:
        return text
    return Fraction(numerator) / Fraction(denominator or "1")


def language_consistency_reward(prompt: str, completion: str, answer: str) -> float:
    """Share of the chain's words that are in the prompt's language (R1 eq. 7), told by Unicode script; a chain without
    words scores 0.

    A word is a run of letters of one script; a Chinese character or a Japanese kana is a word. LaTeX commands aren't words.
    The prompt's language is the script of most of its words, Latin if it has none; kana in the prompt make it Japanese,
    which includes Chinese characters.
    """
    parts = split_completion(completion)
    if parts is None:
        return 0.0
    words = collections.Counter(scripts(parts[0]))
    asked = collections.Counter(scripts(prompt))
    if asked["HIRAGANA"] + asked["KATAKANA"] > 0:
        target = {"HIRAGANA", "KATAKANA", "CJK"}
    else:
        target = {asked.most_common(1)[0][0] if asked else "LATIN"}
    return sum(words[script] for script in target) / max(words.total(), 1)


def scripts(text: str) -> list[str]:
    """The script of each word of `text`: LATIN, CYRILLIC, CJK, HANGUL, …"""
    found, previous = [], ""
    for char in re.sub(r"\\[A-Za-z]+", " ", text):
        if unicodedata.combining(char):
            continue
        script = unicodedata.name(char, "").split(" ")[0].split("-")[0] if char.isalpha() else ""
        if script and (script != previous or script in ("CJK", "HIRAGANA", "KATAKANA")):
            found.append(script)
        previous = script
    return found
