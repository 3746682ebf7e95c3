"""Delivering a run's directory to MLflow: idempotent, in batches, from what is written there.

`MlflowDelivery(directory, root).deliver()` sends what MLflow does not have yet: parameters, tags, metrics with the
JSONL's own timestamps (the same point sent twice is stored once), artifacts, checkpoints as hard links, the status.
The feeder thread of a run calls it again and again (mlflow_tracking.py), `python -m manual_backprop.sync` calls it
once.

It waits, retries and raises as MLflow does: nothing here may be called by the training loop. Importing MLflow takes
seconds and happens in `deliver`. Only MlflowClient is used: the fluent functions obey MLFLOW_RUN_ID and other
variables.
"""

from __future__ import annotations

import getpass
import glob
import json
import logging
import math
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from manual_backprop.checkpoints.checkpoint import CheckpointManager, step_of
from manual_backprop.common.errors import InputError, ManualBackpropError
from manual_backprop.common.uris import (
    file_uri,
    is_inside,
    path_of,
    sqlite_database,
    sqlite_uri,
    store_uri,
)
from manual_backprop.tracking.metrics_file import METRICS, Entry, read_entries
from manual_backprop.tracking.mlflow_messages import one_line, refusals, remedies, without_credentials
from manual_backprop.tracking.mlflow_model import MODEL_NAME, is_servable, parameters_digest, write_model
from manual_backprop.tracking.parent_runs import parent_and_child_tags
from manual_backprop.tracking.run_directory import (
    FINISHED,
    RUNNING,
    SWEEPS,
    list_runs,
    own_run_directory,
    read_run,
    update_run,
)
from manual_backprop.tracking.tracker import DIRECTORY_TAG, STORE, TRACKING_FILE, Tracked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

METRICS_IN_BATCH = 1000  # MLflow's limits for one log_batch
PARAMETERS_IN_BATCH = 100
TAGS_IN_BATCH = 100
LONGEST_PARAMETER = 6000
LONGEST_TAG = 5000
LONGEST_DIGEST = 36
MOST_REFUSED = 3  # points of a metric; the rest of it is not sent then
BUSY = (429, 503, 504)  # answers of a server that will take the same later
CHANGED_TAG = "changed."
TRAINING_TAG = "mlflow.data.context"
RUN_ID_TAG = "manual_backprop.run_id"
MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # the UI shows runs and charts, not chats
logger = logging.getLogger("manual_backprop.tracking")
# Measured anew when a step is repeated after a resume; every other metric of a repeated step is the same or news.
_OF_THE_CLOCK = ("tokens_per_second", "peak_share", "system/")


