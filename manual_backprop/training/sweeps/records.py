"""The outcome of each job of a sweep: one file a job, written by the process that watches the job.

    outputs/sweeps/<time>-<name>-<6 hex>/
        run.json  tracking.json  run.log      as in a run's directory: the sweep is a run of its own, the parent
        jobs/0003.json                        a `JobRecord`
        stop                                  one line for each signal that asked the sweep to end
        table.csv  table.md  curves.png  heat_map.png  comparison.png

Jobs may run in other processes and on other machines that share the directory, so a file is replaced at once and read
anew each time. Needs no Hydra, no torch and no MLflow.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from manual_backprop.common.durable_files import storage_errors, write_atomically
from manual_backprop.common.errors import InputError
from manual_backprop.common.plain_text import visible
from manual_backprop.tracking.run_directory import FINISHED, KILLED, RUNNING, RUNS, list_runs, read_run
from manual_backprop.tracking.training_log import load_training_log
from manual_backprop.training.comparison.runs import LOSS, Metric

WAITING = "WAITING"
LONGEST_NAME = 100  # of a run_name


@dataclass(frozen=True)
class JobRecord:
    number: int  # from 0, as Hydra counts
    overrides: tuple[str, ...]  # KEY=VALUE, all of them
    swept: tuple[str, ...]  # those that set this job apart from the others
    status: str = WAITING  # WAITING, RUNNING, FINISHED, FAILED, KILLED
    run_directory: str | None = None  # None: it did not get so far
    validation_loss: float | None = None
    metric: str | None = None  # what else chooses the best checkpoint of its task; None: the loss does
    metric_value: float | None = None  # at its end
    highest_is_best: bool = False  # of that metric
    tokens_per_second: float | None = None  # the median of those that were logged
    exit_code: int | None = None  # as a run by itself would have had
    error: str | None = None

    @property
    def title(self) -> str:
        return " ".join(f"{key}={value}" for key, value in swept_values(self).items()) or "the defaults"

    @property
    def main_metric(self) -> Metric:
        return Metric(self.metric or LOSS, self.highest_is_best)

    def value(self, metric: Metric) -> float | None:
        """The validation loss or the main metric at the job's end; None if it has not measured it."""
        return {self.metric: self.metric_value, LOSS: self.validation_loss}.get(metric.name)

    def result(self, metric: Metric) -> str:
        """validation accuracy 0.75"""
        return f"{metric.title} {metric.shown(self.value(metric))}"


class Records:
    """The records of one sweep's directory."""

    def __init__(self, sweep: Path):
        self.sweep = sweep
        self.folder = sweep / "jobs"

    def write(self, record: JobRecord) -> None:
        """Raises StorageError."""
        with storage_errors(f"create {self.folder}"):
            self.folder.mkdir(exist_ok=True)
        write_atomically(self._file(record.number), (json.dumps(asdict(record), indent=1) + "\n").encode())

    def read(self, number: int) -> JobRecord | None:
        file = self._file(number)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            texts = {name: tuple(content[name]) for name in ("overrides", "swept")}
            record = JobRecord(**{**content, **texts})
            record = replace(record, run_directory=self._where_it_is(record.run_directory))
            return record if record.metric is None or "highest_is_best" in content else _with_direction(record)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error

    def read_all(self) -> list[JobRecord]:
        numbers = sorted(int(file.stem) for file in self.folder.glob("[0-9]*.json"))
        return [record for number in numbers if (record := self.read(number)) is not None]

    def _where_it_is(self, run: str | None) -> str | None:
        """The run's directory beside this sweep, also where the project was moved or copied since the record was
        written: a copy's sweep leaves the runs of the other alone."""
        return None if run is None else str(self.sweep.parent.parent / RUNS / Path(run).name)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:04d}.json"

    # Requests to stop

    def request_stop(self) -> None:
        """Ask the sweep's jobs to stop; the process that watches a job passes it on. Safe in a signal handler."""
        with (self.sweep / "stop").open("a", encoding="utf-8") as file:
            file.write("stop\n")

    def clear_stop_requests(self) -> None:
        (self.sweep / "stop").unlink(missing_ok=True)

    def stop_requests(self) -> int:
        try:
            return (self.sweep / "stop").read_text(encoding="utf-8").count("\n")
        except OSError:
            return 0


