"""Delivery of a run directory to MLflow: idempotent, in batches, from the files in the directory.

`MlflowDelivery(directory, root).deliver()` sends what MLflow does not have yet: parameters, tags, metrics with the
timestamps of metrics.jsonl (a point that is sent twice is stored once), artifacts, checkpoints as hard links, the
status. A run's thread calls it repeatedly (mlflow_tracking.py), `python -m manual_backprop.sync` calls it once.

MLflow's calls may block, retry and raise, so the training loop must not call this module. Importing MLflow takes
seconds and happens in `deliver`. Only MlflowClient is used, since MLflow's fluent functions depend on MLFLOW_RUN_ID and
other variables.
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

from ..checkpoints.checkpoint import CheckpointManager, step_of
from ..common.errors import InputError, ManualBackpropError
from ..common.uris import file_uri, is_inside, path_of, sqlite_database, sqlite_uri, store_uri
from .metrics_file import METRICS, Entry, read_entries
from .mlflow_messages import one_line, refusals, remedies, without_credentials
from .mlflow_model import MODEL_NAME, is_servable, parameters_digest, write_model
from .run_directory import FINISHED, RUNNING, RUNS, SWEEPS, list_runs, own_run_directory, read_run, update_run
from .tracker import DIRECTORY_TAG, STORE, TRACKING_FILE, Tracked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# What log_batch takes -> what a message calls one of them, and MLflow's limit for one call.
BATCHES = {"params": ("parameter", 100), "tags": ("tag", 100), "metrics": ("metric", 1000)}
LONGEST_PARAMETER = 6000
LONGEST_TAG = 5000
LONGEST_DIGEST = 36
MOST_REFUSED = 3  # points of a metric; after that the rest is not sent
BUSY = (429, 503, 504)  # HTTP statuses of a server that may accept the same later
CHANGED_TAG = "changed."
TRAINING_TAG = "mlflow.data.context"
RUN_ID_TAG = "manual_backprop.run_id"
MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # the UI shows runs and charts, not chats
logger = logging.getLogger("manual_backprop.tracking")
# Metrics that always differ when a step is repeated after a resume; these are not sent again.
_TIMING_METRICS = ("tokens_per_second", "peak_share", "system/")


def prepare_environment() -> None:
    """Set shorter timeouts for MLflow, which blocks for minutes on a dead server, and silence it. Variables that the
    user has set stay."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # [s]
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # failures are also raised; we report them in one line
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which may contain credentials
    }.items():
        os.environ.setdefault(name, value)


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db beside the outputs directory `root`, which `mlflow ui` opens by default."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return store_uri(given) if given else sqlite_uri(root.absolute().parent / STORE)


class DeletedRun(Exception):
    """The run was deleted in MLflow during the delivery."""


