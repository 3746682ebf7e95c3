"""Reads a time series from a CSV file: one row for each step, with a time and one or several values.

    date,co2
    1958-03-29,316.1
    1958-04-05,

An empty value (or nan, na, null, none) is a gap, and so is a step without a row in the file; both become NaN. Times are
ISO 8601 dates (1958-03, 1958-03-29, 19580329, with or without a time of day) or numbers. They must increase and be
equally spaced, within a tenth of a step, so that months and years can be steps too. Lines that begin with # are
comments. Nothing is sorted, guessed or repaired silently.
"""

from __future__ import annotations

import calendar
import csv
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ...common.digests import json_digest
from ...common.errors import InputError
from ...config.rules import nearest
from ...config.schema import DatasetConfig

SHIPPED = {"co2": Path(__file__).with_name("co2.csv")}  # datasets in the package
GAPS = ("", "nan", "na", "n/a", "null", "none")
DELIMITERS = ",;\t"
TOLERANCE = 0.1  # of a step
DAY = 86400.0  # [s]
FIRST_TIME = datetime(1, 1, 1, tzinfo=UTC).timestamp()
END_OF_TIMES = datetime(9999, 12, 31, tzinfo=UTC).timestamp() + DAY  # datetime has no later ones
KINDS = {"number": "a number", "month": "a month, as in 1958-03", "date": "a date", "time": "a date with a time of day"}


@dataclass(frozen=True)
class Clock:
    """The time axis of a series: numbers, or seconds since 1970; `step` is the spacing of times.

    kind: number, month (1958-03), date, or time (of day). months: the number of months in a step, 0 if a step is not
    whole months. A later time then has the same day of the month, or the last day if `ends`.
    """

    kind: str
    step: float
    months: int = 0
    ends: bool = False

    def after(self, stamp: float, steps: int) -> float:
        """The time that is `steps` steps after `stamp`."""
        if not self.months:
            return stamp + steps * self.step
        begin = _moment(stamp)
        year, month = divmod(begin.year * 12 + begin.month - 1 + steps * self.months, 12)
        longest = calendar.monthrange(year, month + 1)[1]
        day = longest if self.ends else min(begin.day, longest)
        return begin.replace(year=year, month=month + 1, day=day).timestamp()

    def time_text(self, stamp: float) -> str:
        """A time as text, in the format of the file."""
        if self.kind == "number":
            return f"{stamp:.10g}"
        moment = _moment(stamp)
        if self.kind == "month":
            return f"{moment:%Y-%m}"
        return moment.date().isoformat() if self.kind == "date" else moment.replace(tzinfo=None).isoformat(sep=" ")

    @property
    def about(self) -> str:
        """The length of a step in words."""
        if self.kind == "number":
            return f"{self.step:.6g}"
        if self.months:
            return f"{self.months} month" + "s" * (self.months > 1)
        return f"{self.step / DAY:g} day" + "s" * (self.step != DAY) if not self.step % DAY else f"{self.step:g} s"


def _moment(stamp: float) -> datetime:
    return datetime.fromtimestamp(stamp, UTC)


@dataclass(frozen=True)
class Series:
    """A time series of N steps and S columns. times (N,) as in `clock`; values (N, S) float64, NaN in a gap."""

    place: str  # the file that it was read from
    clock: Clock
    times: np.ndarray
    names: tuple[str, ...]
    values: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def digest(self) -> str:
        """SHA-256 of times, names and values."""
        gaps = np.nan_to_num(self.values, nan=-0.0).tobytes().hex(), np.isnan(self.values).tobytes().hex()
        return json_digest([self.names, self.times.tobytes().hex(), *gaps])

    def time_text(self, place: int) -> str:
        """The time of a step as text; also of steps after the last one. Raises InputError after the year 9999."""
        last = len(self) - 1
        try:
            stamp = self.times[place] if place <= last else self.clock.after(float(self.times[last]), place - last)
            return self.clock.time_text(float(stamp))
        except (ValueError, OverflowError):  # of datetime
            raise InputError(
                f"{self.place}: ends at {self.time_text(last)}, so step {place - last} after its end is beyond the "
                "year 9999, the last one that a date can have; give a series that ends earlier"
            ) from None


def open_series(dataset: DatasetConfig) -> Series:
    """The series that a config names. Raises InputError with file, line, reason and what to do."""
    path = SHIPPED.get(dataset.name) or dataset.path
    assert path is not None
    return read_series(path, dataset.time_column, dataset.value_columns, dataset.on_bad_row == "skip")


