"""A sweep from start to end: the parent run, Hydra's call for each job, and the table and pictures.

Table and pictures depend only on the records of the jobs, so they are also written after a failure, after Ctrl-C, and
after an error in the launcher. Ctrl-C is forwarded to the jobs, which save and stop; no further job starts.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig

from manual_backprop.common.durable_files import storage_errors
from manual_backprop.common.errors import CheckFailedError, InputError, ManualBackpropError
from manual_backprop.common.interruption import Interruption
from manual_backprop.common.origin import Origin
from manual_backprop.common.startup.output import enduring_output
from manual_backprop.config.plugins import given_plugins, loaded_plugins, missing_plugins
from manual_backprop.tracking import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    RunDirectory,
    Tracker,
    close_dead_runs,
    create_run_directory,
    load_training_log,
    open_run_directory,
    open_tracker,
)
from manual_backprop.tracking.late_delivery import next_in_mlflow
from manual_backprop.tracking.metrics_file import METRICS
from manual_backprop.tracking.run_directory import RUNS, SWEEPS, own_run_directory, read_run
from manual_backprop.tracking.run_log import run_log, warnings_to_terminal
from manual_backprop.tracking.tracker import add_tags
from manual_backprop.training.command_line import Checked
from manual_backprop.training.comparison.runs import compare, difference_lines, should_coincide
from manual_backprop.training.sweeps.job import PRELOADED, JobRequest, run_job_in_process
from manual_backprop.training.sweeps.processors import jobs_at_once, threads_of_a_job
from manual_backprop.training.sweeps.records import (
    WAITING,
    JobRecord,
    Records,
    best_of,
    current_record,
    job_name,
    ranking,
    run_of_job,
    runs_of_sweep,
    short_keys,
    swept_part,
)
from manual_backprop.training.sweeps.table import as_csv, as_markdown, as_text, failures

log = logging.getLogger("manual_backprop.training.sweeps")

HydraCall = Callable[[list[str], Callable[[DictConfig], float | None]], None]
MLFLOW_MODULES = ["mlflow", "mlflow.store.tracking.sqlalchemy_store"]


@dataclass(frozen=True)
class SweepJobs:
    """The function that Hydra calls for each job, here or in a worker of a launcher. A failed job raises nothing."""

    sweep: Path
    root: Path  # the folder of outputs/
    swept: tuple[str, ...]  # keys
    main_process: int
    mlflow: bool

    @enduring_output()
    def task(self, composed: DictConfig) -> float | None:
        """Runs one job. Returns its `_objective`, for a sweeper that searches; None if it failed. (NaN would end an
        Optuna search: the sweeper reports a failed trial together with its value, which Optuna refuses.)"""
        from hydra.core.hydra_config import HydraConfig

        settings, records = HydraConfig.get(), Records(self.sweep)
        overrides = tuple(line.removeprefix("++") for line in settings.overrides.task)
        number = int(settings.job.num)
        before = records.read(number)
        if before is None or before.overrides != overrides:
            before = JobRecord(number, overrides, swept_part(overrides, self.swept))
        if before.status == FINISHED:
            return _objective(before, settings.sweeper)
        if records.stop_requests():
            records.write(before)  # so that a job chosen by a search is listed too
            return None
        in_all = max(int(settings.sweeper.get("n_trials") or 0), len(records.read_all()), number + 1)
        say = f"job {number + 1} of {in_all}"
        print(f"{say} starts: {before.title}", flush=True)
        record = JobRecord(number, before.overrides, before.swept)
        try:
            request = self._request(composed, record, before.status in (RUNNING, KILLED), in_all)
            record = run_job_in_process(request, record, records, PRELOADED + MLFLOW_MODULES * self.mlflow)
        except ManualBackpropError as error:  # incompatible values chosen by a search; a full disk
            print(error, file=sys.stderr)
            record = replace(record, status=FAILED, exit_code=error.exit_code, error=str(error))
            records.write(record)
        print(f"{say} {_ending(record)}: {record.title}", flush=True)
        return _objective(record, settings.sweeper)

    def _request(self, composed: DictConfig, record: JobRecord, was_interrupted: bool, in_all: int) -> JobRequest:
        from hydra.core.hydra_config import HydraConfig

        from manual_backprop.checkpoints.checkpoint import CheckpointManager
        from manual_backprop.config.composition import plain
        from manual_backprop.training.resume import job_config
        from manual_backprop.training.value_sources import as_meant, value_sources

        settings: Any = HydraConfig.get()
        outputs, overrides = self.root / "outputs", record.overrides
        mapping = as_meant(plain(composed), overrides, settings.runtime)
        sources = {}
        run = run_of_job(outputs, self.sweep, record.number) if was_interrupted else None
        if run is not None and CheckpointManager(run / "checkpoints").newest_sound() is not None:
            config = job_config(mapping | {"resume": str(run)}, (), outputs)
        else:
            divided = None
            if mapping["device"].get("threads") is None:
                mapping["device"]["threads"] = divided = threads_of_a_job(settings.launcher, in_all)
            given, named = mapping["run_name"], job_name(record.number, record.swept)
            mapping["run_name"] = named or given
            config = job_config(mapping, overrides, outputs)
            sources = dict(value_sources(config, overrides, settings.runtime))
            if config.run_name != given:
                sources["run_name"] = "the sweep"
            if divided is not None:
                sources["device.threads"] = "the sweep, which divides the cores among its jobs"
        at_once = jobs_at_once(settings.launcher, in_all) > 1
        return JobRequest(
            mapping=config.to_dict(),
            root=self.root,
            sweep=self.sweep,
            number=record.number,
            overrides=overrides,
            sources=sources,
            prefix=f"[job {record.number + 1}] " if at_once else "",
            main_process=self.main_process,
            plugins=given_plugins(),
        )


class StopJobs(Interruption):
    """On a signal, asks all jobs, wherever they run, to save and to stop."""

    def __init__(self, records: Records) -> None:
        super().__init__()
        self.records = records

    def _handle(self, number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            self.records.request_stop()
        super()._handle(number, frame)


class Sweep:
    """A sweep: the parent run of several jobs, owned by this process."""

    def __init__(self, directory: RunDirectory, checked: Checked, root: Path):
        self.directory, self.checked, self.root = directory, checked, root
        self.records = Records(directory.path)
        self.outputs = root / "outputs"
        self.table = ""  # of the jobs, after they have ended
        self.config = checked.jobs[0].config  # all jobs have the same tracking and experiment

    @enduring_output()
    def run(self, hydra_call: HydraCall) -> None:
        """Runs all unfinished jobs. Raises CheckFailedError if a job failed, Interrupted after a signal."""
        config, status, broken = self.config, FAILED, None
        name = str(self.directory.read()["run_name"])
        try:
            tracker = open_tracker(config.tracking.name, self.directory, self.outputs, config.experiment_name, name)
        except BaseException:
            self.directory.release()
            raise
        try:
            with run_log(self.directory.log), StopJobs(self.records) as interruption:
                interruption.defer()
                self._announce(tracker)
                self._plan()
                jobs = SweepJobs(
                    self.directory.path, self.root, self.checked.swept, os.getpid(), config.tracking.name == "mlflow"
                )
                if self.checked.searches:
                    _silence_optuna()
                try:
                    # a relative path: Hydra would interpret special characters in the names of the folders above
                    own_folder = os.path.relpath(self.directory.path, self.root)
                    own_folder = own_folder.replace("\\", "\\\\").replace("'", "\\'")
                    hydra_call([*self.checked.overrides, f"hydra.sweep.dir='{own_folder}'"], jobs.task)
                except (Exception, SystemExit, KeyboardInterrupt) as error:
                    broken = error
                    log.exception("The launcher or the sweeper failed.")
                records = self._conclude(tracker)
                unfinished = [record for record in records if record.status != FINISHED]
                if interruption.received is not None:
                    status = KILLED
                elif not unfinished:
                    status, broken = FINISHED, None
        finally:
            try:
                tracker.finish(status)
            finally:
                self.directory.release()
        self._report(records, unfinished, interruption, broken)

    def _announce(self, tracker: Tracker) -> None:
        from manual_backprop.tracking.provenance import commit_tags

        swept = swept_part([line.removeprefix("++") for line in self.checked.overrides], self.checked.swept)
        tracker.log_parameters({"sweep": " ".join(swept)})
        tracker.set_tags({**self.config.tags, **commit_tags(), "run_directory": str(self.directory.path)})
        log.info("%s", self.directory.read()["command"])
        print(f"sweep directory: {os.path.relpath(self.directory.path)}", flush=True)

    def _plan(self) -> None:
        """Writes a record for each job that is known before it starts, and updates those of an interrupted sweep."""
        self.records.clear_stop_requests()
        for record in self.records.read_all():
            self.records.write(current_record(record, self.outputs, self.directory.path))
        if self.checked.searches:
            return  # the jobs of a search are not known before
        for number, job in enumerate(self.checked.jobs):
            known = self.records.read(number)
            if known is None or known.overrides != job.overrides:
                self.records.write(JobRecord(number, job.overrides, swept_part(job.overrides, self.checked.swept)))

    def _conclude(self, tracker: Tracker) -> list[JobRecord]:
        """Writes the table, the pictures and the best job, and logs them with the tracker."""
        from manual_backprop.training.sweeps.pictures import draw_curves, draw_heat_map

        path, title = self.directory.path, str(self.directory.read()["run_name"])
        records = []
        for record in self.records.read_all():
            records.append(now := current_record(record, self.outputs, path))
            if now != record:
                self.records.write(now)
        files = {"table.csv": as_csv(records), "table.md": as_markdown(records)}
        for name, content in files.items():
            with storage_errors(f"write {path / name}"):
                (path / name).write_text(content, encoding="utf-8")
            tracker.log_artifact(path / name)
        for name, draw in (("curves.png", draw_curves), ("heat_map.png", draw_heat_map)):
            if draw(records, path / name, title):
                tracker.log_artifact(path / name)
        self._deliver_the_rest()
        self._mark_the_best(best_of(records))
        counts = {"jobs": len(records), "jobs_finished": sum(record.status == FINISHED for record in records)}
        tracker.set_tags(counts | {"mlflow.note.content": as_markdown(records, directories=False)})
        self.table = "\n".join([as_text(records), *self._compare(tracker, title)])
        log.info("%s", self.table)
        return records

    def _compare(self, tracker: Tracker, title: str) -> list[str]:
        """Draws what ranks the jobs over a swept number, or the differences of curves that should coincide. Returns
        these differences in words."""
        from manual_backprop.training.comparison.picture import adds_to_curves, draw_comparison

        jobs = runs_of_sweep(self.directory.path)
        runs = compare([load_training_log(run) for run in jobs if (run / METRICS).is_file()])
        if adds_to_curves(runs):
            picture = self.directory.path / "comparison.png"
            if draw_comparison(runs, picture, title):
                tracker.log_artifact(picture)
        return ["", *difference_lines([run.log for run in runs])] if should_coincide(runs) else []

    def _deliver_the_rest(self) -> None:
        """Delivers what MLflow did not receive in time from a job: many parallel jobs make it slow."""
        if self.config.tracking.name != "mlflow":
            return
        for run in runs_of_sweep(self.directory.path):
            known = read_run(run).get("mlflow") or {}
            delivered = known.get("delivered") and not known.get("refused")
            if not delivered and not self._deliver(run, {}):
                return  # it is down

    def _mark_the_best(self, best: JobRecord | None) -> None:
        """Sets the tags of the best run and of the parent; removes the tag of a run that was the best before a
        resume."""
        before = self.directory.read().get("best")
        now = None
        if best is not None and best.run_directory is not None:
            now = {"run_id": Path(best.run_directory).name, "directory": best.run_directory}
        self.directory.update(best=now)
        if before is not None and (now is None or before["run_id"] != now["run_id"]):
            self._deliver(self.outputs / RUNS / before["run_id"], {"best": "false"})
        if now is not None:
            self._deliver(Path(now["directory"]), {"best": "true"})

    def _deliver(self, run: Path, tags: Mapping[str, Any]) -> bool:
        """Sets tags of a finished run, and delivers them and everything that MLflow lacks. Returns whether it
        worked."""
        try:
            owned = own_run_directory(run)
        except ManualBackpropError as error:
            log.warning("%s", error)
            return False
        try:
            add_tags(run, tags)
            if self.config.tracking.name == "mlflow":
                from manual_backprop.tracking.mlflow_delivery import MlflowDelivery

                MlflowDelivery(run, self.outputs).deliver(final=True)
        except Exception as error:  # of MLflow, its database or its server
            from manual_backprop.tracking.mlflow_delivery import tracking_uri
            from manual_backprop.tracking.mlflow_messages import one_line

            reason = one_line(error, tracking_uri(self.outputs))
            again = f"python -m manual_backprop.sync {os.path.relpath(self.directory.path)}"
            log.warning("MLflow did not accept %s (%s); deliver it with: %s", run.name, reason, again)
            return False
        finally:
            owned.release()
        return True

    def _report(
        self,
        records: Sequence[JobRecord],
        unfinished: Sequence[JobRecord],
        interruption: Interruption,
        broken: BaseException | None,
    ) -> None:
        """Prints the end of the command: the next commands, or what went wrong."""
        print(f"\n{self.table}\n")
        best, metric = best_of(records), ranking(records)
        if best is not None:
            print(f"best: {best.title}, {best.result(metric)}")
            print(f"ranked by:     {metric.title}, the {'highest' if metric.highest_is_best else 'lowest'} first")
        print(f"table, curves: {os.path.relpath(self.directory.path)}")
        if self.config.tracking.name == "mlflow":
            print(f"compare them:  {next_in_mlflow(self.directory.path, 'as a sweep')}")
        sys.stdout.flush()
        again = f"python -m manual_backprop.run sweep.resume={self.directory.path.name}"
        if interruption.received is not None:
            left = f"{len(unfinished)} of {len(records)} jobs are not finished"
            interruption.raise_if_received(f"{left}; continue with: {again}")
        lines = []
        if broken is not None and not (unfinished and isinstance(broken, ValueError)):
            # Optuna raises ValueError at the end of a search without a successful trial; the list below says more.
            reason = str(broken) if isinstance(broken, ManualBackpropError) else f"{type(broken).__name__}: {broken}"
            lines = [f"the sweep failed: {reason} (traceback: {os.path.relpath(self.directory.log)})"]
        if unfinished:
            waiting = sum(record.status == WAITING for record in unfinished)
            failed = len(unfinished) - waiting
            never = f", {waiting} were not started" * bool(waiting)
            lines += [f"{failed} of {len(records)} jobs failed{never}:", *failures(unfinished)]
        if lines:
            raise CheckFailedError("\n".join([*lines, f"run the unfinished jobs: {again}"]))


def start_sweep(checked: Checked, root: Path, hydra_call: HydraCall, config_folder: str | None) -> None:
    """Starts a new sweep. `config_folder` is the command line's --config-dir."""
    outputs = root / "outputs"
    warnings_to_terminal()
    close_dead_runs(outputs)
    given = None if "run_name" in checked.swept else checked.jobs[0].config.run_name
    name = given or "sweep of " + (", ".join(short_keys(checked.swept).values()) or "one job")
    directory = create_run_directory(outputs, name, origin=Origin(), folder=SWEEPS)
    command = {"overrides": list(checked.overrides), "config_folder": config_folder}
    directory.update(given=command | {"plugins": list(loaded_plugins())}, best=None)
    Sweep(directory, checked, root).run(hydra_call)


