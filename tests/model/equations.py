"""The table of equations in deepseek_jax/model/README.md: which line of the code is which equation.

A line that is an equation ends in a marker, `# eq. 5` for the V3 report's, `# GRPO: ratio` and the like for others. The
table's first column names the marker, its last column links to the lines that carry it:

    python tests/model/equations.py     writes the links anew
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "deepseek_jax/model/README.md"
PACKAGES = ("deepseek_jax", "kernels_pallas")
MARKER = re.compile(r"# ((?:eqs?\. |YaRN: |GRPO: |FP8: ).*)$")
ROW = re.compile(r"^\| (eq\. \d+|(?:YaRN|GRPO|FP8): \w+) \| (.*) \|([^|]*)\|$")


def marked_lines() -> dict[str, list[str]]:
    """Marker -> links to the lines that end in it. A line may carry several: `# eqs. 2, 4, 5`."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if match := MARKER.search(line):
                    for marker in _markers(match[1]):
                        found.setdefault(marker, []).append(_link(path, number))
    return found


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Marker -> (formula, links) of the table's rows."""
    return {match[1]: (match[2], match[3].strip()) for match in map(ROW.match, text.splitlines()) if match}


def with_links(text: str) -> str:
    """The page with the links of every row written anew."""
    links = marked_lines()

    def row(match: re.Match) -> str:
        return f"| {match[1]} | {match[2]} | {', '.join(links.get(match[1], []))} |"

    return re.sub(ROW.pattern, row, text, flags=re.MULTILINE)


def _markers(text: str) -> list[str]:
    if text.startswith("eq"):
        return [f"eq. {number}" for number in re.findall(r"\d+", text)]
    return [text.strip()]


def _link(path: Path, line: int) -> str:
    relative = Path("../..") / path.relative_to(ROOT)
    inside = path.is_relative_to(TABLE.parent)
    target = path.relative_to(TABLE.parent) if inside else relative
    return f"[{path.name if inside else path.relative_to(ROOT)}:{line}]({target}#L{line})"


if __name__ == "__main__":
    TABLE.write_text(with_links(TABLE.read_text(encoding="utf-8")), encoding="utf-8")
