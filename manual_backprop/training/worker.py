"""`python -m manual_backprop.training.worker`: one of the processes that `processes.start` makes for a run."""

from __future__ import annotations

if __name__ == "__main__":
    from manual_backprop.common.interruption import exit_on_signal

    exit_on_signal()

    import os
    import sys

    from manual_backprop.training.processes.start import run_worker
    from manual_backprop.training.runner import run_job

    code = run_worker(run_job)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of torch.distributed would wait for a dead process
