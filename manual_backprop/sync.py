"""`python -m manual_backprop.sync RUN_DIRECTORY ...`: deliver to MLflow what it did not take while the run went on.

Harmless to repeat: what MLflow has is not sent again. A run that is still going on delivers itself and is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from manual_backprop.errors import EXIT_DONE, EXIT_FAILED, ManualBackpropError


def deliver_run(which: str, root: Path) -> str:
    """Deliver one run; return the sentence that says so. Raises ManualBackpropError, or what MLflow raises."""
    from manual_backprop.tracking.mlflow_delivery import MlflowDelivery, without_credentials
    from manual_backprop.tracking.run_directory import find_run, own_run_directory
    from manual_backprop.tracking.tracker import Tracked

    run = own_run_directory(find_run(root, which).path)
    try:
        experiment_name = Tracked.read(run.path).experiment_name
        delivery = MlflowDelivery(run.path, root_of(run.path, root))
        delivery.deliver(final=True)
        return f"{run.path} is delivered to {without_credentials(delivery.uri)}, experiment {experiment_name}"
    finally:
        run.release()


def root_of(run: Path, otherwise: Path) -> Path:
    """The outputs directory in which a run lies: mlflow.db stands beside it, wherever the command is called."""
    return run.parent.parent if run.parent.name == "runs" else otherwise


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m manual_backprop.sync", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIRECTORY", help="a run's directory, or its id below outputs/")
    chosen = parser.parse_args(arguments)
    worst = EXIT_DONE
    for which in chosen.runs:
        try:
            print(deliver_run(which, Path("outputs")))
        except ManualBackpropError as error:
            print(error, file=sys.stderr)
            worst = max(worst, error.exit_code)
        except Exception as error:  # MLflow's, its database's, its server's: for a user all the same
            print(f"{which}: MLflow did not take it: {' '.join(str(error).split())[:300]}", file=sys.stderr)
            worst = max(worst, EXIT_FAILED)
    return worst


if __name__ == "__main__":
    sys.exit(main())
