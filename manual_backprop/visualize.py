"""Serve a page that compares runs, finished and running, in the browser."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from manual_backprop.common.errors import EXIT_DONE, InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser, whole

DESCRIPTION = """\
Serves a page that compares runs: their curves over steps, tokens, FLOPs or time, their losses at equal compute, the
differences of their configs, their samples and pictures, and how a trained model reads a text. The page follows runs
that are still running.

RUN is last, a run id or its last six characters, the path of a run directory, or a sweep, which stands for all its
runs. Without RUN, the page shows the newest runs. The command reads the runs' own files, below outputs/, and changes
nothing. Runs that are only in an MLflow store are read from there (mlflow.db, or MLFLOW_TRACKING_URI)."""

EPILOG = """\
Examples

  python -m manual_backprop.visualize
  python -m manual_backprop.visualize 4f1c2a 91be03
  python -m manual_backprop.visualize outputs/sweeps/SWEEP --export sweep.html
  python -m manual_backprop.visualize last --text "Return the" --export model.html

The page can be reached from this machine only. --share listens on all interfaces instead, and prints an address with a
random token, which every request needs; it opens no tunnel, so others must be able to reach this machine. --export
needs no server: it writes one file for any browser, which loads nothing from a network.

Exit codes: 0 done, 2 wrong input, 4 the exported file cannot be written, 130 interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("visualize", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="runs or sweeps, see above")
    add("--port", type=whole(0), default=7860, metavar="N", help="0: any free port (7860)")
    add(
        "--host",
        default="127.0.0.1",
        help="the address to listen on; with any but the local one, requests need a token (127.0.0.1)",
    )
    add("--export", type=Path, metavar="FILE.html", help="write the page into a file instead of serving it")
    add("--share", action="store_true", help="listen on all interfaces, with a random token")
    add("--text", metavar="TEXT", help="with --export: show how the first run's best checkpoint reads this text")
    options = parser.parse(arguments)
    if options.port > 65535:
        parser.error(f"--port: must be at most 65535, was {options.port}")
    if options.text is not None and options.export is None:
        parser.error("--text: needs --export FILE.html; on the page, type a text under Model")
    if options.export is not None and options.export.suffix not in (".html", ".htm"):
        raise InputError(f"--export {options.export}: must end in .html, as in runs.html")
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise InputError("the visualizer draws with plotly, which is not installed: pip install plotly") from error

    from manual_backprop.visualizer.server import launch, open_session, read

    if options.export is not None:
        from manual_backprop.visualizer.export import write_export

        session = open_session(options.runs)
        read(session, print)
        write_export(session, options.export, options.text)
        print(f"wrote {options.export} ({options.export.stat().st_size / 1e6:.1f} MB)")
        return EXIT_DONE
    launch(options.runs, host=options.host, port=options.port, share=options.share, say=partial(print, flush=True))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
