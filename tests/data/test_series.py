"""dataset=series: what a CSV file may be, and what is said of one that cannot be used."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from manual_backprop.common.errors import InputError
from manual_backprop.data.series.reader import SHIPPED, Series, read_series


def read(folder: Path, text: str | bytes, **options: object) -> Series:
    path = folder / "series.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_series(path, **options)  # type: ignore[arg-type]


def dated(*rows: str) -> str:
    return "date,a,b\n" + "".join(f"{row}\n" for row in rows)


def test_the_series_that_comes_with_the_package() -> None:
    series = read_series(SHIPPED["co2"])
    assert (len(series), series.names, series.clock.about) == (2284, ("co2",), "7 days")
    assert int(np.isnan(series.values).sum()) == 59
    assert (series.time_text(0), series.time_text(2283), series.time_text(2285)) == (
        "1958-03-29",
        "2001-12-29",
        "2002-01-12",
    )
    assert "Keeling" in SHIPPED["co2"].read_text()
    assert series.notes[0].startswith("59 of 2,284 steps have a gap: filled")


def test_gaps_are_marked_and_steps_without_a_row_are_gaps(tmp_path: Path) -> None:
    text = "\ufeff# a comment\n" + dated(
        "2020-01-01,1,NaN", "2020-01-02,,2", "", "2020-01-05,4,-1e3", "2020-01-06,5,n/a"
    )
    series = read(tmp_path, text)
    assert series.names == ("a", "b")
    expected = [[1, math.nan], [math.nan, 2], [math.nan] * 2, [math.nan] * 2, [4, -1000], [5, math.nan]]
    assert np.array_equal(series.values, expected, equal_nan=True)
    assert [series.time_text(place) for place in (3, 5, 6)] == ["2020-01-04", "2020-01-06", "2020-01-07"]
    assert "5 of 6 steps have a gap, 2 of them without a row in the file" in series.notes[0]
    assert series.digest != read(tmp_path, text.replace("-1e3", "-1e2")).digest
    assert series.digest == read(tmp_path, text.replace("n/a", "")).digest


@pytest.mark.parametrize(
    ("times", "step", "after"),
    [
        (("1958", "1959", "1961"), "1", "1962"),
        (("0.5", "1", "1.5"), "0.5", "2"),
        (("2020-01", "2020-02", "2020-04"), "1 month", "2020-05"),
        (("2020-01-31", "2020-02-29", "2020-03-31"), "1 month", "2020-04-30"),
        (("2019-11-15", "2019-12-15", "2020-01-15"), "1 month", "2020-02-15"),
        (("2019-06-30", "2019-09-30", "2019-12-31"), "3 months", "2020-03-31"),
        (("1700-01-01", "1701-01-01", "1702-01-01"), "12 months", "1703-01-01"),
        (("19580329", "19580405", "19580412"), "7 days", "1958-04-19"),
        (("2020-01-01 10:00", "2020-01-01T11:00", "2020-01-01 12:00:00"), "3600 s", "2020-01-01 13:00:00"),
        (("2020-01-01T23:30Z", "2020-01-02T01:00+01:00", "2020-01-02T00:30Z"), "1800 s", "2020-01-02 01:00:00"),
    ],
)
def test_times_and_steps(tmp_path: Path, times: tuple[str, ...], step: str, after: str) -> None:
    series = read(tmp_path, "t;x\n" + "".join(f"{time};{n}\n" for n, time in enumerate(times)))
    assert series.clock.about == step
    assert series.time_text(len(series)) == after
    assert len(series) == (4 if times[2] in ("1961", "2020-04") else 3)


@pytest.mark.parametrize(
    ("times", "steps"),  # and the first step after the end that has no date
    [
        (("9999-08", "9999-09", "9999-10"), 3),
        (("9999-10-31", "9999-11-30", "9999-12-31"), 1),
        (("9997-05-01", "9998-05-01", "9999-05-01"), 1),
        (("9999-12-27", "9999-12-28", "9999-12-29"), 3),
        (("9999-12-31 20:00", "9999-12-31 21:00", "9999-12-31 22:00"), 2),
    ],
)
def test_dates_end_with_the_year_9999(tmp_path: Path, times: tuple[str, ...], steps: int) -> None:
    series = read(tmp_path, "t,x\n" + "".join(f"{time},{n}\n" for n, time in enumerate(times)))
    assert series.time_text(1 + steps).startswith("9999-")
    for more in (steps, 10**6):
        why = rf"series\.csv: ends at {times[-1]}.*, so step {more} after its end is beyond the year 9999"
        with pytest.raises(InputError, match=why):
            series.time_text(2 + more)


@pytest.mark.parametrize("time", ["9999-12-31T23:00-05:00", "0001-01-01T00:00+05:00"])
def test_a_time_that_has_no_date_in_utc(tmp_path: Path, time: str) -> None:
    with pytest.raises(InputError, match=r"line 2: the time .* is not a date"):
        read(tmp_path, dated(f"{time},1,2", "2020-01-02,2,3"))


GOOD = ("2020-01-01,1,2", "2020-01-02,2,3", "2020-01-03,3,4")


@pytest.mark.parametrize(
    ("rows", "line", "why"),
    [
        ((*GOOD, "2020-01-04,mild,5"), 5, "a is 'mild', not a finite number; leave a cell empty for a gap"),
        ((*GOOD, "2020-01-04,inf,5"), 5, "a is 'inf', not a finite number"),
        ((*GOOD, '2020-01-04,"1,5",5'), 5, "write numbers with a decimal point"),
        ((GOOD[1], GOOD[0], GOOD[2]), 3, "the time 2020-01-01 is before that of the row above; sort the file by time"),
        ((*GOOD, GOOD[2]), 5, "the time 2020-01-03 occurs twice; keep one row of each time"),
        ((*GOOD, "tomorrow,4,5"), 5, "the time 'tomorrow' is not a date as in the rows above"),
        ((*GOOD, "5,4,5"), 5, "the time '5' is not a date as in the rows above"),
        ((*GOOD, "2020-01-04,4"), 5, "has 2 cells, but the first line names 3 columns"),
        ((*GOOD, "2020-01-04,4,5,6"), 5, "has 4 cells"),
        (
            (*GOOD, '2020-01-04,"4,5'),
            5,
            "is not a row of a CSV file (unexpected end of data); close its quotation marks",
        ),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path: Path, rows: tuple[str, ...], line: int, why: str) -> None:
    """Its file, line, reason and way out; left out, it is counted."""
    with pytest.raises(InputError, match=r"series\.csv, line") as caught:
        read(tmp_path, dated(*rows))
    assert f"series.csv, line {line}: " in str(caught.value)
    assert why in str(caught.value)
    assert str(caught.value).endswith("or leave such rows out: dataset.on_bad_row=skip")
    series = read(tmp_path, dated(*rows), skip=True)
    assert np.nanmax(series.values) <= 4
    assert f"1 of {len(rows)} rows were left out" in series.notes[-1]


def test_steps_of_other_lengths(tmp_path: Path) -> None:
    hours = [f"2020-01-0{day} {hour:02}:00,1,{hour}" for day in (1, 2) for hour in range(24)]
    with pytest.raises(InputError, match=r"line 7: the time 2020-01-01 05:30:00 is 1.5 steps after the one before"):
        read(tmp_path, dated(*(row.replace("01 05:00", "01 05:30") for row in hours)))
    skipped = read(tmp_path, dated(*(row.replace("01 05:00", "01 05:30") for row in hours)), skip=True)
    assert np.isnan(skipped.values[5]).all()
    assert len(skipped) == 48
    with pytest.raises(InputError, match=r"leaves a gap of 70,1.. steps.* is the time mistyped"):
        read(tmp_path, dated(*hours, "2028-01-03 00:00,1,1"))
    left = read(tmp_path, dated(*(row.replace(" 01:00,1", " 01:00,x") for row in hours)), skip=True)
    assert "2 of 48 rows were left out" in left.notes[-1]


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        ("", {}, "is empty; a series needs a line of names"),
        ("a\n1\n", {}, "has one column, 'a'"),
        ("date,a\n2020-01-01,1\n", {}, "has 1 row of values; a series needs at least two"),
        ("date,a\n", {}, "has 0 rows of values"),
        (
            "2020-01-01,1\n2020-01-02,2\n",
            {},
            "its first line holds values, 2020-01-01,1; put a line with the columns' names before",
        ),
        (
            dated(*GOOD),
            {"time_column": "dat"},
            "has no column 'dat'; it has date, a, b; did you mean dataset.time_column=d",
        ),
        (dated(*GOOD), {"value_columns": ["c"]}, "it has date, a, b; name one of them: dataset.value_columns=[NAME]"),
        ("date,,b\n2020-01-01,1,2\n2020-01-02,1,2\n", {}, "column 2 has no name; name each column of values"),
        (dated(*GOOD), {"value_columns": ["a", "a"]}, "names a column twice"),
        (dated(*GOOD), {"value_columns": ["date"]}, "names a column twice, or the column of times"),
        ("date,a\n2020-01-01,\n2020-01-02,nan\n", {}, "the column 'a' holds no numbers"),
        (b"date,a\n2020-01-01,\xff\n", {}, "is not UTF-8"),
        ('date,a\n2020-01-01,"1\n', {}, "line 2: is not a row of a CSV file"),
    ],
)
def test_a_file_that_is_no_series(tmp_path: Path, text: str | bytes, options: dict[str, object], why: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, **options)
    assert "series.csv" in str(caught.value)
    assert why in str(caught.value)


def test_a_place_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder: give the one CSV file"):
        read_series(tmp_path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_series(tmp_path / "absent.csv")
