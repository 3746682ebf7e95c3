"""A sweep as a table, the best job first: for the terminal, and as table.csv and table.md."""

import csv
import io
import os
from collections.abc import Sequence

from manual_backprop.common.columns import columns
from manual_backprop.common.plain_text import visible
from manual_backprop.training.comparison.runs import Metric
from manual_backprop.training.sweeps.records import FINISHED, JobRecord, best_first, swept_values


def metrics_of(records: Sequence[JobRecord]) -> list[Metric]:
    """The metrics that have a column: the loss, and what else chooses the best checkpoint of some job."""
    return list(dict.fromkeys([Metric(), *(record.main_metric for record in records)]))


def rows(records: Sequence[JobRecord]) -> list[tuple[str, ...]]:
    """The heading, then a row for each job, the best first; values that a job does not have are empty. The directories,
    which are long, come last."""
    metrics = metrics_of(records)
    return [
        ("overrides", *(metric.title for metric in metrics), "tokens a second", "status", "run directory"),
        *(
            (
                record.title,
                *(metric.shown(record.value(metric)) for metric in metrics),
                "" if record.tokens_per_second is None else f"{record.tokens_per_second:,.0f}",
                record.status,
                "" if record.run_directory is None else os.path.relpath(record.run_directory),
            )
            for record in best_first(records)
        ),
    ]


def _numbers(records: Sequence[JobRecord]) -> range:
    """The columns that are right-aligned."""
    return range(1, 2 + len(metrics_of(records)))


def as_text(records: Sequence[JobRecord]) -> str:
    return "\n".join(columns([tuple(map(visible, line)) for line in rows(records)], right=_numbers(records)))


def as_markdown(records: Sequence[JobRecord], directories: bool = True) -> str:
    cells = [
        [visible(cell).replace("|", "\\|") for cell in (line if directories else line[:-1])] for line in rows(records)
    ]
    marks = [" ---: " if column in _numbers(records) else " --- " for column in range(len(cells[0]))]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]]) + "\n"


def as_csv(records: Sequence[JobRecord]) -> str:
    """The table as CSV: unrounded, with a column for each key that was swept, and the errors."""
    keys = list(dict.fromkeys(line.partition("=")[0] for record in records for line in record.swept))
    metrics = metrics_of(records)
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    named = [metric.name.replace("/", "_") for metric in metrics]
    writer.writerow(["job", *keys, *named, "tokens_per_second", "status", "run_directory", "error"])
    for record in best_first(records):
        values = swept_values(record)
        results = [*map(record.value, metrics), record.tokens_per_second]
        ended = record.status, record.run_directory, record.error
        writer.writerow([record.number, *(values.get(key, "") for key in keys), *results, *ended])
    return written.getvalue()


def failures(records: Sequence[JobRecord]) -> list[str]:
    """A few lines for each job that did not finish: which, how it ended, why, where."""
    listed = []
    for record in records:
        if record.status != FINISHED:
            reason = (record.error or "it was not started").strip().replace("\n", "\n    ")
            where = f"\n    {os.path.relpath(record.run_directory)}" if record.run_directory else ""
            listed.append(f"  job {record.number + 1} ({record.title}) {record.status}: {reason}{where}")
    return listed
