"""Compare runs: the settings in which they differ, their results, the distance of their curves, and a picture.

    python -m manual_backprop.compare RUN RUN ... [--picture FILE] [--csv FILE]

Reads run directories only: no MLflow, no torch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from manual_backprop.common.errors import InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.common.startup.output import endure_output
from manual_backprop.config.arguments import Parser
from manual_backprop.tracking import close_dead_runs, load_training_log
from manual_backprop.training.comparison.runs import ALIKE, compare, difference_lines, table_lines

COMMAND = "python -m manual_backprop.compare"
OUTPUTS = Path("outputs")

HELP = f"""\
RUN is `last`, a run id or its last six characters, or the path of a run directory.

  {COMMAND} 4f1c2a 91be03
  {COMMAND} outputs/sweeps/SWEEP --picture comparison.png
  {COMMAND} outputs/sweeps/SWEEP --csv runs.csv

The table has a row for each run and a column for each key in which the runs differ. The best run comes first: the one
with the lowest validation loss, or, if another metric chooses the best checkpoint of their task (accuracy, exact match,
chrF, RMSE), the best one by that metric, which has a column too. Unfinished runs come last. Below the table is the
largest difference between the curves, at the steps that all runs have logged.

The picture shows what ranks the runs over the number that was swept, if that has at least three values, and otherwise
the curves. If the runs differ only in settings that must not change the result ({", ".join(ALIKE)}), it also shows the
differences of the curves. The CSV file has a row for each run: its summary and its whole config, keys that differ
first, and for each value where it came from, as on the page of python -m manual_backprop.visualize.
"""


def _runs_named(argument: str) -> list[str | Path]:
    """The runs that an argument names: a run, or all runs of a sweep's directory. Raises InputError."""
    if not (Path(argument) / "jobs").is_dir():
        return [argument]
    from manual_backprop.training.sweeps.records import runs_of_sweep

    if not (found := list(runs_of_sweep(Path(argument)))):
        raise InputError(f"{argument}: none of the runs of this sweep exists")
    return list(found)


def main(arguments: Sequence[str] | None = None) -> int:
    about = "Compare runs: the settings in which they differ, their results, and the distance of their curves."
    parser = Parser("compare", about, HELP)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or the directory of a sweep (all its runs)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="also draw a picture")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="also write summaries and configs as a table")
    chosen = parser.parse(arguments)
    if chosen.picture is not None and chosen.picture.suffix != ".png":
        raise InputError(f"--picture {chosen.picture}: must end in .png, as in comparison.png")
    if chosen.csv is not None and chosen.csv.suffix != ".csv":
        raise InputError(f"--csv {chosen.csv}: must end in .csv, as in runs.csv")
    if chosen.picture is not None or chosen.csv is not None:
        endure_output()
    close_dead_runs(OUTPUTS)
    logs = [load_training_log(run) for argument in chosen.runs for run in _runs_named(argument)]
    runs = compare(logs)
    print(*table_lines(runs), sep="\n")
    if len(runs) > 1:
        print("", *difference_lines(logs), sep="\n")
    if chosen.picture is not None:
        from manual_backprop.training.comparison.picture import draw_comparison

        names = sorted({str(log.run.get("run_name", log.path.name)) for log in logs})
        if draw_comparison(runs, chosen.picture, ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")):
            print(f"\npicture: {chosen.picture}")
    if chosen.csv is not None:
        from manual_backprop.visualizer.runs import labels_of
        from manual_backprop.visualizer.tables import write_csv

        each = {log.path: log for log in logs}  # a run that is named twice counts once
        labels = labels_of({str(path): log for path, log in each.items()})
        write_csv({labels[str(path)]: log for path, log in each.items()}, chosen.csv)
        print(f"\ntable: {chosen.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
