"""What a run says while it goes on: to the terminal, run.log, metrics.jsonl and MLflow."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .curves import draw_loss_curves
from .durable import storage_errors
from .errors import StorageError
from .evaluation import Evaluation
from .progress import ProgressLine
from .provenance import commit_tags
from .samples import SEPARATOR
from .tracking import RunDirectory, Tracker, flatten, load_training_log

if TYPE_CHECKING:
    from .runner import Runner

LOSS_CURVES = "loss_curves.png"

log = logging.getLogger(__name__)


class RunReport:
    """Follows one run. Nothing here changes what is trained."""

    def __init__(self, runner: Runner, directory: RunDirectory, tracker: Tracker):
        self.runner, self.directory, self.tracker = runner, directory, tracker
        self.progress = ProgressLine(runner.first_step, runner.max_steps)

    def start(self) -> None:
        """Parameters, tags, and the run in five lines."""
        runner, config, corpus = self.runner, self.runner.config, self.runner.corpus
        parameters = runner.network.count_parameters()
        self.tracker.log_parameters(flatten(config.to_dict()) | {"parameters": parameters})
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
        for file in ("config.yaml", "tokenizer.json"):
            self.tracker.log_artifact(self.directory.path / file)
        epochs = runner.max_steps * runner.windows_per_step / runner.windows.windows_per_epoch
        resumed = f", resumed after step {runner.first_step}" if runner.first_step else ""
        self._say(
            f"{type(runner.network).__name__}: {parameters:,} parameters, {config.architecture.name}, "
            f"{config.precision.name} on {runner.device}, {torch.get_num_threads()} threads"
        )
        self._say(
            f"{config.dataset.name}: {len(corpus.train):,} tokens for training, {len(corpus.validation):,} for "
            f"validation, vocabulary {corpus.tokenizer.vocab_size} ({corpus.tokenizer.name})"
        )
        self._say(f"{runner.max_steps} steps of {runner.tokens_per_step:,} tokens = {epochs:.1f} epochs{resumed}")
        self._say(
            f"counting models of the same tokens: unigram loss {runner.unigram_loss:.3f}, "
            f"bigram loss {runner.bigram_loss:.3f}"
        )
        self._say(f"run directory: {self.directory.path}")

    def step(self, loss: float, learning_rate: float, gradient_norm: float, seconds_per_step: float) -> None:
        runner = self.runner
        tokens_seen = runner.step * runner.tokens_per_step
        tokens_per_second = runner.tokens_per_step / seconds_per_step
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
        self.tracker.finish(status)

    def _say(self, line: str) -> None:
        log.info(line)
        self.progress.say(line)
