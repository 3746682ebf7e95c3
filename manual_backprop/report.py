"""What a run says while it goes on: to the terminal, run.log, metrics.jsonl and MLflow."""

from __future__ import annotations

import logging
import os
import platform
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .curves import draw_loss_curves
from .durable import storage_errors
from .errors import StorageError
from .evaluation import Evaluation
from .inspection import BASELINE_NOTE
from .inspection_pictures import draw_inspection
from .memory import below_the_peak, give_back_freed_memory
from .origin import SOURCES
from .progress import ProgressLine
from .provenance import commit_tags, write_provenance
from .run_check import check_of_run
from .samples import SEPARATOR
from .tracking import FAILED, Dataset, RunDirectory, SystemMetrics, Tracker, flatten, load_training_log

if TYPE_CHECKING:
    from .runner import Runner

LOSS_CURVES = "loss_curves.png"
# Keys on which no number depends: two runs that are compared shall differ in what was varied, not in their names.
NO_PARAMETERS = ("run_name", "experiment_name", "tags", "resume", "plan", "sweep", "tracking")
GRADIENT_CHECK = "gradient_check.txt"
INSPECTION = "inspection"  # the folder of its pictures

log = logging.getLogger(__name__)


class RunReport:
    """Follows one run. Nothing here changes what is trained."""

    def __init__(self, runner: Runner, directory: RunDirectory, tracker: Tracker):
        self.runner, self.directory, self.tracker = runner, directory, tracker
        self.progress = ProgressLine(runner.first_step, runner.max_steps)
        self.system = SystemMetrics(gpu=runner.device.type == "cuda")
        self.reported = runner.first_step, runner.order.tokens_before(runner.first_step)  # steps, and tokens in them

    def start(self) -> None:
        """Parameters, tags, and the run in five lines."""
        runner, config, corpus = self.runner, self.runner.config, self.runner.corpus
        parameters = runner.network.count_parameters()
        settings = {key: value for key, value in config.to_dict().items() if key not in NO_PARAMETERS}
        self.tracker.log_parameters(flatten(settings) | {"parameters": parameters})
        self.tracker.set_tags(
            {
                **config.tags,
                **commit_tags(),
                "device": str(runner.device),
                "tokenizer_digest": corpus.tokenizer_digest,
                "dataset_digest": corpus.dataset_digest,
                "run_directory": str(self.directory.path),
            }
        )
        self.tracker.log_dataset(self._dataset())
        written = write_provenance(self.directory.path, runner.first_step)
        for file in (*(self.directory.path / name for name in ("config.yaml", SOURCES, "tokenizer.json")), *written):
            if file.is_file():  # a run of the library has no command line to tell of
                self.tracker.log_artifact(file)
        epochs = runner.max_steps / runner.order.steps(1)
        resumed = f", resumed after step {runner.first_step}" if runner.first_step else ""
        self._say(
            f"{type(runner.network).__name__}: {parameters:,} parameters, {config.architecture.name}, "
            f"{config.precision.name} on {runner.device}, {torch.get_num_threads()} threads"
        )
        self._say(
            f"{config.dataset.name}: {len(corpus.train):,} tokens for training, {len(corpus.validation):,} for "
            f"validation, vocabulary {corpus.tokenizer.vocab_size} ({corpus.tokenizer.name})"
        )
        self._say(f"{runner.max_steps} steps of {runner.order.tokens_per_step:,} tokens = {epochs:.1f} epochs{resumed}")
        self._say(
            f"counting models of the same tokens: unigram loss {runner.unigram_loss:.3f}, "
            f"bigram loss {runner.bigram_loss:.3f}"
        )
        for note in (*corpus.notes, *runner.order.notes):
            self._say(note)
        if config.training.inspect_every is not None and config.implementation.name == "baseline":
            self._say(BASELINE_NOTE)
        self._say(f"run directory: {self.directory.path}")

    def step(self, loss: float, learning_rate: float, gradient_norm: float, seconds_per_step: float) -> None:
        runner = self.runner
        tokens_seen = runner.order.tokens_before(runner.step)
        tokens_per_step = (tokens_seen - self.reported[1]) / (runner.step - self.reported[0])
        self.reported = runner.step, tokens_seen
        tokens_per_second = tokens_per_step / seconds_per_step
        self.tracker.log(
            runner.step,
            {
                "train/loss": loss,
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                "tokens_seen": tokens_seen,
                "flops": tokens_seen * runner.flops_per_token,
                "tokens_per_second": tokens_per_second,
                "peak_share": tokens_per_second * runner.flops_per_token / runner.peak_rate,
                "nonfinite_steps": int(runner.optimizer.nonfinite_steps),
                **self.system.sample(),
            },
        )
        self.progress.update(runner.step, loss, learning_rate, gradient_norm, tokens_per_second)

    def evaluation(self, evaluation: Evaluation) -> None:
        runner = self.runner
        counting = {"validation/unigram_loss": runner.unigram_loss, "validation/bigram_loss": runner.bigram_loss}
        self.tracker.log(runner.step, evaluation.metrics() | counting)
        self._say(
            f"step {runner.step}: validation loss {evaluation.loss:.4f} (bigram {runner.bigram_loss:.3f}), perplexity "
            f"{evaluation.perplexity:.1f}, {evaluation.bits_per_byte:.3f} bits a byte, "
            f"accuracy {evaluation.accuracy:.3f}"
        )

    def samples(self, texts: Sequence[str]) -> None:
        """The samples of this step, and the curves so far."""
        path = self.directory.samples / f"step-{self.runner.step:06d}.txt"
        with storage_errors(f"write {path}"):
            path.write_text(SEPARATOR.join(texts) + "\n", encoding="utf-8")
        self.tracker.log_artifact(path, "samples")
        curves = self.directory.path / LOSS_CURVES
        title = f"{self.directory.read()['run_name']}: {self.runner.network.count_parameters():,} parameters"
        with storage_errors(f"write {curves}"):
            draw_loss_curves(load_training_log(self.directory.path), curves, title)
        self.tracker.log_artifact(curves)
        for text in texts[:1]:
            self._say("  " + " ".join(text.split())[:110])

    def gradient_check(self) -> None:
        """At the end of a run: are the gradients of a network like its own right? Nothing of the run changes, and its
        peak of memory stays what the training made it; a GPU refuses what does not fit, and that costs no run."""
        give_back_freed_memory()
        room = below_the_peak() if self.runner.device.type == "cpu" else None
        check = check_of_run(self.runner.config, self.runner.network.config, room)
        path = self.directory.path / GRADIENT_CHECK
        with storage_errors(f"write {path}"):
            path.write_text(check.page, encoding="utf-8")
        self.tracker.log_artifact(path)
        self.tracker.set_tags({"gradient_check": check.status})
        self._say(check.line)
        if check.status == "failed":
            log.warning("%s See %s.", check.line, path)

    def inspection(self, whole: bool) -> None:
        """At the end of a run of which `training.inspect_every` is given: pictures of what was seen in every layer.

        `whole`: of the network as it is now too, whose gradients are no longer needed. A run can do without them.
        """
        runner, folder = self.runner, self.directory.path / INSPECTION
        if runner.inspector.every is None:
            return
        try:
            title = f"{self.directory.read()['run_name']}, step {runner.step}"
            network = runner.network if whole else None
            training, batching = load_training_log(self.directory.path), runner.config.batching
            for path in draw_inspection(training, folder, title, network, runner.corpus, batching):
                self.tracker.log_artifact(path, INSPECTION)
        except Exception as error:  # pictures, whatever is wrong with them, are not what a run is for
            log.warning("The pictures of training.inspect_every cannot be drawn: %s. The run goes on without.", error)

    def failure(self, error: BaseException) -> None:
        """Its traceback, in run.log and as an artifact."""
        text = "".join(traceback.format_exception(error))
        log.error(text)
        path = self.directory.path / "traceback.txt"
        try:
            path.write_text(text, encoding="utf-8")
            self.tracker.log_artifact(path)
        except (OSError, StorageError):
            log.warning("%s cannot be written.", path)

    def end(self, status: str) -> None:
        self.progress.close()
        try:
            self.inspection(whole=status != FAILED)
        finally:
            self.tracker.finish(status)

    def _dataset(self) -> Dataset:
        runner, config, corpus = self.runner, self.runner.config.dataset, self.runner.corpus
        local = config.path is not None
        return Dataset(
            name=config.repository or config.name,
            digest=corpus.dataset_digest,
            source_type="local" if local else "code",  # kinds that mlflow.data.get_source knows
            source={"uri": os.path.abspath(str(config.path))}
            if local
            else {"tags": {"mlflow.source.name": config.name, "python": platform.python_version()}},
            profile={
                "train_documents": corpus.train_documents,
                "validation_documents": corpus.validation_documents,
                "train_bytes": corpus.train_bytes,
                "validation_bytes": corpus.validation_bytes,
                **corpus.counts,
            },
            tags={
                "tokenizer": corpus.tokenizer.name,
                "vocab_size": str(corpus.tokenizer.vocab_size),
                "train_tokens": str(len(corpus.train)),
                "validation_tokens": str(len(corpus.validation)),
                "sequence_length": str(runner.config.model.max_seq_len),
            },
        )

    def _say(self, line: str) -> None:
        log.info(line)
        self.progress.say(line)