def read_series(
    path: str | Path, time_column: str | None = None, value_columns: Sequence[str] | None = None, skip: bool = False
) -> Series:
    """The series in a file; the arguments are those of `series_of_lines`. Raises InputError."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return series_of_lines(file, str(path), time_column, value_columns, skip)
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give the one CSV file that holds the series") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): save the series as CSV in UTF-8") from error


def series_of_lines(
    lines: Iterable[str],
    place: str,
    time_column: str | None = None,
    value_columns: Sequence[str] | None = None,
    skip: bool = False,
    configured: bool = True,
) -> Series:
    """The series in the lines of a CSV file. time_column: None is the first column. value_columns: None are all others.
    skip: rows that cannot be read are left out and counted. `place` is the file, for messages, which name keys of the
    config if `configured`. Raises InputError, with line, reason and what to do."""
    reader = _Reader(place, time_column, value_columns, skip, configured)
    return reader.series(reader.rows_of(lines))


@dataclass
class _Reader:
    place: str
    time_column: str | None
    value_columns: Sequence[str] | None
    skip: bool
    configured: bool
    rows: int = 0
    bad: list[str] = field(default_factory=list)  # what is wrong with rows that are left out

    def rows_of(self, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Line number and cells of each row, without comments and empty lines."""
        first = True
        delimiter = ","
        for number, line in enumerate(lines, 1):
            if line.startswith("#") or not line.strip():
                continue
            if first:
                delimiter, first = max(DELIMITERS, key=line.count), False
            try:
                cells = next(csv.reader([line], delimiter=delimiter, strict=True))
            except csv.Error as error:
                self.rows += 1
                self._refuse(number, f"is not a row of a CSV file ({error}); close its quotation marks")
                continue
            yield number, [cell.strip() for cell in cells]

    # Columns

    def series(self, rows: Iterator[tuple[int, list[str]]]) -> Series:
        _, header = next(rows, (0, []))
        if len(header) < 2:
            raise InputError(
                f"{self.place}: {'is empty' if not header else f'has one column, {header[0]!r}'}; a series needs a "
                "line of names, then rows with a time and at least one value, as in date,co2"
            )
        if all(is_number(cell) or _parsed(cell, None) for cell in header):
            raise InputError(
                f"{self.place}: its first line holds values, {','.join(header)[:60]}; put a line with the columns' "
                "names before it, as in time,value"
            )
        names = list(header)
        time = self._column("time_column", self.time_column or names[0], names)
        wanted = self.value_columns or [name for place, name in enumerate(names) if place != time]
        places = [self._column("value_columns", name, names) for name in wanted]
        if not all(wanted):
            raise InputError(f"{self.place}: column {names.index('') + 1} has no name; name each column of values")
        if time in places or len({*places}) < len(places):
            raise InputError(
                f"{self.place}: dataset.value_columns={','.join(wanted)} names a column twice, or the column of times "
                f"({names[time]}); name each column of values once"
            )
        return self._filled([names[place] for place in places], *self._read_rows(rows, time, places, header))

    def _column(self, key: str, name: str, names: list[str]) -> int:
        if name in names:
            return names.index(name)
        meant = nearest(name, names)
        written = f"[{meant or 'NAME'}]" if key == "value_columns" else meant or "NAME"
        setting = f"dataset.{key}={written}"
        way_out = f"did you mean {setting}?" if meant else f"name one of them: {setting}"
        raise InputError(
            f"{self.place}: has no column {name!r}; it has {', '.join(names)}; "
            + (way_out if self.configured else "this model needs that column: rename one of them")
        )

    # Rows

    def _read_rows(
        self, rows: Iterator[tuple[int, list[str]]], time: int, places: list[int], header: list[str]
    ) -> tuple[str, list[int], list[float], list[list[float]]]:
        """The kind of the times, the line numbers, the times and the values of all rows."""
        kind, numbers, stamps, values = None, list[int](), list[float](), list[list[float]]()
        for number, cells in rows:
            self.rows += 1
            found = self._row(cells, kind, time, places, header)
            if isinstance(found, str):
                self._refuse(number, found)
                continue
            known, stamp, numbers_of_row = found
            if stamps and stamp <= stamps[-1]:
                double = stamp == stamps[-1]
                self._refuse(
                    number,
                    f"the time {cells[time]} "
                    + ("occurs twice" if double else "is before that of the row above")
                    + ("; keep one row of each time" if double else "; sort the file by time"),
                )
                continue
            kind = known if kind is None else kind
            numbers.append(number)
            stamps.append(stamp)
            values.append(numbers_of_row)
        if len(stamps) < 2:
            raise InputError(
                f"{self.place}: has {len(stamps)} row{'s' * (len(stamps) != 1)} of values; a series needs at least "
                "two, and a forecast needs task.history + task.horizon of them"
            )
        assert kind is not None
        return kind, numbers, stamps, values

    def _row(
        self, cells: list[str], kind: str | None, time: int, places: list[int], header: list[str]
    ) -> tuple[str, float, list[float]] | str:
        """The kind of a row's time, its time and its values; or what is wrong with it."""
        if len(cells) != len(header):
            return f"has {len(cells)} cells, but the first line names {len(header)} columns"
        parsed = _parsed(cells[time], kind)
        if parsed is None:
            wanted = KINDS.get(kind or "", "a date as in 1958-03-29 (ISO 8601), or a number")
            return f"the time {cells[time]!r} is not {wanted}" + " as in the rows above" * (kind is not None)
        values = []
        for place in places:
            cell = cells[place]
            if cell.lower() in GAPS:
                values.append(math.nan)
            elif is_number(cell):
                values.append(float(cell))
            else:
                hint = "; write numbers with a decimal point and without separators" * ("," in cell)
                columns = ", or name the columns of numbers: dataset.value_columns=[NAME]" * self.configured
                why = f"{header[place]} is {cell!r:.60}, not a finite number{hint}"
                return f"{why}; leave a cell empty for a gap{columns}"
        return *parsed, values

    def _refuse(self, number: int, why: str) -> None:
        message = f"{self.place}, line {number}: {why}"
        self.bad.append(message)
        if not self.skip:
            raise InputError(message + "; or leave such rows out: dataset.on_bad_row=skip" * self.configured)

    # Steps

    def _filled(
        self, names: list[str], kind: str, numbers: list[int], stamps: list[float], values: list[list[float]]
    ) -> Series:
        """The series with a row for each step, NaN for steps without a row in the file."""
        step = float(np.sort(np.diff(stamps))[(len(stamps) - 2) // 2])  # the lower median
        places, kept = [0], [0]
        for row in range(1, len(stamps)):
            steps = (stamps[row] - stamps[kept[-1]]) / step
            whole = round(steps)
            if whole < 1 or abs(steps - whole) > TOLERANCE:
                clock = Clock(kind, step)
                self._refuse(
                    numbers[row],
                    f"the time {clock.time_text(stamps[row])} is {steps:.3g} steps after the one before (most are "
                    f"{clock.about} apart): times must be equally far apart; resample the series",
                )
                continue
            if whole > max(len(stamps), 10):
                raise InputError(
                    f"{self.place}, line {numbers[row]}: the time {Clock(kind, step).time_text(stamps[row])} leaves a "
                    f"gap of {whole - 1:,} steps, more than the series has rows; is the time mistyped? Correct it, "
                    "or add the missing rows"
                )
            places.append(places[-1] + whole)
            kept.append(row)
        table = np.full((places[-1] + 1, len(names)), np.nan)
        table[places] = np.array(values)[kept]
        clock = _clock(kind, step, [stamps[row] for row in kept])
        times = np.interp(np.arange(len(table)), places, [stamps[row] for row in kept])
        for place, name in enumerate(names):
            if not np.isfinite(table[:, place]).any():
                raise InputError(f"{self.place}: the column {name!r} holds no numbers; name another one")
        return Series(self.place, clock, times, tuple(names), table, self._notes(table, len(table) - len(kept)))

    def _notes(self, table: np.ndarray, absent: int) -> tuple[str, ...]:
        gaps = int(np.isnan(table).any(axis=1).sum())
        notes = []
        if gaps:
            of_rows = f", {absent:,} of them without a row in the file" if absent else ""
            notes.append(f"{gaps:,} of {len(table):,} steps have a gap{of_rows}: filled in the inputs, never a target")
        if self.bad:
            notes.append(
                f"{len(self.bad)} of {self.rows:,} rows were left out (dataset.on_bad_row=skip): {self.bad[0]}"
            )
        return tuple(notes)


def is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell)) and "_" not in cell
    except ValueError:
        return False


