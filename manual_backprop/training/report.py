"""Reports a run: on the terminal, in run.log, in metrics.jsonl and in MLflow."""

from __future__ import annotations

import logging
import math
import os
import platform
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..common.allocator import memory_below_peak, trim_freed_memory
from ..common.durable_files import storage_errors
from ..common.errors import StorageError
from ..common.origin import SEPARATOR, SOURCES
from ..common.plain_text import visible
from ..config.plugins import given_plugins
from ..models.flops import flops_per_token
from ..study.gradient_check.run_check import GRADIENT_CHECK, check_of_run
from ..tasks import Evaluated, Final
from ..tracking import FAILED, Dataset, RunDirectory, SystemMetrics, Tracker, flatten, load_training_log
from ..tracking.late_delivery import next_in_mlflow
from ..tracking.progress import ProgressLine
from ..tracking.provenance import commit_tags, write_provenance
from .inspection.inspector import BASELINE_NOTE
from .inspection.pictures import draw_inspection
from .run_state import RunFacts
from .training_progress import draw_training_progress

TRAINING_PROGRESS = "training_progress.png"
# Keys that affect no result. They are left out, so that compared runs differ only in what was varied.
NO_PARAMETERS = ("run_name", "experiment_name", "tags", "resume", "plan", "plugins", "sweep", "tracking")
INSPECTION = "inspection"  # the folder of its pictures

log = logging.getLogger(__name__)


