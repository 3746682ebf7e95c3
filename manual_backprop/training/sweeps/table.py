"""A sweep as a table, best first: for the terminal, and as table.csv and table.md."""

import csv
import io
import os
from collections.abc import Sequence

from manual_backprop.common.columns import columns
from manual_backprop.common.plain_text import visible
from manual_backprop.training.sweeps.records import FINISHED, JobRecord, best_first, swept_values

COLUMNS = ("overrides", "validation loss", "tokens a second", "status", "run directory")
NUMBERS = {1, 2}  # right-aligned columns


def rows(records: Sequence[JobRecord]) -> list[tuple[str, ...]]:
    """One row per job, best first; missing results are empty."""
    return [
        (
            record.title,
            "" if record.validation_loss is None else f"{record.validation_loss:.4f}",
            "" if record.tokens_per_second is None else f"{record.tokens_per_second:,.0f}",
            record.status,
            "" if record.run_directory is None else os.path.relpath(record.run_directory),
        )
        for record in best_first(records)
    ]


def as_text(records: Sequence[JobRecord]) -> str:
    """The table for the terminal; the directories, which are long, come last."""
    return "\n".join(columns([tuple(map(visible, line)) for line in (COLUMNS, *rows(records))], right=NUMBERS))


def as_markdown(records: Sequence[JobRecord], columns: int = len(COLUMNS)) -> str:
    """The first `columns` columns of the table in Markdown."""
    marks = [" ---: " if column in NUMBERS else " --- " for column in range(columns)]
    cells = [[visible(cell).replace("|", "\\|") for cell in line[:columns]] for line in (COLUMNS, *rows(records))]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]]) + "\n"


def as_csv(records: Sequence[JobRecord]) -> str:
    """The table as CSV: unrounded, with a column for each swept key."""
    keys = list(dict.fromkeys(line.partition("=")[0] for record in records for line in record.swept))
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(["job", *keys, "validation_loss", "tokens_per_second", "status", "run_directory", "error"])
    for record in best_first(records):
        values = swept_values(record)
        results = (record.validation_loss, record.tokens_per_second, record.status, record.run_directory, record.error)
        writer.writerow([record.number, *(values.get(key, "") for key in keys), *results])
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
