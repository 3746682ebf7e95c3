"""The page as GitHub's Markdown: a table for each function."""

import re
from collections.abc import Iterator

from ..explain.listing import slug
from .alignment import Row
from .page import INTRODUCTION, NETWORK, PAIRS, Page, Section
from .statements import Statement

ROOT = "../../manual_backprop/"  # from docs/guide
HEADING = "# By hand and under autograd, side by side"


def markdown(page: Page) -> str:
    lines = [HEADING, ""]
    for paragraph in INTRODUCTION:
        lines += [paragraph, ""]
    lines += [*_contents(page), "## The network", "", NETWORK, ""]
    for section in page.network:
        lines += _section(section)
    lines += ["## The pairs", ""]
    for paragraph in PAIRS:
        lines += [paragraph, ""]
    lines += [f"The names of nodes, and what autograd keeps, are those of torch {page.torch}.", ""]
    for section in page.pairs:
        lines += _section(section)
    return "\n".join(lines).rstrip() + "\n"


def _contents(page: Page) -> Iterator[str]:
    yield "| function | statements by hand | with autograd | kept by hand | by autograd |"
    yield "|---|--:|--:|--:|--:|"
    for section in page.sections:
        kept = section.recorded
        numbers = section.statements() + (("", "") if kept is None else (kept.kept_by_hand, kept.kept_by_autograd))
        yield f"| [`{section.title}`](#{slug(section.title)}) | " + " | ".join(map(str, numbers)) + " |"
    counts = [section.statements() for section in page.sections]
    yield f"| all | {sum(by_hand for by_hand, _ in counts)} | {sum(autograd for _, autograd in counts)} | | |"
    yield ""


def _section(section: Section) -> Iterator[str]:
    yield f"### {section.title}"
    yield ""
    if section.about:
        yield _escaped(section.about)
        yield ""
    by_hand, mirror = section.files
    yield f"| by hand: [`{by_hand}`]({ROOT}{by_hand}) | with autograd: [`{mirror}`]({ROOT}{mirror}) |"
    yield "|---|---|"
    for row in section.forward:
        yield f"| {_cell(row.hand)} | {_cell(row.autograd)} |"
    if section.backward:
        yield f"| *backward* | *backward*{section.note} |"
        for row in section.backward:
            yield f"| {_cell(row.hand)} | {_beside(row)} |"
    yield ""


def _beside(row: Row) -> str:
    return f"*of* {_code(row.of)}" if row.of is not None else _cell(row.autograd)


def _cell(statement: Statement | None) -> str:
    if statement is None:
        return ""
    indent = "&emsp;" * statement.depth
    comment = f"{indent}*{_escaped(statement.comment)}*<br>" if statement.comment else ""
    return f"{comment}{indent}{_code(statement)}"


def _code(statement: Statement) -> str:
    return "`" + statement.text.replace("|", "\\|") + "`"


def _escaped(text: str) -> str:
    """Words, which hold no markup but code."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"([\\|*_<>\[\]])", r"\\\1", parts[number])
    return "`".join(parts)
