"""The page as one file of HTML that needs nothing else: two columns, light or dark as the reader's system is."""

import re
from collections.abc import Iterator
from html import escape

from .alignment import Row
from .page import INTRODUCTION, NETWORK, PAIRS, Page, Section
from .statements import Statement

STYLE = """\
:root { color-scheme: light dark; --line: #8884; --back: #2f81f71a; --other: #d2992214; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1rem 1.5rem;
  overflow-wrap: anywhere; }
code { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
nav { columns: 14rem; margin: 1rem 0; }
nav a { display: block; }
nav a, h3 { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 14px; }
h3 { font-size: 17px; margin: 2.5rem 0 0.3rem; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; }
th, td { border: 1px solid var(--line); padding: 0.15rem 0.5rem; text-align: left; vertical-align: top; width: 50%; }
th { font-weight: 600; }
td code { white-space: pre-wrap; }
tr.different { background: var(--other); }
tr.backward { background: var(--back); }
small { color: #777; }
@media (max-width: 700px) { body { padding: 0.5rem; } td code { font-size: 11px; } }"""


def html(page: Page) -> str:
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>By hand and under autograd</title><style>\n{STYLE}\n</style></head>",
        "<body>",
        "<h1>By hand and under autograd, side by side</h1>",
        *(_paragraph(text) for text in INTRODUCTION),
        "<p><small>Two tints: rows of the forward pass whose sides differ, and the backward pass.</small></p>",
        "<nav>",
        *(f'<a href="#{section.title}">{section.title}</a>' for section in page.sections),
        "</nav>",
        "<h2>The network</h2>",
        _paragraph(NETWORK),
    ]
    for section in page.network:
        lines += _section(section)
    lines += ["<h2>The pairs</h2>", *(_paragraph(text) for text in PAIRS)]
    lines += [_paragraph(f"The names of nodes, and what autograd keeps, are those of torch {page.torch}.")]
    for section in page.pairs:
        lines += _section(section)
    return "\n".join([*lines, "</body>", "</html>"]) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f'<h3 id="{section.title}">{section.title}</h3>'
    if section.about:
        yield f"<p>{escape(section.about)}</p>"
    by_hand, mirror = section.files
    yield f"<table><tr><th>by hand: {by_hand}</th><th>with autograd: {mirror}</th></tr>"
    for row in section.forward:
        kind = "" if row.same else ' class="different"'
        yield f"<tr{kind}><td>{_cell(row.hand)}</td><td>{_cell(row.autograd)}</td></tr>"
    if section.backward:
        yield f'<tr class="backward"><th>backward</th><th>backward{section.note}</th></tr>'
    for row in section.backward:
        yield f'<tr class="backward"><td>{_cell(row.hand)}</td><td>{_beside(row)}</td></tr>'
    yield "</table>"


def _beside(row: Row) -> str:
    return f"<small>of</small> <code>{escape(row.of.text)}</code>" if row.of is not None else _cell(row.autograd)


def _cell(statement: Statement | None) -> str:
    if statement is None:
        return ""
    indent = "    " * statement.depth
    comment = f"<small>{escape(indent + statement.comment)}</small><br>" if statement.comment else ""
    return f"{comment}<code>{escape(indent + statement.text)}</code>"


def _paragraph(text: str) -> str:
    """A paragraph of HTML from Markdown with `code` and *emphasis* only."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    marked = re.sub(r"[*]([^*]+)[*]", r"<em>\1</em>", marked)
    return f"<p>{marked}</p>"
