"""References to lines of the code in the documents are right.

After lines have moved, `python tests/study/test_line_references.py` updates the numbers.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = (  # and how many references they have at least
    (ROOT / "docs" / "attention-is-all-you-need.md", 40),
    *((chapter, 4) for chapter in sorted((ROOT / "docs" / "course").glob("[0-9]*.md"))),
)
REFERENCE = re.compile(r"\[`([\w/]+\.py):(\d+)`\]\(((?:\.\./)+)([\w/]+\.py)#L(\d+)\): `(.+)`")
EACH_PAGE = pytest.mark.parametrize(("page", "least"), PAGES, ids=lambda value: getattr(value, "stem", ""))


def lines_with(file: str, quoted: str) -> list[int]:
    """The numbers of the lines of a file that hold this text, from 1."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, 1) if quoted in line]


def rewritten(text: str) -> str:
    """Every reference with the number of the line that holds what it quotes: the nearest to where it was."""

    def right(match: re.Match[str]) -> str:
        file, old, up, _, _, quoted = match.groups()
        found = lines_with(file, quoted)
        assert found, f"{file} has no line with {quoted!r}"
        number = min(found, key=lambda line: abs(line - int(old)))
        return f"[`{file}:{number}`]({up}{file}#L{number}): `{quoted}`"

    return REFERENCE.sub(right, text)


@EACH_PAGE
def test_every_quoted_line_stands_where_the_page_says(page: Path, least: int) -> None:
    text = page.read_text(encoding="utf-8")
    references = REFERENCE.findall(text)
    assert len(references) >= least
    assert len(references) == len(re.findall(r"\]\((?:\.\./)+manual_backprop/", text)), "a reference of another form"
    for file, number, up, linked, linked_number, quoted in references:
        assert (file, number) == (linked, linked_number)
        assert (page.parent / up).resolve() == ROOT
        where = lines_with(file, quoted)
        assert int(number) in where, f"{file}:{number} is not {quoted!r}, which stands in line {where}: run {__file__}"


@EACH_PAGE
def test_a_line_that_has_moved_is_noticed(page: Path, least: int) -> None:
    text = page.read_text(encoding="utf-8")
    assert rewritten(text) == text
    moved = re.sub(r":(\d+)`\]\((\S+)#L\d+\)", lambda m: f":{int(m[1]) + 1}`]({m[2]}#L{int(m[1]) + 1})", text)
    assert moved != text
    assert rewritten(moved) == text


if __name__ == "__main__":
    for path, _ in PAGES:
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