def _parsed(cell: str, kind: str | None) -> tuple[str, float] | None:
    """The kind of a time, and the time: a number, or the seconds since 1970 of a date (in UTC unless it has a zone)."""
    found: tuple[str, float] | None = None
    if month := re.fullmatch(r"(\d{4})-(\d\d)", cell):
        year, number = int(month[1]), int(month[2])
        if year and 1 <= number <= 12:
            found = "month", datetime(year, number, 1, tzinfo=UTC).timestamp()
    elif is_number(cell) and len(cell) != 8:
        found = "number", float(cell)
    else:
        try:
            moment = datetime.fromisoformat(cell)
        except ValueError:
            return ("number", float(cell)) if kind in (None, "number") and is_number(cell) else None
        kind_of_cell = "date" if len(cell) in (8, 10) else "time"
        stamp = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        found = (kind_of_cell, stamp) if FIRST_TIME <= stamp < END_OF_TIMES else None
        if kind == "number" and is_number(cell):
            found = "number", float(cell)
    return found if found is not None and kind in (None, found[0]) else None


def _clock(kind: str, step: float, stamps: Sequence[float]) -> Clock:
    """The time axis. A step is whole months if all times have the same day of the month, or are its last day."""
    if kind == "number" or step < 28 * DAY * (1 - TOLERANCE):
        return Clock(kind, step)
    moments = [_moment(stamp) for stamp in stamps]
    same = len({(moment.day, moment.time()) for moment in moments}) == 1
    ends = all(moment.day == calendar.monthrange(moment.year, moment.month)[1] for moment in moments)
    if not same and not ends:
        return Clock(kind, step)
    return Clock(kind, step, max(1, round(step / (365.2425 / 12 * DAY))), ends and not same)
