"""The outermost frame of every command: the only place that turns exceptions into exit codes (`errors.py`)."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from collections.abc import Callable

from .errors import EXIT_DONE, EXIT_FAILED, ManualBackpropError
from .plain_text import visible
from .startup.home import complete_environment
from .startup.output import OutputClosed, guard_streams


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code. A ManualBackpropError prints its message, any other error a traceback."""
    guard_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # neither a character that the terminal cannot show nor incomplete UTF-8 in the input may end a run
            stream.reconfigure(errors="replace")
    complete_environment()
    try:
        try:
            return command() or EXIT_DONE
        finally:
            sys.stdout.flush()  # here, where an error is handled; at the interpreter's exit it would not be
    except ManualBackpropError as error:
        print(visible(str(error), kept="\n\t"), file=sys.stderr)  # it may quote text with control characters
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except OutputClosed:  # the reader of our output, such as `head`, has closed the pipe
        return 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
