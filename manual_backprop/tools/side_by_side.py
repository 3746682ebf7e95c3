"""Writes docs/guide/side-by-side.md, and the same page as HTML: the network by hand and its mirror under autograd, in
two columns, statement by statement. Takes a second and trains nothing."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.durable_files import write_page
from ..common.exit_codes import exit_code_of
from ..config.arguments import Parser

MARKDOWN = "docs/guide/side-by-side.md"
HTML = "outputs/side-by-side.html"
EPILOG = "Exit codes: 0 done, 2 a wrong option, 4 a page cannot be written."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("tools.side_by_side", __doc__ or "", EPILOG)
    parser.add_argument("--markdown", type=Path, default=Path(MARKDOWN), metavar="FILE", help="the page (%(default)s)")
    parser.add_argument("--html", type=Path, default=Path(HTML), metavar="FILE", help="as HTML (%(default)s)")
    chosen = parser.parse(arguments)
    from ..study.side_by_side.html import html  # imports torch, so only after the arguments are checked
    from ..study.side_by_side.markdown import markdown
    from ..study.side_by_side.page import made_page

    page = made_page()
    for path, write in ((chosen.markdown, markdown), (chosen.html, html)):
        write_page(path, write(page))
        print(f"wrote {path}: {len(page.network)} functions of the network, {len(page.pairs)} pairs")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