def swept_part(overrides: Sequence[str], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(line for line in overrides if line.partition("=")[0] in keys)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """optimizer.learning_rate -> learning_rate, where no other of the keys would be called so too: names of runs have
    little room in MLflow's columns."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def job_name(number: int, swept: Sequence[str]) -> str | None:
    """The name of a job's run, model=tiny,learning_rate=0.001; None if nothing was swept. A name that was swept
    is one already."""
    values = _values(swept)
    if "run_name=null" in swept:
        del values["run_name"]
    short = short_keys(list(values))
    parts = [("" if key == "run_name" else f"{short[key]}=") + value for key, value in values.items()]
    name = visible(",".join(parts).replace("/", "_").replace("\\", "_"))
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 10]}...job {number}"
    return name or None


def swept_values(record: JobRecord) -> dict[str, str]:
    """{key: value} of what sets a job apart; a text without the quotes that the command line's grammar wants."""
    return _values(record.swept)


def _values(lines: Sequence[str]) -> dict[str, str]:
    return {key: _unquoted(value) for key, value in (line.split("=", 1) for line in lines)}


def _unquoted(value: str) -> str:
    quote = value[:1]
    if len(value) < 2 or quote not in ("'", '"') or value[-1] != quote:
        return value
    # Backslashes before a quote, or at the end, are doubled, and a quote inside has one more before it.
    return re.sub(rf"(\\+)({quote}|$)", lambda found: "\\" * (len(found[1]) // 2) + found[2], value[1:-1])


def run_of_job(outputs: Path, sweep: Path, number: int) -> Path | None:
    """The newest run that says it is this job of this sweep."""
    for path in reversed(list_runs(outputs)):
        origin = read_run(path).get("sweep") or {}
        if origin.get("run_id") == sweep.name and origin.get("job") == number:
            return path
    return None


def _with_direction(record: JobRecord) -> JobRecord:
    """A record of a version that ranked by the loss only. Its run says whether the highest value of its metric is the
    best; where the run is gone, the loss still ranks."""
    with suppress(InputError):
        if record.run_directory is not None:
            return replace(record, highest_is_best=Metric.of(read_run(Path(record.run_directory))).highest_is_best)
    return replace(record, metric=None, metric_value=None)


def measured(record: JobRecord, run: Path | None) -> JobRecord:
    """The record with what its run's directory says about loss, speed and what else its task measures."""
    if run is None or not (run / "metrics.jsonl").is_file():
        return replace(record, run_directory=None if run is None else str(run))
    log = load_training_log(run)
    speeds, metric = log.training.get("tokens_per_second"), Metric.of(log.run)

    def last(name: str) -> float | None:
        series = log.validation.get(name)
        return series.values[-1] if series and series.values and math.isfinite(series.values[-1]) else None

    return replace(
        record,
        run_directory=str(run),
        validation_loss=last(LOSS),
        metric=None if metric.name == LOSS else metric.name,
        metric_value=None if metric.name == LOSS else last(metric.name),
        highest_is_best=metric.highest_is_best,
        tokens_per_second=statistics.median(speeds.values) if speeds and speeds.values else None,
    )


def current_record(record: JobRecord, outputs: Path, sweep: Path) -> JobRecord:
    """The record; if it is still RUNNING, with the status that the job's own run has recorded, since the process that
    watched the job may have died."""
    if record.status != RUNNING:
        return record
    run = run_of_job(outputs, sweep, record.number)
    status = read_run(run)["status"] if run is not None else KILLED
    error = "the process that watched over it ended" if status in (RUNNING, KILLED) else None
    return measured(replace(record, status=status, error=error), run)


def ranking(records: Sequence[JobRecord]) -> Metric:
    """What ranks the jobs: the main metric of their task; the validation loss if they have tasks that differ in it."""
    return Metric.shared(record.main_metric for record in records if record.status == FINISHED)


def best_of(records: Sequence[JobRecord]) -> JobRecord | None:
    """The best of the finished jobs that have measured what ranks them."""
    metric = ranking(records)
    done = (record for record in best_first(records) if record.status == FINISHED and record.value(metric) is not None)
    return next(done, None)


def best_first(records: Sequence[JobRecord]) -> list[JobRecord]:
    """The records by `ranking`, the best first, and where that is equal by the validation loss; jobs that did not
    finish come last, by number."""
    metrics = ranking(records), Metric()

    def place(record: JobRecord) -> list[float]:
        done = record.status == FINISHED
        return [*(metric.sort_key(record.value(metric) if done else None) for metric in metrics), record.number]

    return sorted(records, key=place)


def runs_of_sweep(sweep: Path) -> list[Path]:
    """The directories of a sweep's runs that are there, in the order of the jobs."""
    named = [Path(record.run_directory) for record in Records(sweep).read_all() if record.run_directory is not None]
    return [path for path in named if path.is_dir()]
