"""Rewards on text: plain Python functions of (prompt, completion, answer). None of them evaluates what it is given.

Completions come as text with their tags and without the end-of-sequence token. Where the prompt ends with <think>, as
R1's own template does, the completion goes on inside that block. This module needs neither jax nor a model, so that
worker processes start fast.
"""

import collections
import functools
import re
import unicodedata

from deepseek_jax.rl.answers import boxed, fold, same_answer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
COMMANDS = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")  # of LaTeX
IDEOGRAPHIC = ("CJK", "HIRAGANA", "KATAKANA")  # a character is a word
SYMBOLS = ("LATIN", "GREEK")  # one letter of these alone is a symbol of mathematics: x, π
UNSPACED = {"THAI": 4, "LAO": 4, "KHMER": 4, "MYANMAR": 4}  # letters of a word, about, where no space ends one


def split_completion(completion: str, prompt: str = "", *, spaces: bool = True) -> tuple[str, str] | None:
    """(chain, answer) of <think>chain</think><answer>answer</answer>, or None where a tag is missing, repeated or out
    of order, or anything else stands outside. `spaces` allows white space between and around the blocks, as language
    models write it. The first tag may stand at the end of the prompt instead."""
    completion = opened(prompt, completion)
    if any(completion.count(tag) != 1 for tag in TAGS):
        return None
    text = completion.strip() if spaces else completion
    head, _, tail = text.partition("</think>")
    tail = tail.strip() if spaces else tail
    if not (head.startswith("<think>") and tail.startswith("<answer>") and tail.endswith("</answer>")):
        return None
    return head.removeprefix("<think>"), tail.removeprefix("<answer>").removesuffix("</answer>")


def opened(prompt: str, completion: str) -> str:
    """The completion, with the <think> that ends its prompt."""
    return "<think>" + completion if prompt.rstrip().endswith("<think>") else completion


def final_answer(prompt: str, completion: str) -> str | None:
    """The answer block of a well-formed completion or, where nothing is tagged as an answer, the last \\boxed{…} after
    the only think block, as R1 writes mathematics. None where there is neither, or its end is missing."""
    parts = split_completion(completion, prompt)
    if parts is not None:
        return parts[1]
    text = opened(prompt, completion).strip()
    if [text.count(tag) for tag in TAGS] != [1, 1, 0, 0] or not text.startswith("<think>"):
        return None
    return boxed(text.partition("</think>")[2])


def format_reward(prompt: str, completion: str, answer: str) -> float:
    """1.0 for exactly one think block followed by exactly one answer block and nothing else (R1 §2.1), else 0.0."""
    return float(split_completion(completion, prompt) is not None)


def accuracy_reward(prompt: str, completion: str, answer: str) -> float:
    """1.0 where the final answer is `answer`: the same number (12, 12.0 and 24/2 are one), or the same text (see
    `same_answer`)."""
    given = final_answer(prompt, completion)
    return float(given is not None and same_answer(given, answer))


def language_consistency_reward(prompt: str, completion: str, answer: str) -> float:
    """Share of the chain's words that are in the prompt's language (R1 eq. 7), told by Unicode script; a chain without
    words scores 0. Languages of one script are one to it: English and Vietnamese, Arabic and Persian.

    The prompt's language is the script of most of its words, Latin if it has none; kana in the prompt make it Japanese,
    which includes Chinese characters.
    """
    parts = split_completion(completion, prompt)
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
    """The script of each word of `text`: LATIN, CYRILLIC, CJK, HANGUL, …

    A word is a run of letters of one script, with the marks on them (vowels and accents that combine, however they are
    encoded). A Chinese character or a Japanese kana is a word, and four letters of Thai, Lao, Khmer or Burmese, which
    put no spaces between words. LaTeX commands and tags aren't words, nor is a Latin or Greek letter alone: it is a
    symbol, x or π.
    """
    found: list[str] = []
    run, script = 0, ""  # letters of the word that is being read, and its script

    def end_of_word():
        if script in UNSPACED:
            found.extend([script] * -(-run // UNSPACED[script]))
        elif run > (script in SYMBOLS):
            found.append(script)

    for char in fold(COMMANDS.sub(" ", re.sub(r"</?(?:think|answer)>", " ", text))):
        here = _script(char)
        if here == "MARK":  # goes with the letter before it
            continue
        if here != script or here in IDEOGRAPHIC:
            end_of_word()
            run, script = 0, here
        if here in IDEOGRAPHIC:
            found.append(here)
        elif here:
            run += 1
    end_of_word()
    return found


@functools.cache
def _script(char: str) -> str:
    """The first word of a letter's name, which is its script; "MARK" for what modifies letters, "" for any
    other character."""
    name, category = unicodedata.name(char, ""), unicodedata.category(char)
    if name.startswith(
        ("CJK ", "IDEOGRAPHIC ITERATION", "IDEOGRAPHIC CLOSING", "IDEOGRAPHIC NUMBER ZERO", "VERTICAL IDEOGRAPHIC")
    ):
        return "CJK" if category[0] in "LN" else ""
    if (
        category[0] == "M"
        or name.startswith("MODIFIER")
        or "PROLONGED SOUND MARK" in name
        or "ORDINAL INDICATOR" in name
    ):
        return "MARK"
    return name.split(" ")[0].split("-")[0] if char.isalpha() else ""
