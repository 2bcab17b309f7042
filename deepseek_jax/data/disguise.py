"""Disguise: control strings in a user's text pass through a chat template and are tokenized as text.

A disguised character is a pair of private ones: `MARK`, which Unicode reserves for programs' own use, and a character
that stands for it. Only the first character of a control string is disguised, so that templates that trim, split or
search the text see the rest unchanged.
"""

import re
from collections.abc import Collection, Iterable

MARK = "\ufdd0"
_BASE = 0xF0000
LAST = chr(0x10FFFF - _BASE)  # no character behind this one can be disguised
_PAIR = re.compile(f"{MARK}([{chr(_BASE)}-{chr(0x10FFFF)}])")


class Disguise:
    """Disguises `control` strings. `pairs` are (disguised, plain) for all characters that may be disguised, in the
    order in which they have to be replaced."""

    def __init__(self, control: Collection[str]):
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._starts = re.compile(f"{MARK}|(?={self._control.pattern})")
        self._beginnings = frozenset(text[:end] for text in control for end in range(1, len(text)))
        self._longest = max(map(len, control), default=0)
        # The mark's own pair comes last: text that it restores must not be read as another pair.
        self.pairs = tuple(
            (_disguised(first), first) for first in [*sorted({text[0] for text in control} - {MARK}), MARK]
        )

    def find_all(self, text: str) -> list[str]:
        """The control strings in `text` that are not disguised."""
        return self._control.findall(text)

    def hide(self, text: str, but: Iterable[str] = ()) -> str:
        """`text` in which every control string but those of `but` is disguised, and in which none can arise from what a
        template appends."""
        kept = "|".join(map(re.escape, but))
        pieces = re.split(f"({kept})", text) if kept else [text]
        return "".join(piece if i % 2 else self._hidden(piece) for i, piece in enumerate(pieces))

    def _hidden(self, text: str) -> str:
        starts = {match.start() for match in self._starts.finditer(text)}
        tail = range(max(0, len(text) - self._longest + 1), len(text))
        starts.update(i for i in tail if text[i:] in self._beginnings)
        return (
            "".join(_disguised(character) if i in starts else character for i, character in enumerate(text))
            if starts
            else text
        )


def revealed(text: str) -> str:
    """The text without its disguise."""
    return _PAIR.sub(lambda pair: _plain(pair[1]), text)


def cut(text: str) -> list[str]:
    """`text` in pieces, cut after every disguised character."""
    ends = [pair.end() for pair in _PAIR.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def ascii_json(text: str) -> str:
    """`text`, which is JSON, with escapes for all but ASCII; disguised ASCII characters stay disguised."""

    def escape(match: re.Match) -> str:
        plain = revealed(match[0])
        return match[0] if plain.isascii() and plain != "\x7f" else "".join(f"\\u{unit:04x}" for unit in _utf16(plain))

    return re.sub(f"{_PAIR.pattern}|[\x7f-\U0010ffff]", escape, text)


def _disguised(character: str) -> str:
    return MARK + chr(_BASE + ord(character))


def _plain(second: str) -> str:
    return chr(ord(second) - _BASE)


def _utf16(character: str) -> list[int]:
    data = character.encode("utf-16-be", errors="surrogatepass")
    return [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