class MlflowDelivery:
    """The delivery of one run. `last_success` and `working_locally` tell another thread whether to wait for it."""

    def __init__(self, directory: Path, root: Path):
        self.directory = directory
        self.root = root.absolute()
        self.uri = tracking_uri(self.root)
        self.address = without_credentials(self.uri)  # to show and store
        self.last_success = time.monotonic()
        self.working_locally = False  # importing MLflow, waiting for a store or creating it: at most a minute
        self._client: MlflowClient | None = None
        self._run_id = self._experiment = ""
        self.refused: dict[str, str] = {}  # parts that MLflow refuses while it accepts others -> reason
        self._artifacts: Path | None = None  # the artifact folder of a local store
        self._artifacts_stay = False  # in the run directory, since a local store would put them outside of `root`
        self._forget()

    def _forget(self) -> None:
        """Reset what we know about the run in MLflow."""
        self._refused_points: Counter[str] = Counter()  # of each metric
        self._position = 0  # in metrics.jsonl [bytes]
        self._stored: dict[str, dict[int, float]] = {}  # points that MLflow had before this delivery
        self._parameters: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._datasets: set[tuple[str, str]] = set()  # name, digest
        self._tracked_at = 0  # mtime of tracking.json when it was delivered [ns]
        self._files: dict[tuple[str, str], tuple[int, int]] = {}  # artifact -> (mtime, size) as delivered

    def deliver(self, final: bool = False) -> None:
        """Send what is new. `final`: also changed artifacts and the status.

        Raises MLflow's errors if it does not answer. Parts that it refuses are listed in `refused`; the other parts are
        delivered all the same, and the next final delivery tries the refused ones again.
        """
        try:
            self._deliver(final)
        except DeletedRun:
            self._client = None
            self._deliver(final)  # into a new run, or the same one if its experiment can be restored

    def refusal_message(self) -> str:
        """Sentences about the refused parts, the reasons, and what to do; empty if MLflow has everything."""
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
            self._try_to_send("dataset", self._send_datasets, client, tracked.datasets)
        self._send_tags(client, self._parent_and_child_tags())
        self._send_metrics(client)
        run = read_run(self.directory)
        if final and run["status"] != RUNNING:  # before parts that may take long or may be refused
            ended = run["status"], _milliseconds(run["ended_at"])
            self._try_to_send("status", self._call, client.set_terminated, self._run_id, *ended)
        if final or tracked_at != self._tracked_at:
            self._send_artifacts(client, [] if self._artifacts_stay else tracked.artifacts)
            self._tracked_at = tracked_at
        artifacts = "artifacts" not in self.refused and not self._artifacts_stay
        linked = artifacts and self._try_to_send("checkpoints", self._link_checkpoints)
        if final:
            if artifacts and not linked:
                self._try_to_send("checkpoints", self._upload_checkpoints, client)
            if artifacts and run["status"] == FINISHED:
                self._try_to_send("model", self._log_model, client)
            self._record(run["status"], delivered=True)

    def terminate_dead_runs(self) -> None:
        """Set the status in MLflow of runs in this outputs directory whose processes have died."""
        client = self._client or self._open()
        for path in [*list_runs(self.root), *list_runs(self.root, SWEEPS)]:
            run = read_run(path)
            known = run.get("mlflow") or {}
            ended = run["status"] != RUNNING and known.get("status") == RUNNING
            if not ended or known.get("tracking_uri") != self.address:
                continue
            with suppress(ManualBackpropError):  # another process owns it, or the disk is full: try later
                owned = own_run_directory(path)
                try:
                    self._call(client.set_terminated, known["run_id"], run["status"], _milliseconds(run["ended_at"]))
                    owned.update(mlflow={**known, "status": run["status"]})
                except Exception as error:  # the run may be deleted
                    self._raise_unless_refused(error)
                finally:
                    owned.release()

    # Opening

    def _open(self) -> MlflowClient:
        parts = urlsplit(self.uri)
        if parts.scheme in ("http", "https") and parts.query:
            raise InputError(
                f"MLFLOW_TRACKING_URI={self.address} is followed by a ? and a query, which MLflow "
                "does not support; leave it out, and give a token as MLFLOW_TRACKING_TOKEN"
            )
        self._forget()
        self.working_locally = "mlflow" not in sys.modules
        try:
            prepare_environment()
            from mlflow import MlflowClient

            # Needed too if MLflow was imported before. urllib3 warns about every retry.
            for name in ("mlflow", "alembic", "urllib3.connectionpool"):
                logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
            local, database = sqlite_database(self.uri)
            if database is not None:
                database.parent.mkdir(parents=True, exist_ok=True)
            # Processes that create or upgrade a store at the same time crash each other.
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
            self._warn_where_artifacts_stay(self._artifacts.parents[1], tracked.experiment_name)
        self._parameters = dict(run.data.params)
        self._tags = dict(run.data.tags)
        inputs = run.inputs.dataset_inputs if run.inputs else []
        self._datasets = {(one.dataset.name, one.dataset.digest) for one in inputs}
        for name in run.data.metrics:
            points = self._call(client.get_metric_history, self._run_id, name)
            self._stored[name] = {point.step: point.value for point in points}
        self._record(RUNNING, delivered=False)
        self._client = client
        return client

    def _create_store(self, database: Path) -> None:
        """Create an SQLite store, if there is none, under a temporary name and rename it when it is complete.

        MLflow takes seconds to create one; a store that is left incomplete by a kill cannot be opened again.
        """
        for unfinished in database.parent.glob(f"{glob.escape(database.name)}.new-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        if database.exists() and database.stat().st_size:
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        folder = Path(tempfile.mkdtemp(prefix=f"{database.name}.new-", dir=database.parent))
        try:
            # MLflow puts the location of its default experiment into SQL unquoted; a URI contains no quotes.
            SqlAlchemyStore(sqlite_uri(folder / STORE), file_uri(self.root / "artifacts")).engine.dispose()
            (folder / STORE).replace(database)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _experiment_id(self, client: MlflowClient, name: str, local: bool) -> str:
        from mlflow.exceptions import MlflowException

        found = self._call(client.get_experiment_by_name, name)
        if found is None:
            # Without a location MLflow would put artifacts below the working directory; a server has its own location.
            location = file_uri(self.root / "artifacts") if local else None
            try:
                return self._call(client.create_experiment, name, location, MODEL_TRAINING)
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another process has just created it
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            self._call(client.restore_experiment, found.experiment_id)
        return found.experiment_id

    def _warn_where_artifacts_stay(self, location: Path, experiment: str) -> None:
        """Warn that artifacts stay in the run directory, since the experiment's location is outside of `root`. MLflow
        cannot change a location, so the remedy depends on why: the project was moved or copied, or shares a database
        with another one."""
        before = location.parent
        if os.path.lexists(before):
            remedy = f"runs with experiment_name={shlex.quote(f'{experiment}-2')} get a location in {self.root}"
        else:
            link = f"mkdir -p {shlex.quote(str(before.parent))} && ln -s {shlex.quote(str(self.root))} "
            again = f"python -m manual_backprop.sync {shlex.quote(str(self.directory))}"
            remedy = f"if this project was moved from there: {link}{shlex.quote(str(before))} && {again}"
        logger.warning(
            "MLflow's location for artifacts of experiment %s is %s, which is outside of %s. They stay in %s; %s",
            *(experiment, location, self.root, self.directory, remedy),
        )

    def _find_or_create_run(self, client: MlflowClient, experiment_id: str, tracked: Tracked) -> Run:
        """The run that run.json names, or one with our id (if the process was killed before writing that), or a new
        one."""
        from mlflow.exceptions import MlflowException

        record = read_run(self.directory)
        known = record.get("mlflow") or {}
        run = None
        if known.get("tracking_uri") == self.address:
            with suppress(MlflowException):  # permanently deleted, or there is another database at this URI
                run = self._call(client.get_run, known["run_id"])
        if run is None:
            wanted = f"tags.`{RUN_ID_TAG}` = '{self.directory.name}'"
            found = self._call(client.search_runs, [experiment_id], wanted, max_results=1)
            run = found[0] if found else None
        if run is None or run.info.lifecycle_stage != "active":
            tags = {
                RUN_ID_TAG: self.directory.name,
                DIRECTORY_TAG: str(self.directory),
                "mlflow.source.name": record["command"][:LONGEST_TAG],
                "mlflow.source.type": "LOCAL",
            }
            with suppress(OSError, KeyError):  # the user id has no name, as in some containers
                tags["mlflow.user"] = getpass.getuser()
            return self._call(
                client.create_run, experiment_id, _milliseconds(record["created_at"]), tags, tracked.run_name
            )
        if run.info.status != RUNNING and record["status"] == RUNNING:
            self._call(client.update_run, run.info.run_id, RUNNING)
        return run

    def _record(self, status: str, delivered: bool) -> None:
        known = {
            "tracking_uri": self.address,
            "run_id": self._run_id,
            "experiment_id": self._experiment,
            "status": status,
            "delivered": delivered,
        } | ({"refused": self.refused} if self.refused else {})
        update_run(self.directory, lambda run: run.update(mlflow=known))

    # Sending

    def _call(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call MLflow and record the time of its answer."""
        answer = call(*arguments, **named)
        self.last_success = time.monotonic()
        return answer

    def _try_to_send(self, part: str, send: Callable[..., Any], *arguments: Any) -> bool:
        """Send a part of the run and return whether MLflow accepted it; also False if `send` returns False."""
        if part in self.refused:
            return False
        try:
            return send(*arguments) is not False
        except Exception as error:  # MLflow, its server and its artifact store have many kinds of errors
            elsewhere = part.split()[0] in ("artifact", "checkpoints", "model")
            self._raise_unless_refused(error, elsewhere)
            self.refused[part] = one_line(error, self.uri)
            return False

    def _send_each(self, client: MlflowClient, kind: str, entities: Sequence[Any], known: dict[str, str]) -> None:
        """Send entities of a kind in `BATCHES`, in batches; if one is refused, each half of it separately, so that only
        those that MLflow refuses by themselves are left out. The others are added to `known`."""
        name, limit = BATCHES[kind]
        entities = [one for one in entities if self._refused_points[f"{name} {one.key}"] < MOST_REFUSED]
        for first in range(0, len(entities), limit):
            batch = entities[first : first + limit]
            try:
                self._call(client.log_batch, self._run_id, **{kind: batch}, synchronous=True)
                known.update((one.key, one.value) for one in batch)
            except Exception as error:
                self._raise_unless_refused(error)
                if len(batch) == 1:
                    part = f"{name} {batch[0].key}"
                    self._refused_points[part] += 1
                    self.refused[part] = one_line(error, self.uri)
                    continue
                batch.sort(key=lambda one: one.key)
                middle = len(batch) // 2
                self._send_each(client, kind, batch[:middle], known)
                self._send_each(client, kind, batch[middle:], known)

    def _raise_unless_refused(self, error: Exception, elsewhere: bool = False) -> None:
        """Return if MLflow refuses a part: its answer is an error, but it still answers another request. Otherwise it
        is down, slow or busy, and this raises `error`; or DeletedRun. `elsewhere`: the part goes to the artifact store,
        which may be down while the server is not."""
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
            run = self._call(self._client.get_run, self._run_id)
        except Exception:
            raise error from None
        if run.info.lifecycle_stage != "active":
            raise DeletedRun(f"the run {self._run_id} was deleted in MLflow") from error

    def _send_parameters(self, client: MlflowClient, parameters: dict[str, Any]) -> None:
        from mlflow.entities import Param

        values = {name: str(value)[:LONGEST_PARAMETER] for name, value in parameters.items()}
        new = [Param(name, value) for name, value in values.items() if name not in self._parameters]
        self._send_each(client, "params", new, self._parameters)

    def _send_changes(self, client: MlflowClient, changes: dict[str, list[list[Any]]]) -> None:
        """Send parameters that a resume has changed as tags, since MLflow's parameters are immutable."""
        tags = {
            f"{CHANGED_TAG}{name}": ", ".join(f"{value} (from step {step})" for step, value in values)
            for name, values in changes.items()
        }
        self._send_tags(client, tags)
        for name in self._parameters:
            tag = f"{CHANGED_TAG}{name}"
            if tag in self._tags and tag not in tags:  # a resume from an earlier step has undone the change
                self._try_to_send(f"tag {tag}", self._call, client.delete_tag, self._run_id, tag)
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
                self._call(client.log_inputs, self._run_id, datasets=inputs)
            except MlflowException:  # another run has just added the same dataset
                self._call(client.log_inputs, self._run_id, datasets=inputs)
            self._datasets |= {(one.dataset.name, one.dataset.digest) for one in inputs}

    def _send_tags(self, client: MlflowClient, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        values = {name: value[:LONGEST_TAG] for name, value in tags.items()}
        new = [RunTag(name, value) for name, value in values.items() if self._tags.get(name) != value]
        self._send_each(client, "tags", new, self._tags)

    def _parent_and_child_tags(self) -> dict[str, str]:
        """Tags with MLflow's ids that link a sweep and its runs.

        run.json names the other run by its directory (`sweep` of a run, `best` of a sweep), which is in the same
        outputs directory, even if that was moved or copied. Once it has been delivered, its run.json has the id; so
        every delivery looks for it again.
        """
        record, tags = read_run(self.directory), dict[str, str]()
        for tag, key, folder in (("mlflow.parentRunId", "sweep", SWEEPS), ("best_run_id", "best", RUNS)):
            if record.get(key) is None:
                continue
            with suppress(InputError):  # it was removed
                known = read_run(self.root / folder / record[key]["run_id"]).get("mlflow") or {}
                if known.get("run_id") and known.get("tracking_uri") == self.address:
                    tags[tag] = known["run_id"]
        return tags

    def _send_metrics(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        batch: list[Metric] = []
        position = self._position
        for entry in read_entries(self.directory / METRICS, self._position):
            names = self._missing_metrics(entry)
            points = [Metric(name, float(entry.metrics[name]), entry.time_ms, entry.step) for name in names]
            if len(batch) + len(points) > BATCHES["metrics"][1]:
                self._send_each(client, "metrics", batch, {})
                self._position = position
                batch = []
            batch += points
            position = entry.end
        self._send_each(client, "metrics", batch, {})
        self._position = position

    def _missing_metrics(self, entry: Entry) -> list[str]:
        """The metrics of an entry that MLflow lacks: a resumed run repeats steps that were already delivered."""
        return [
            name
            for name, value in entry.metrics.items()
            if entry.step not in self._stored.get(name, ())
            or not (name.startswith(_TIMING_METRICS) or _same(self._stored[name][entry.step], value))
        ]

    def _send_artifacts(self, client: MlflowClient, listed: Sequence[Sequence[str]]) -> None:
        """Send artifacts; if the first two are refused, give up on all."""
        for path, folder in listed:
            if "artifacts" in self.refused:
                return
            part = f"artifact {path}"
            if self._try_to_send(part, self._send_artifact, client, path, folder) or self._files:
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
                self._call(send, self._run_id, str(file), folder or None)
                self._files[path, folder] = state

    # Checkpoints, which the run directory owns

    def _link_checkpoints(self) -> bool:
        """Mirror the run's checkpoints in a local store by hard links; False if that is impossible."""
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
            except FileNotFoundError:  # a newer one has just replaced it
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
        """Log the model, once for the same parameters, even after repeated or killed calls."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        checkpoints = CheckpointManager(self.directory / "checkpoints")
        checkpoint = checkpoints.best() or checkpoints.latest()
        if checkpoint is None or not is_servable(checkpoint):
            return
        tags = {"checkpoint": checkpoint.name, "parameters_digest": parameters_digest(checkpoint)}
        ours = f"name = '{MODEL_NAME}' AND source_run_id = '{self._run_id}'"
        known = self._call(client.search_logged_models, [self._experiment], ours)
        model = next((one for one in known if tags.items() <= one.tags.items()), None)
        if model is None:
            model = self._call(client.create_logged_model, self._experiment, MODEL_NAME, self._run_id, tags)
        if model.status == LoggedModelStatus.READY:
            return
        local = path_of(model.artifact_location)
        folder = local or self.directory / ".model"
        write_model(folder, checkpoint, self._run_id, model.model_id)
        if local is None:
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                inside = file.parent.relative_to(folder).as_posix().removeprefix(".")
                self._call(client.log_model_artifact, model.model_id, str(file), inside or None)
            shutil.rmtree(folder)
        outputs = self._call(client.get_run, self._run_id).outputs
        if model.model_id not in {one.model_id for one in (outputs.model_outputs if outputs else ())}:
            self._call(client.log_outputs, self._run_id, [LoggedModelOutput(model.model_id, step_of(checkpoint))])
        self._call(client.finalize_logged_model, model.model_id, LoggedModelStatus.READY)


def _same(stored: float, value: float) -> bool:
    if math.isinf(value):  # MLflow stores the largest float instead
        return abs(stored) >= sys.float_info.max and (stored > 0) == (value > 0)
    return stored == value or (math.isnan(stored) and math.isnan(value))


def _same_files(one: Path, other: Path) -> bool:
    with suppress(FileNotFoundError):
        first, second = ({file.name: file.stat().st_ino for file in path.iterdir()} for path in (one, other))
        return first == second
    return False


def _milliseconds(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1000)
