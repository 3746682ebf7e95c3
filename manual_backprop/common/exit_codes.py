"""The outermost frame of every command: the only place that turns exceptions into exit codes (DESIGN.md, 7)."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from collections.abc import Callable

from manual_backprop.common.errors import EXIT_DONE, EXIT_FAILED, ManualBackpropError
from manual_backprop.common.plain_text import visible
from manual_backprop.common.startup.home import complete_environment
from manual_backprop.common.startup.output import OutputClosed, guard_streams


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Run a command. What a user can read is said in its own words, without a traceback; a bug shows its traceback."""
    guard_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show a character must not end a run, nor half a character that is typed there
            stream.reconfigure(errors="replace")
    complete_environment()
    try:
        try:
            return command() or EXIT_DONE
        finally:
            sys.stdout.flush()  # here, where it may fail
    except ManualBackpropError as error:
        print(visible(str(error), kept="\n\t"), file=sys.stderr)  # it may quote others' text
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except OutputClosed:  # the reader of our output, `head` perhaps, has seen enough
        return 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
