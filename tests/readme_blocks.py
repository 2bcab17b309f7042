"""Commands and code in the README files and in the docstrings of experiments, as a reader would copy them."""

import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "deepseek_jax/parallel/README.md", "kernels_pallas/README.md")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: `where` is file:line, `language` may be empty."""

    where: str
    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a block: `argv` without comments, and `where` it stands."""

    where: str
    argv: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.argv)}"


def blocks(path: str) -> list[Block]:
    """The fenced blocks of one file."""
    found, opened = [], None
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            if opened:
                opened[2].append(line)
        elif opened is None:
            opened = (number, line.removeprefix("```").strip(), [])
        else:
            found.append(Block(f"{path}:{opened[0]}", opened[1], "\n".join(opened[2]) + "\n"))
            opened = None
    assert opened is None, f"{path}:{opened[0]}: the block is not closed"
    return found


def commands(where: str, line: str) -> list[Command]:
    """The commands of one shell line; a comment alone is none of them."""
    words = shlex.split(line, comments=True)
    parts, current = [], []
    for word in words:
        if word == "&&":
            parts.append(current)
            current = []
        else:
            current.append(word)
    return [Command(where, tuple(part)) for part in (*parts, current) if part]


def readme_commands() -> list[Command]:
    """Every command of the README files: those in shell blocks, and those in running text (`python …`, `pytest …`)."""
    found = []
    for path in READMES:
        for block in blocks(path):
            if block.language == "bash":
                for offset, line in enumerate(block.text.splitlines(), start=1):
                    file, _, start = block.where.rpartition(":")
                    found += commands(f"{file}:{int(start) + offset}", line)
        for where, text in _inline(path, r"(?:python|pytest|pip) "):
            found += [command for one in _expanded(text) for command in commands(where, one)]
    return found


def overrides() -> list[tuple[str, list[str]]]:
    """(file:line, flags) for every `--config.field=value …` in running text."""
    return [
        (where, shlex.split(text)) for path in READMES for where, text in _inline(path, r"--config\.") if "=" in text
    ]


def docstring_commands() -> list[Command]:
    """Every command that stands on a line of its own in the docstring of an experiment or a sweep."""
    found = []
    for file in sorted((ROOT / "experiments").rglob("*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            while line.endswith("\\\\"):  # an escaped backslash of the docstring: the command goes on in the next line
                line = line.removesuffix("\\\\").rstrip() + " " + lines[number].strip()
                number += 1
            if line.startswith("    python "):
                text = re.split(r"\s{2,}", line.strip())[0]  # what it does stands behind it
                found += commands(f"{file.relative_to(ROOT)}:{number}", text)
    return found


def _inline(path: str, start: str) -> list[tuple[str, str]]:
    """(file:line, code) for every `code` in running text that begins with the pattern `start`."""
    text = (ROOT / path).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    found = re.finditer(rf"`({start}[^`]+)`", prose)
    return [(f"{path}:{1 + prose[: match.start()].count(chr(10))}", match[1].replace("\n", " ")) for match in found]


def _expanded(text: str) -> list[str]:
    """`a/{b,c}.py` as a shell writes it out."""
    match = re.search(r"\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        return [text]
    return [text[: match.start()] + word + text[match.end() :] for word in match[1].split(",")]