def prepare_environment() -> None:
    """Bound MLflow's patience (it blocks for minutes on a dead server) and keep it silent, unless the user chose."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # [s]
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # failures are raised as well; we report them, in one line
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the credentials that are in it
    }.items():
        os.environ.setdefault(name, value)


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db beside the outputs directory `root`: where a bare `mlflow ui` looks."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return store_uri(given) if given else sqlite_uri(root.absolute().parent / STORE)


class DeletedRun(Exception):
    """The run was deleted in MLflow while it was delivered."""


class MlflowDelivery:
    """One run's way to MLflow. `last_success` and `working_locally` tell another thread whether to wait for it."""

    def __init__(self, directory: Path, root: Path):
        self.directory = directory
        self.root = root.absolute()
        self.uri = tracking_uri(self.root)
        self.last_success = time.monotonic()
        self.working_locally = False  # importing MLflow, waiting for a store or creating it: a minute at most
        self._client: MlflowClient | None = None
        self._run_id = self._experiment = ""
        self.refused: dict[str, str] = {}  # parts that MLflow does not take, while it takes others, and why
        self._artifacts: Path | None = None  # of a local store
        self._artifacts_stay = False  # in the run's directory: a local store wants them outside of `root`
        self._forget()

    def _forget(self) -> None:
        """What MLflow has of the run."""
        self._refused_points: Counter[str] = Counter()  # of each metric
        self._position = 0  # in metrics.jsonl [bytes]
        self._stored: dict[str, dict[int, float]] = {}  # points that MLflow had before we came
        self._parameters: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._datasets: set[tuple[str, str]] = set()  # name, digest
        self._tracked_at = 0  # mtime of tracking.json when it was delivered [ns]
        self._files: dict[tuple[str, str], tuple[int, int]] = {}  # artifact -> (mtime, size) as delivered

    def deliver(self, final: bool = False) -> None:
        """Send what is new. `final`: artifacts that changed, and the status too.

        Raises MLflow's errors where it does not answer. What it refuses is in `refused`, once for each part, and keeps
        nothing else from being delivered; the next final delivery tries these parts again.
        """
        try:
            self._deliver(final)
        except DeletedRun:
            self._client = None
            self._deliver(final)  # into another one, or the same where its experiment can be restored

    def what_is_refused(self) -> str:
        """Sentences: which parts, why, and what can be done. Empty where MLflow has everything."""
        if not self.refused:
            return ""
        again = f"Then deliver the rest with: python -m manual_backprop.sync {shlex.quote(str(self.directory))}"
        return " ".join(filter(None, (f"It refuses {refusals(self.refused)}.", remedies(self.refused), again)))

    def _deliver(self, final: bool) -> None:
        client = self._client or self._open()
        if final:
            self.refused = {part: reason for part, reason in self.refused.items() if part.startswith("metric ")}
        tracked_at = (self.directory / TRACKING_FILE).stat().st_mtime_ns
        if final or tracked_at != self._tracked_at:
            tracked = Tracked.read(self.directory)
            self._send_parameters(client, tracked.parameters)
            self._send_tags(client, {**tracked.tags, DIRECTORY_TAG: str(self.directory)})
            self._send_changes(client, tracked.changes)
            self._tolerating("dataset", self._send_datasets, client, tracked.datasets)
        self._send_tags(
            client, parent_and_child_tags(read_run(self.directory), without_credentials(self.uri), self.root)
        )
        self._send_metrics(client)
        run = read_run(self.directory)
        if final and run["status"] != RUNNING:  # before what may take long, or may not be taken
            ended = run["status"], _milliseconds(run["ended_at"])
            self._tolerating("status", self._done, client.set_terminated, self._run_id, *ended)
        if final or tracked_at != self._tracked_at:
            self._send_artifacts(client, [] if self._artifacts_stay else tracked.artifacts)
            self._tracked_at = tracked_at
        artifacts = "artifacts" not in self.refused and not self._artifacts_stay
        linked = artifacts and self._tolerating("checkpoints", self._link_checkpoints)
        if final:
            if artifacts and not linked:
                self._tolerating("checkpoints", self._upload_checkpoints, client)
            if artifacts and run["status"] == FINISHED:
                self._tolerating("model", self._log_model, client)
            self._record(run["status"], delivered=True)

    def terminate_dead_runs(self) -> None:
        """Tell MLflow about runs of this outputs directory that ended while nobody could."""
        client = self._client or self._open()
        for path in [*list_runs(self.root), *list_runs(self.root, SWEEPS)]:
            run = read_run(path)
            known = run.get("mlflow") or {}
            if run["status"] == RUNNING or known.get("status") != RUNNING:
                continue
            if known.get("tracking_uri") != without_credentials(self.uri):
                continue
            with suppress(ManualBackpropError):  # somebody owns it again, or its disk is full: another time
                owned = own_run_directory(path)
                try:
                    self._done(client.set_terminated, known["run_id"], run["status"], _milliseconds(run["ended_at"]))
                    owned.update(mlflow={**known, "status": run["status"]})
                except Exception as error:  # it was deleted, perhaps
                    self._raise_unless_refused(error)
                finally:
                    owned.release()

    # Opening

    def _open(self) -> MlflowClient:
        parts = urlsplit(self.uri)
        if parts.scheme in ("http", "https") and parts.query:
            raise InputError(
                f"MLFLOW_TRACKING_URI={without_credentials(self.uri)} is followed by a ?, after which MLflow looks for "
                "no server; leave that out, and give a token as MLFLOW_TRACKING_TOKEN"
            )
        self._forget()
        self.working_locally = "mlflow" not in sys.modules
        try:
            prepare_environment()
            from mlflow import MlflowClient

            # Also where somebody imported MLflow before us. urllib3 warns of every attempt that it repeats.
            for name in ("mlflow", "alembic", "urllib3.connectionpool"):
                logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
            local, database = sqlite_database(self.uri)
            if database is not None:
                database.parent.mkdir(parents=True, exist_ok=True)
            # Processes that create a store together, or bring an older one up to date, crash each other.
            self.working_locally = database is not None
            with FileLock(f"{database}.lock", timeout=60) if database else nullcontext():
                if database is not None and not database.is_symlink():
                    self._create_store(database)
                self.working_locally = False
                self.last_success = time.monotonic()
                client = MlflowClient(tracking_uri=self.uri)
                tracked = Tracked.read(self.directory)
                experiment_id = self._experiment_id(client, tracked.experiment_name, local)
        finally:
            self.working_locally = False
        run = self._find_or_create_run(client, experiment_id, tracked)
        self._run_id, self._experiment = run.info.run_id, run.info.experiment_id
        self._artifacts = path_of(run.info.artifact_uri)
        self._artifacts_stay = self._artifacts is not None and not is_inside(self._artifacts, self.root)
        if self._artifacts is not None and self._artifacts_stay:
            self._tell_where_artifacts_stay(self._artifacts.parents[1], tracked.experiment_name)
        self._parameters = dict(run.data.params)
        self._tags = dict(run.data.tags)
        inputs = run.inputs.dataset_inputs if run.inputs else []
        self._datasets = {(one.dataset.name, one.dataset.digest) for one in inputs}
        for name in run.data.metrics:
            points = self._done(client.get_metric_history, self._run_id, name)
            self._stored[name] = {point.step: point.value for point in points}
        self._record(RUNNING, delivered=False)
        self._client = client
        return client

    def _create_store(self, database: Path) -> None:
        """Where there is none: a sqlite store that is complete before it has its name.

        MLflow takes seconds to make one where it shall lie, and what it leaves there when it is killed cannot be opened
        again.
        """
        for unfinished in database.parent.glob(f"{glob.escape(database.name)}.new-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        if database.exists() and database.stat().st_size:
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        folder = Path(tempfile.mkdtemp(prefix=f"{database.name}.new-", dir=database.parent))
        try:
            # The place of its default experiment goes into a line of SQL as it is: a URI has no quotes.
            SqlAlchemyStore(sqlite_uri(folder / STORE), file_uri(self.root / "artifacts")).engine.dispose()
            (folder / STORE).replace(database)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _experiment_id(self, client: MlflowClient, name: str, local: bool) -> str:
        from mlflow.exceptions import MlflowException

        found = self._done(client.get_experiment_by_name, name)
        if found is None:
            # Without a location MLflow would put artifacts under whatever directory is current; a server has its own.
            location = file_uri(self.root / "artifacts") if local else None
            try:
                return self._done(client.create_experiment, name, location, MODEL_TRAINING)
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            self._done(client.restore_experiment, found.experiment_id)
        return found.experiment_id

    def _tell_where_artifacts_stay(self, location: Path, experiment: str) -> None:
        """MLflow cannot give an experiment another location. Nothing is written outside of `root`, so where the project
        was moved or copied, or shares a database with another, the location says what helps."""
        before = location.parent
        if os.path.lexists(before):
            remedy = f"runs that are given experiment_name={shlex.quote(f'{experiment}-2')} get a place in {self.root}"
        else:
            link = f"mkdir -p {shlex.quote(str(before.parent))} && ln -s {shlex.quote(str(self.root))} "
            again = f"python -m manual_backprop.sync {shlex.quote(str(self.directory))}"
            remedy = f"if this project was moved from there: {link}{shlex.quote(str(before))} && {again}"
        logger.warning(
            "MLflow wants the artifacts of experiment %s in %s, which is outside of %s. They stay in %s; %s",
            *(experiment, location, self.root, self.directory, remedy),
        )

    def _find_or_create_run(self, client: MlflowClient, experiment_id: str, tracked: Tracked) -> Run:
        """The run that run.json remembers, or one with our id (killed before it was remembered), or a new one."""
        from mlflow.exceptions import MlflowException

        record = read_run(self.directory)
        known = record.get("mlflow") or {}
        run = None
        if known.get("tracking_uri") == without_credentials(self.uri):
            with suppress(MlflowException):  # deleted for good, or another database in the same place
                run = self._done(client.get_run, known["run_id"])
        if run is None:
            wanted = f"tags.`{RUN_ID_TAG}` = '{self.directory.name}'"
            found = self._done(client.search_runs, [experiment_id], wanted, max_results=1)
            run = found[0] if found else None
        if run is None or run.info.lifecycle_stage != "active":
            tags = {
                RUN_ID_TAG: self.directory.name,
                DIRECTORY_TAG: str(self.directory),
                "mlflow.source.name": record["command"][:LONGEST_TAG],
                "mlflow.source.type": "LOCAL",
            }
            with suppress(OSError, KeyError):  # no name for this user id, as in some containers
                tags["mlflow.user"] = getpass.getuser()
            return self._done(
                client.create_run, experiment_id, _milliseconds(record["created_at"]), tags, tracked.run_name
            )
        if run.info.status != RUNNING and record["status"] == RUNNING:
            self._done(client.update_run, run.info.run_id, RUNNING)
        return run

    def _record(self, status: str, delivered: bool) -> None:
        known = {
            "tracking_uri": without_credentials(self.uri),
            "run_id": self._run_id,
            "experiment_id": self._experiment,
            "status": status,
            "delivered": delivered,
        } | ({"refused": self.refused} if self.refused else {})
        update_run(self.directory, lambda run: run.update(mlflow=known))

    # Sending

    def _done(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call MLflow, and remember when it last answered."""
        answer = call(*arguments, **named)
        self.last_success = time.monotonic()
        return answer

    def _tolerating(self, part: str, send: Callable[..., Any], *arguments: Any) -> bool:
        """Send a part of the run; whether MLflow took it. False where `send` returns False, too."""
        if part in self.refused:
            return False
        try:
            return send(*arguments) is not False
        except Exception as error:  # whatever MLflow, its server or the place of its artifacts raise
            elsewhere = part.split()[0] in ("artifact", "checkpoints", "model")
            self._raise_unless_refused(error, elsewhere)
            self.refused[part] = one_line(error, self.uri)
            return False

    def _send_each(self, kind: str, entities: Sequence[Any], send: Callable[[Sequence[Any]], None]) -> None:
        """Send what has a `key` and a `value`: all at once, and where that is refused one half after the other, so that
        only what MLflow refuses by itself is left out."""
        entities = [one for one in entities if self._refused_points[f"{kind} {one.key}"] < MOST_REFUSED]
        if not entities:
            return
        try:
            send(entities)
        except Exception as error:
            self._raise_unless_refused(error)
            if len(entities) == 1:
                part = f"{kind} {entities[0].key}"
                self._refused_points[part] += 1
                self.refused[part] = one_line(error, self.uri)
                return
            entities = sorted(entities, key=lambda one: one.key)
            middle = len(entities) // 2
            self._send_each(kind, entities[:middle], send)
            self._send_each(kind, entities[middle:], send)

    def _raise_unless_refused(self, error: Exception, elsewhere: bool = False) -> None:
        """MLflow refuses what it answered with an error, while it answers another question. Raises `error` where it is
        down, slow or busy, and DeletedRun. `elsewhere`: artifacts, whose place may be down by itself."""
        from mlflow.exceptions import MlflowException

        if isinstance(error, ManualBackpropError) or (not elsewhere and not isinstance(error, MlflowException)):
            raise error
        causes: list[BaseException | None] = [error]
        while (last := causes[-1]) is not None:
            causes.append(last.__cause__ or last.__context__)
        down = any(isinstance(cause, ConnectionError | TimeoutError | socket.gaierror) for cause in causes)
        busy = isinstance(error, MlflowException) and error.get_http_status_code() in BUSY
        if (down or busy) and not elsewhere:
            raise error
        assert self._client is not None
        try:
            run = self._done(self._client.get_run, self._run_id)
        except Exception:
            raise error from None
        if run.info.lifecycle_stage != "active":
            raise DeletedRun(f"the run {self._run_id} was deleted in MLflow") from error

    def _send_parameters(self, client: MlflowClient, parameters: dict[str, Any]) -> None:
        from mlflow.entities import Param

        values = {name: str(value)[:LONGEST_PARAMETER] for name, value in parameters.items()}
        new = [Param(name, value) for name, value in values.items() if name not in self._parameters]

        def send(batch: Sequence[Param]) -> None:
            self._done(client.log_batch, self._run_id, params=batch, synchronous=True)
            self._parameters |= {parameter.key: parameter.value for parameter in batch}

        for first in range(0, len(new), PARAMETERS_IN_BATCH):
            self._send_each("parameter", new[first : first + PARAMETERS_IN_BATCH], send)

    def _send_changes(self, client: MlflowClient, changes: dict[str, list[list[Any]]]) -> None:
        """MLflow's parameters are immutable: a resume with another learning rate shows in a tag."""
        tags = {
            f"{CHANGED_TAG}{name}": ", ".join(f"{value} (from step {step})" for step, value in values)
            for name, values in changes.items()
        }
        self._send_tags(client, tags)
        for name in self._parameters:
            tag = f"{CHANGED_TAG}{name}"
            if tag in self._tags and tag not in tags:  # a resume from an earlier step undid it
                self._tolerating(f"tag {tag}", self._done, client.delete_tag, self._run_id, tag)
                del self._tags[tag]

    def _send_datasets(self, client: MlflowClient, datasets: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        inputs = []
        for one in datasets:
            key = one["name"], one["digest"][:LONGEST_DIGEST]
            if key not in self._datasets:
                schema = {"mlflow_colspec": [{"name": "text", "type": "string", "required": True}]}
                texts = [json.dumps(content) for content in (one["source"], schema, one["profile"])]
                tags = [InputTag(name, value) for name, value in ({TRAINING_TAG: "training"} | one["tags"]).items()]
                inputs.append(DatasetInput(Dataset(*key, one["source_type"], *texts), tags))
        if inputs:
            try:
                self._done(client.log_inputs, self._run_id, datasets=inputs)
            except MlflowException:  # another run has just entered the same dataset, which both found missing
                self._done(client.log_inputs, self._run_id, datasets=inputs)
            self._datasets |= {(one.dataset.name, one.dataset.digest) for one in inputs}

    def _send_tags(self, client: MlflowClient, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        values = {name: value[:LONGEST_TAG] for name, value in tags.items()}
        new = [RunTag(name, value) for name, value in values.items() if self._tags.get(name) != value]

        def send(batch: Sequence[RunTag]) -> None:
            self._done(client.log_batch, self._run_id, tags=batch, synchronous=True)
            self._tags |= {tag.key: tag.value for tag in batch}

        for first in range(0, len(new), TAGS_IN_BATCH):
            self._send_each("tag", new[first : first + TAGS_IN_BATCH], send)

    def _send_metrics(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        def send(batch: Sequence[Metric]) -> None:
            self._done(client.log_batch, self._run_id, metrics=batch, synchronous=True)

        batch: list[Metric] = []
        position = self._position
        for entry in read_entries(self.directory / METRICS, self._position):
            points = [Metric(name, float(entry.metrics[name]), entry.time_ms, entry.step) for name in self._news(entry)]
            if len(batch) + len(points) > METRICS_IN_BATCH:
                self._send_each("metric", batch, send)
                self._position = position
                batch = []
            batch += points
            position = entry.end
        self._send_each("metric", batch, send)
        self._position = position

    def _news(self, entry: Entry) -> list[str]:
        """What MLflow lacks of an entry: a resumed run repeats steps that were delivered before it was killed."""
        return [
            name
            for name, value in entry.metrics.items()
            if entry.step not in self._stored.get(name, ())
            or not (name.startswith(_OF_THE_CLOCK) or _same(self._stored[name][entry.step], value))
        ]

    def _send_artifacts(self, client: MlflowClient, listed: Sequence[Sequence[str]]) -> None:
        """Where the first two are refused, so are all."""
        for path, folder in listed:
            if "artifacts" in self.refused:
                return
            part = f"artifact {path}"
            if self._tolerating(part, self._send_artifact, client, path, folder) or self._files:
                continue
            refused = [one for one in self.refused if one.startswith("artifact ")]
            if len(refused) > 1:
                reasons = [self.refused.pop(one) for one in refused]
                self.refused["artifacts"] = reasons[0]

    def _send_artifact(self, client: MlflowClient, path: str, folder: str) -> None:
        file = self.directory / path
        with suppress(FileNotFoundError):  # listed before it is written, or removed by the user
            state = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._files.get((path, folder)) != state:
                send = client.log_artifacts if file.is_dir() else client.log_artifact
                self._done(send, self._run_id, str(file), folder or None)
                self._files[path, folder] = state

    # Checkpoints: the run directory owns them

    def _link_checkpoints(self) -> bool:
        """Make a local store's `checkpoints` the same as the run's, by hard links; False where that is impossible."""
        if self._artifacts is None:
            return False
        wanted = {path.name: path for path in CheckpointManager(self.directory / "checkpoints").list()}
        target = self._artifacts / "checkpoints"
        present = {path.name for path in target.iterdir()} if target.is_dir() else set()
        for name in present - set(wanted):
            shutil.rmtree(target / name, ignore_errors=True)
        for name, source in wanted.items():
            if name in present and _same_files(source, target / name):
                continue
            shutil.rmtree(target / name, ignore_errors=True)
            (target / name).mkdir(parents=True)
            try:
                for file in source.iterdir():
                    os.link(file, target / name / file.name)
            except FileNotFoundError:  # it has just been replaced by a newer one
                shutil.rmtree(target / name, ignore_errors=True)
            except OSError:  # another file system, or one without links
                shutil.rmtree(target / name, ignore_errors=True)
                self._artifacts = None
                return False
        return True

    def _upload_checkpoints(self, client: MlflowClient) -> None:
        checkpoints = CheckpointManager(self.directory / "checkpoints")
        for path in {path for path in (checkpoints.best(), checkpoints.latest()) if path}:
            for file in sorted(path.iterdir()):
                self._send_artifact(client, str(file.relative_to(self.directory)), f"checkpoints/{path.name}")

    # The model: the best checkpoint of a finished run, for mlflow.pyfunc.load_model("runs:/RUN_ID/model")

    def _log_model(self, client: MlflowClient) -> None:
        """Once for the same parameters, however often this is called or killed in the middle."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        checkpoints = CheckpointManager(self.directory / "checkpoints")
        checkpoint = checkpoints.best() or checkpoints.latest()
        if checkpoint is None or not is_servable(checkpoint):
            return
        tags = {"checkpoint": checkpoint.name, "parameters_digest": parameters_digest(checkpoint)}
        ours = f"name = '{MODEL_NAME}' AND source_run_id = '{self._run_id}'"
        known = self._done(client.search_logged_models, [self._experiment], ours)
        model = next((one for one in known if tags.items() <= one.tags.items()), None)
        if model is None:
            model = self._done(client.create_logged_model, self._experiment, MODEL_NAME, self._run_id, tags)
        if model.status == LoggedModelStatus.READY:
            return
        local = path_of(model.artifact_location)
        folder = local or self.directory / ".model"
        write_model(folder, checkpoint, self._run_id, model.model_id)
        if local is None:
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                inside = file.parent.relative_to(folder).as_posix().removeprefix(".")
                self._done(client.log_model_artifact, model.model_id, str(file), inside or None)
            shutil.rmtree(folder)
        outputs = self._done(client.get_run, self._run_id).outputs
        if model.model_id not in {one.model_id for one in (outputs.model_outputs if outputs else ())}:
            self._done(client.log_outputs, self._run_id, [LoggedModelOutput(model.model_id, step_of(checkpoint))])
        self._done(client.finalize_logged_model, model.model_id, LoggedModelStatus.READY)


def _same(stored: float, value: float) -> bool:
    if math.isinf(value):  # MLflow stores the largest float instead
        return abs(stored) >= sys.float_info.max and (stored > 0) == (value > 0)
    return stored == value or (math.isnan(stored) and math.isnan(value))


def _same_files(one: Path, other: Path) -> bool:
    def names(path: Path) -> dict[str, int]:
        return {file.name: file.stat().st_ino for file in path.iterdir()}

    try:
        return names(one) == names(other)
    except FileNotFoundError:
        return False


def _milliseconds(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1000)
