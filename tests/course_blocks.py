"""The Python blocks of docs/course: one program for all chapters, and what it must print.

The blocks of a chapter go on from one another, its solutions included, and the chapters are independent. What a block
prints stands in it after `# >`, line by line.

    python tests/course_blocks.py        writes what is printed into the chapters, after a change of them
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "docs" / "course").glob("[0-9]*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"# >(.*)$", flags=re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")

# The program: each chapter in a namespace of its own. A traceback names the file and its line.
PROGRAM = """
import contextlib, io, json
printed = {}
for name, blocks in json.loads(CHAPTERS).items():
    output, namespace = io.StringIO(), {"__name__": "__main__"}
    with contextlib.redirect_stdout(output):
        for line, block in blocks:
            exec(compile("\\n" * line + block, name, "exec"), namespace)
    printed[name] = output.getvalue().splitlines()
print(json.dumps(printed))
"""


def blocks_of(chapter: Path) -> Iterator[tuple[int, str]]:
    """Each block, with the number of the line above it."""
    text = chapter.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start(1)), found[1]


def program() -> str:
    """What prints one object of JSON: chapter -> the lines that its blocks print."""
    blocks = {chapter.name: list(blocks_of(chapter)) for chapter in CHAPTERS}
    return PROGRAM.replace("CHAPTERS", repr(json.dumps(blocks)))


def expected() -> dict[str, list[str]]:
    return {
        chapter.name: [line.strip() for _, block in blocks_of(chapter) for line in PRINTED.findall(block)]
        for chapter in CHAPTERS
    }


def alike(line: str, said: str) -> bool:
    """The same but for the last digit of a number with a fraction: another processor rounds otherwise."""
    if NUMBER.sub("#", line).strip() != NUMBER.sub("#", said).strip():
        return False
    return all(
        abs(float(one) - float(other)) <= 1.01 * unit_of(one)
        for one, other in zip(NUMBER.findall(line), NUMBER.findall(said), strict=True)
    )


def unit_of(number: str) -> float:
    """Of the last digit that is written; of a whole number 0."""
    mantissa, _, exponent = number.partition("e")
    digits = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - digits) if digits or exponent else 0.0


def main() -> None:
    done = subprocess.run([sys.executable, "-c", program()], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    for chapter in CHAPTERS:
        lines = iter(json.loads(done.stdout)[chapter.name])
        text = chapter.read_text(encoding="utf-8")

        def written(found: re.Match[str], lines: Iterator[str] = lines) -> str:
            return PRINTED.sub(lambda _: f"# > {next(lines)}", found[0])

        text = BLOCK.sub(written, text)
        if rest := list(lines):
            sys.exit(f"{chapter.name} prints {len(rest)} lines more than it has `# >`: {rest}")
        chapter.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
