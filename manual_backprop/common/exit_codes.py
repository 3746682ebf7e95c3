"""The outermost frame of every command: the only place that turns exceptions into exit codes (DESIGN.md, 7)."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from collections.abc import Callable

from manual_backprop.common.errors import EXIT_DONE, EXIT_FAILED, ManualBackpropError
from manual_backprop.common.output import OutputClosed, guard_streams


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Run a command. What a user can read is said in its own words, without a traceback; a bug shows its traceback."""
    guard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end a run
    try:
        try:
            return command() or EXIT_DONE
        finally:
            sys.stdout.flush()  # here, where it may fail
    except ManualBackpropError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except OutputClosed:  # the reader of our output, `head` perhaps, has seen enough
        return 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