class RunReport:
    """Reports one run. Nothing here changes the training."""

    def __init__(self, facts: RunFacts, directory: RunDirectory, tracker: Tracker):
        self.facts, self.directory, self.tracker = facts, directory, tracker
        network, order = facts.model.network, facts.order
        self.progress = ProgressLine(facts.first_step, facts.max_steps)
        self.system = SystemMetrics(gpu=network.device.type == "cuda")
        self.flops_per_token = flops_per_token(network.config, facts.config.model.max_seq_len)
        self.steps_per_epoch, self.train_loss = order.steps(1), math.nan
        self._unprinted: list[Callable[[], None]] = []  # logged, but not yet printed
        self.reported = facts.first_step, order.tokens_before(facts.first_step)  # steps, and tokens in them

    def start(self) -> None:
        """Logs parameters and tags, and prints the run in five lines."""
        facts, config, task, order = self.facts, self.facts.config, self.facts.task, self.facts.order
        network, parameters = facts.model.network, facts.model.count_parameters()
        settings = {key: value for key, value in config.to_dict().items() if key not in NO_PARAMETERS}
        self.tracker.log_parameters(flatten(settings) | {"parameters": parameters})
        self.tracker.set_tags(
            {
                **config.tags,
                **commit_tags(),
                "device": str(network.device),
                **task.digests,
                "run_directory": str(self.directory.path),
            }
        )
        self.tracker.log_dataset(self._dataset())
        written = write_provenance(self.directory.path, facts.first_step)
        for file in (*(self.directory.path / name for name in ("config.yaml", SOURCES, *task.files)), *written):
            if file.is_file():  # a run started from Python has no command line
                self.tracker.log_artifact(file)
        epochs = facts.max_steps / order.steps(1)
        resumed = f", resumed after step {facts.first_step}" if facts.first_step else ""
        self.say(
            f"{type(network).__name__}: {parameters:,} parameters, {config.architecture.name}, "
            f"{config.precision.name} on {network.device}, {torch.get_num_threads()} threads"
        )
        self.say(task.about)
        self.say(f"{facts.max_steps} steps of {order.tokens_per_step:,} tokens = {epochs:.1f} epochs{resumed}")
        if task.baselines:
            self.say(task.baselines)
        for note in (*task.notes, *order.notes):
            self.say(note)
        if config.training.inspect_every is not None and config.implementation.name == "baseline":
            self.say(BASELINE_NOTE)
        self.say(f"run directory: {self.directory.path}")

    def step(
        self,
        loss: float,
        learning_rate: float,
        gradient_norm: float,
        seconds_per_step: float,
        nonfinite_steps: int,
        unsmoothed: float | None = None,
    ) -> None:
        """Logs the last step; `print_pending` prints it. `seconds_per_step` is the mean since the last report,
        `nonfinite_steps` the total."""
        step = self.facts.model.step
        tokens_seen = self.facts.order.tokens_before(step)
        tokens_per_step = (tokens_seen - self.reported[1]) / (step - self.reported[0])
        self.reported = step, tokens_seen
        self.train_loss = loss
        tokens_per_second = tokens_per_step / seconds_per_step
        self.tracker.log(
            step,
            {
                "train/loss": loss,
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                "tokens_seen": tokens_seen,
                "flops": tokens_seen * self.flops_per_token,
                "tokens_per_second": tokens_per_second,
                "peak_share": tokens_per_second * self.flops_per_token / self.facts.peak_rate,
                "nonfinite_steps": nonfinite_steps,
                "epoch": step / self.steps_per_epoch,
                **({} if unsmoothed is None else {"train/unsmoothed_loss": unsmoothed}),
                **self.system.sample(),
            },
        )
        shown = step, loss, learning_rate, gradient_norm, tokens_per_second
        self._unprinted.append(partial(self.progress.update, *shown))

    def evaluation(self, evaluated: Evaluated) -> None:
        step = self.facts.model.step
        self.tracker.log(step, evaluated.metrics)
        epoch, epochs = (math.ceil(steps / self.steps_per_epoch) for steps in (step, self.facts.max_steps))
        losses = {"train loss": self.train_loss, "validation loss": evaluated.metrics.get("validation/loss", math.nan)}
        values = [f"{name} {value:.4f}" for name, value in losses.items() if not math.isnan(value)]
        line = " | ".join((f"epoch {epoch}/{epochs}", *values, *filter(None, [evaluated.short])))
        self._unprinted += [partial(self.say, line), partial(log.info, "step %d: %s", step, evaluated.sentence)]

    def print_pending(self) -> None:
        """Prints the steps and evaluations since the last call. Called after a save, so that a blocked terminal delays
        no checkpoint."""
        pending, self._unprinted = self._unprinted, []
        for show in pending:
            show()

    def final(self, final: Final) -> None:
        """Logs what the task adds at the end of a run."""
        if final.metrics:
            self.tracker.log(self.facts.model.step, final.metrics)
        for picture in final.pictures:
            self.tracker.log_artifact(picture)

    def samples(self, texts: Sequence[str]) -> None:
        """Writes the samples of this step, and the picture of the run so far."""
        path = self.directory.samples / f"step-{self.facts.model.step:06d}.txt"
        with storage_errors(f"write {path}"):
            path.write_text(SEPARATOR.join(texts) + "\n", encoding="utf-8")
        self.tracker.log_artifact(path, "samples")
        path_of_picture = self.directory.path / TRAINING_PROGRESS
        title = f"{self.directory.read()['run_name']}: {self.facts.model.count_parameters():,} parameters"
        if draw_training_progress(load_training_log(self.directory.path), path_of_picture, title):
            self.tracker.log_artifact(path_of_picture)
        for text in texts[:1]:
            self.say("  " + visible(self.facts.task.in_one_line(text))[:110])

    def gradient_check(self) -> None:
        """Checks at the end of a run the gradients of a small network like the run's. It changes nothing in the run,
        and does not raise its peak of memory. If the memory of a GPU does not suffice, the check is skipped."""
        trim_freed_memory()
        network = self.facts.model.network
        limit = memory_below_peak() if network.device.type == "cpu" else None
        check = check_of_run(self.facts.config, network.config, limit)
        path = self.directory.path / GRADIENT_CHECK
        with storage_errors(f"write {path}"):
            path.write_text(check.page, encoding="utf-8")
        self.tracker.log_artifact(path)
        self.tracker.set_tags({"gradient_check": check.status})
        self.say(check.line)
        if check.status == "failed":
            log.warning("%s See %s.", check.line, path)

    def inspection(self, whole: bool) -> None:
        """Draws the pictures of `training.inspect_every` at the end of a run.

        `whole`: also those of the final network, whose gradients are no longer needed. Errors are only logged.
        """
        facts, folder = self.facts, self.directory.path / INSPECTION
        if facts.config.training.inspect_every is None:
            return
        try:
            title = f"{self.directory.read()['run_name']}, step {facts.model.step}"
            network = facts.model.network if whole else None
            for path in draw_inspection(load_training_log(self.directory.path), folder, title, network, facts.task):
                self.tracker.log_artifact(path, INSPECTION)
        except Exception as error:  # a failed picture must not fail the run
            log.warning("The pictures of training.inspect_every cannot be drawn: %s. The run continues.", error)

    def failure(self, error: BaseException) -> None:
        """Writes the traceback of an error to run.log and as an artifact."""
        text = "".join(traceback.format_exception(error))
        log.error(text)
        path = self.directory.path / "traceback.txt"
        try:
            path.write_text(text, encoding="utf-8")
            self.tracker.log_artifact(path)
        except (OSError, StorageError):
            log.warning("%s cannot be written.", path)

    def end(self, status: str) -> None:
        self.print_pending()
        self.progress.close()
        try:
            self.inspection(whole=status != FAILED)
        finally:
            self.tracker.finish(status)

    def summary(
        self, evaluated: Evaluated, final: Final, predictions: Sequence[str], skipped: int, seconds: float
    ) -> None:
        """Prints the end of a run: results, where they are stored, and the next commands. `skipped`: steps that were
        not finite; `seconds`: since the run was built in this process."""
        facts, directory = self.facts, self.directory
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for title, text in (*evaluated.summary, *final.summary):
            table.add_row(title, text)
        steps = facts.model.step - facts.first_step
        early = f" of {facts.max_steps - facts.first_step}, stopped early" if facts.model.step < facts.max_steps else ""
        tokens = facts.order.tokens_before(facts.model.step)
        table.add_row("trained", f"{steps} steps{early}, {tokens:,} tokens; {seconds:.0f} s in all")
        if skipped:
            table.add_row("not finite", f"{skipped} steps were skipped")
        table.add_row("run directory", os.path.relpath(directory.path))
        console = Console(soft_wrap=True)
        console.print()
        for text in predictions[:1]:
            console.print(
                Panel(escape(text.strip()), title=facts.task.predictions_title, title_align="left"), soft_wrap=False
            )
        console.print(table)
        console.print("\nNext:", style="bold")
        further = "training.patience=null" if early else f"training.max_steps={2 * facts.max_steps}"
        plugins = "".join(f"--plugin {given} " for given in given_plugins())
        if facts.config.tracking.name == "mlflow":
            console.print(f"  {next_in_mlflow(directory.path, 'compare runs')}", highlight=False)
        resume = f"python -m manual_backprop.run {plugins}resume={directory.path.name} {further}"
        console.print(f"  {resume}", highlight=False)

    def _dataset(self) -> Dataset:
        task = self.facts.task
        name, path = task.source
        local = path is not None
        return Dataset(
            name=name,
            digest=task.digests["dataset_digest"],
            source_type="local" if local else "code",  # kinds that mlflow.data.get_source knows
            source={"uri": os.path.abspath(str(path))}
            if local
            else {"tags": {"mlflow.source.name": name, "python": platform.python_version()}},
            profile=dict(task.profile),
            tags=dict(task.data_tags),
        )

    def say(self, line: str) -> None:
        """Prints a line on the terminal and writes it to run.log."""
        log.info(line)
        self.progress.say(line)
