"""`python -m manual_backprop.sync RUN ...`: deliver to MLflow what it did not receive during the run.

It can be repeated: what MLflow has is not sent again. A run that is still training delivers itself and is refused.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from manual_backprop.common.errors import EXIT_DONE, EXIT_FAILED, ManualBackpropError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.common.startup.output import enduring_output
from manual_backprop.config.arguments import Parser

COMMAND = "python -m manual_backprop.sync"
DESCRIPTION = """\
Delivers runs to MLflow: everything that it did not receive during the runs, because it was down, slow, full or locked.

The run directory is complete in any case. What MLflow already has is not sent again, so this can be repeated; points
keep the times at which they were measured. Runs whose process has died are marked KILLED, here and in MLflow. A run
that is still training delivers itself and is refused. A sweep's directory means the sweep and all its runs."""
EPILOG = f"""\
It delivers to MLFLOW_TRACKING_URI, or if that is not set, to mlflow.db beside the run's outputs directory.

Examples

  {COMMAND} last
  {COMMAND} outputs/runs/*
  MLFLOW_TRACKING_URI=http://127.0.0.1:5000 {COMMAND} 8c1ce4

Exit codes: 0 delivered (parts of a run that MLflow refuses are listed, with what to do), 1 MLflow does not answer, or
refuses the whole run, 2 there is no such run, or it is still training."""


def with_children(which: str, root: Path) -> list[str]:
    """The runs to deliver for an argument. For a sweep: first itself, so that its runs find their parent in MLflow,
    then its runs, and itself again, for the id of its best run."""
    from manual_backprop.tracking.late_delivery import named_run
    from manual_backprop.tracking.run_directory import SWEEPS
    from manual_backprop.training.sweeps.records import runs_of_sweep

    try:
        path = named_run(which, root)
    except ManualBackpropError:
        return [which]  # the delivery reports the error
    runs = runs_of_sweep(path) if path.parent.name == SWEEPS else []
    return [str(path), *map(str, runs), str(path)] if runs else [which]


@enduring_output()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("sync", DESCRIPTION, EPILOG)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run directory; or a run in outputs/: its id, the last six characters of that, its id in MLflow, or "
        "last for the newest one",
    )
    chosen = parser.parse(arguments)
    from manual_backprop.tracking.late_delivery import deliver_run
    from manual_backprop.tracking.mlflow_delivery import tracking_uri
    from manual_backprop.tracking.mlflow_messages import one_line, without_credentials

    root = Path("outputs")
    worst = EXIT_DONE
    for which in [one for named in chosen.runs for one in with_children(named, root)]:
        try:
            print(deliver_run(which, root), flush=True)
        except ManualBackpropError as error:
            print(error, file=sys.stderr)
            worst = max(worst, error.exit_code)
        except Exception as error:  # MLflow, its database and its server have many kinds of errors
            uri = tracking_uri(root)
            reason = one_line(error, uri)
            print(
                f"{which}: MLflow at {without_credentials(uri)} did not accept everything ({reason})", file=sys.stderr
            )
            worst = max(worst, EXIT_FAILED)
    return worst


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