def resume_sweep(sweep: Path, checked: Checked, root: Path, hydra_call: HydraCall) -> None:
    """Runs the unfinished jobs of a sweep; `checked` is its original command line (`given_to`)."""
    warnings_to_terminal()
    close_dead_runs(root / "outputs")
    finished = [record for record in Records(sweep).read_all() if record.status == FINISHED]
    _report_other_versions(finished)
    Sweep(open_run_directory(sweep, len(finished)), checked, root).run(hydra_call)


def _report_other_versions(finished: Sequence[JobRecord]) -> None:
    """Warns if finished jobs were run by another version, since the remaining jobs are compared with them."""
    from manual_backprop.tracking.environment import code_version, other_version
    from manual_backprop.tracking.tracker import environment_of_run

    runs = [Path(record.run_directory) for record in finished if record.run_directory is not None]
    versions = [other_version(environment_of_run(run), code_version()) for run in runs if run.is_dir()]
    for version, count in Counter(filter(None, versions)).items():
        log.warning("%d finished jobs were run by another version: %s.", count, version)


def given_to(sweep: Path) -> tuple[list[str], str | None]:
    """The overrides of a sweep's command line, and its --config-dir. Raises InputError."""
    given = read_run(sweep).get("given")
    if not isinstance(given, dict) or not isinstance(given.get("overrides"), list):
        raise InputError(f"{sweep / 'run.json'} does not record the overrides of the sweep: it cannot be resumed")
    if missing := missing_plugins(given.get("plugins")):
        raise InputError(f"{sweep}: {missing[0]}")
    return [str(line) for line in given["overrides"]], given.get("config_folder")


def _silence_optuna() -> None:
    """Hides Optuna's messages about studies and failed trials: the sweep's own lines and table say it better."""
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.ERROR)
    with suppress(ImportError):  # another sweeper
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)


def _ending(record: JobRecord) -> str:
    metric = record.main_metric
    if record.status != FINISHED or record.value(metric) is None:
        return record.status
    speed = f", {record.tokens_per_second:,.0f} tokens a second" if record.tokens_per_second else ""
    return f"{record.status}, {record.result(metric)}{speed}"


def _objective(record: JobRecord, sweeper: Any) -> float | None:
    """The number by which a sweeper searches: the main metric of a finished job. A score, whose highest value is the
    best, is negated, since the sweeper minimizes unless hydra.sweeper.direction=maximize is given."""
    metric = record.main_metric
    value = record.value(metric) if record.status == FINISHED else None
    maximizes = str(sweeper.get("direction")).endswith("maximize")
    return -value if value is not None and metric.highest_is_best and not maximizes else value
