"""metrics.jsonl: the append-only file that is the source of truth for a run's metrics.

Version 1 of the schema: the first line is a header, every other line one entry.

    {"format": "manual_backprop.metrics", "version": 1}
    {"step": 10, "time_ms": 1795205412345, "metrics": {"train/loss": 5.123456789, "tokens_seen": 40960}}

- `step`: optimizer steps completed, from 1. `time_ms`: milliseconds since 1970, UTC, when the entry was written.
- `metrics`: train/loss, learning_rate and others of training, inspect/ of every layer
  (training.inspect_every), validation/ of an evaluation, system/ of the machine (at most every 10 s).
  `load_training_log` returns inspect/ together with training, and the others separately.
- Numbers are unrounded: reading gives the same float64. JSON has no NaN and no infinity; the strings "NaN", "Infinity"
  and "-Infinity" represent them.
- A step may have several lines (training and validation), and more after a resume: the last value counts.
- The last line may be incomplete (the process was killed while it wrote); a reader ignores it.
- A resume moves entries after its checkpoint to `superseded.jsonl`: the same format, without a header.

Standard library only. Not here: delivery to MLflow (mlflow_tracking.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, SupportsFloat

from ..common.durable_files import storage_errors
from ..common.errors import InputError

FORMAT = "manual_backprop.metrics"
VERSION = 1
METRICS = "metrics.jsonl"
SUPERSEDED = "superseded.jsonl"
HEADER = json.dumps({"format": FORMAT, "version": VERSION}).encode() + b"\n"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

logger = logging.getLogger("manual_backprop.tracking")


@dataclass(frozen=True)
class Entry:
    """One line of the file, and the position where the next one starts [bytes]."""

    step: int
    time_ms: int
    metrics: dict[str, float]
    end: int


class MetricsFile:
    """Writes the file. One process at a time owns it (by the run directory's lock); its threads may share it.

    A line goes to the kernel in one write, so that `kill -9` loses none. Lines that do not fit on a full disk wait in
    memory and are written before the next one; only `close` raises StorageError for them. Opening removes an incomplete
    last line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._waiting, self._warned = b"", False
        with storage_errors(f"open {self.path}"):
            self._file = self.path.open("a+b", buffering=0)
            self.length = self._file.seek(0, os.SEEK_END)  # [bytes], which checkpoints record
            whole = self.path.read_bytes().rfind(b"\n") + 1
            try:
                if self.length:
                    _check_header(self.path)
                if whole == 0:  # new, or killed while it was created
                    self._file.truncate(0)
                    self.length = 0
                    self._write(HEADER)
                else:
                    self.truncate(whole)
            except BaseException:
                self._file.close()
                raise

    def append(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Write one entry. Numbers may be anything that `float` takes, such as a tensor of one element. Raises
        InputError if a step or a value is not a number, or if the file is closed."""
        if self._file.closed:
            raise InputError(f"{self.path} is closed and can take no more metrics: open it again")
        try:
            completed = index(step)  # also for integers of numpy and torch
        except TypeError:
            completed = -1
        if completed < 0:
            raise InputError(f"step={step!r}: expected the number of completed optimizer steps, at least 0")
        if not isinstance(metrics, Mapping):
            raise InputError(f"metrics={metrics!r}: expected a mapping of names to numbers, as {{'train/loss': 3.2}}")
        numbers = {name: _as_json_number(name, value) for name, value in metrics.items()}
        content = {"step": completed, "time_ms": int(time.time() * 1000), "metrics": numbers}
        with self._lock:
            self._waiting += json.dumps(content, allow_nan=False).encode() + b"\n"
            try:
                self._write_waiting()
            except OSError as error:
                if not self._warned:
                    logger.warning("cannot write %s (%s): metrics wait in memory", self.path, error.strerror)
                self._warned = True

    def truncate(self, length: int) -> int:
        """Move everything after `length` bytes to superseded.jsonl; return the number of bytes moved.

        A resume calls this with the length recorded in its checkpoint. Raises InputError if no line ends there.
        """
        with self._lock, storage_errors(f"shorten {self.path}"):
            if length == self.length:
                return 0
            content = self.path.read_bytes()
            if not 0 < length < len(content) or content[length - 1 : length] != b"\n":
                raise InputError(
                    f"{self.path} has {len(content)} bytes, but no line that ends at byte {length}, which the "
                    "checkpoint records: it is not the file that this checkpoint was saved with"
                )
            # First sync the copy, then cut the file: a kill in between repeats entries in the copy, but loses none.
            beyond = content[length:]
            with (self.path.parent / SUPERSEDED).open("ab") as superseded:
                superseded.write(beyond if beyond.endswith(b"\n") else beyond + b"\n")
                superseded.flush()
                os.fsync(superseded.fileno())
            self._file.truncate(length)
            os.fsync(self._file.fileno())
            self.length = length
            return len(beyond)

    def sync(self) -> int:
        """Sync the file to the disk and return its length. A save calls this before it records the length."""
        with self._lock, storage_errors(f"write {self.path}"):
            self._write_waiting()
            os.fsync(self._file.fileno())
            return self.length

    def close(self) -> None:
        """Close the file. Raises StorageError if lines are still waiting for space on the disk."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            self._file.close()

    def _write_waiting(self) -> None:
        if self._waiting:
            self._write(self._waiting)
            self._waiting = b""

    def _write(self, content: bytes) -> None:
        try:
            written = self._file.write(content)
            if written != len(content):
                self._file.write(content[written:])  # raises the reason why the first write was short
        except OSError:
            with suppress(OSError):
                self._file.truncate(self.length)  # leave no part of a line
            raise
        self.length += len(content)


def read_entries(path: Path, start: int = 0, damaged: list[int] | None = None) -> Iterator[Entry]:
    """The complete entries of a file, from byte `start` on; an incomplete last line is left for the next call.

    A line that is not an entry (only a failing disk leaves one in the middle) is skipped, and its byte position is
    added to `damaged`. Raises InputError if this is not a metrics file of a known version.
    """
    if start == 0 and path.name != SUPERSEDED:
        _check_header(path)
    with path.open("rb") as file:
        file.seek(start)
        position = start
        for line in file:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            try:
                content = json.loads(line)
                if "format" in content:
                    continue
                metrics = {name: _from_json_number(value) for name, value in content["metrics"].items()}
                entry = Entry(int(content["step"]), int(content["time_ms"]), metrics, position)
            except (ValueError, TypeError, KeyError, AttributeError):
                if damaged is not None:
                    damaged.append(position - len(line))
                continue
            yield entry


def _check_header(path: Path) -> None:
    try:
        with path.open("rb") as file:
            first = file.readline(10_000)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not first.endswith(b"\n"):
        if HEADER.startswith(first):
            return  # it has just been created
        raise InputError(f"{path} is not a metrics file: its first line is not a header")
    try:
        header = json.loads(first)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f'{path} is not a metrics file: its first line is not {{"format": "{FORMAT}", ...}}')
    if header.get("version") != VERSION:
        raise InputError(
            f"{path} has version {header.get('version')} of the metrics schema; this program reads version {VERSION}"
        )


def _as_json_number(name: str, value: SupportsFloat) -> int | float | str:
    if isinstance(value, int):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # the last one is torch's, of several elements
        raise InputError(f"{name}={value!r:.80}: expected one number, or a tensor of one element") from error
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _from_json_number(value: Any) -> float:
    if isinstance(value, str):
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value
