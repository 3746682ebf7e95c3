"""`python -m manual_backprop.tools.api_page` writes docs/api.md: what the package exports, from its docstrings.

Takes a second. Run it after a change of a public signature or docstring; a test says where the page is out of date.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.durable_files import write_page
from ..common.exit_codes import exit_code_of
from ..config.arguments import Parser

DEFAULT_OUTPUT = "docs/api.md"


def main(arguments: Sequence[str] | None = None) -> None:
    epilog = "Exit codes: 0 done, 2 a wrong option, 4 the page cannot be written."
    parser = Parser("tools.api_page", __doc__ or "", epilog)
    parser.add_argument("--output", type=Path, default=Path(DEFAULT_OUTPUT), metavar="FILE", help="(%(default)s)")
    chosen = parser.parse(arguments)
    from ..study.api_page import page

    write_page(chosen.output, page())
    print(f"wrote {chosen.output}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
