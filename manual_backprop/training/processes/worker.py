"""`python -m manual_backprop.training.processes.worker`: one of the processes that `start` makes."""

from __future__ import annotations

if __name__ == "__main__":
    from manual_backprop.common.interruption import exit_on_signal

    exit_on_signal()

    import os
    import sys

    from manual_backprop.training.processes.start import work_on_order

    code = work_on_order()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of torch.distributed wait for a process that is gone
