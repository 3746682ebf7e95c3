"""The outermost frame of every command: the only place that turns exceptions into exit codes (DESIGN.md, 7)."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable

from manual_backprop.common.errors import EXIT_DONE, EXIT_FAILED, ManualBackpropError
from manual_backprop.common.startup.home import complete_environment


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Run a command. What a user can read is said in its own words, without a traceback; a bug shows its traceback."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show a character must not end a run, nor half a character that is typed there
            stream.reconfigure(errors="replace")
    complete_environment()
    try:
        return command() or EXIT_DONE
    except ManualBackpropError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
