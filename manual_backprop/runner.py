"""The Runner: builds everything from a config and owns the training loop.

    RunConfig -> corpus -> network, optimizer, windows -> run directory, tracker -> loop -> summary

The loop reads a value from the device only every `log_every` steps, at saves and at the end. A run is resumed from
nothing but its checkpoint: the step says which windows, which learning rate and which dropout masks come next.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .build import build_optimizer, default_run_name, network_config, write_config
from .checkpoint import Checkpoint, CheckpointManager
from .config import RunConfig
from .data.batches import Windows, validation_batches
from .data.corpus import prepare_corpus
from .errors import CheckpointError, InputError, Interrupted, NotFiniteError, StorageError
from .evaluation import Evaluation, Evaluator, unigram_and_bigram_loss
from .flops import flops_per_token, matrix_product_rate
from .interruption import Interruption
from .memory import keep_freed_memory
from .models import build_network
from .models.network import Batch
from .origin import Origin
from .report import RunReport
from .resume import resumed_config
from .run_log import run_log, warnings_to_terminal
from .samples import draw_samples, encode_prompts
from .schedule import learning_rate
from .summary_page import print_summary
from .tracking import (
    FAILED,
    FINISHED,
    KILLED,
    FoundRun,
    RunDirectory,
    Tracker,
    close_dead_runs,
    create_run_directory,
    end_run,
    open_run_directory,
    open_tracker,
)

log = logging.getLogger(__name__)


def run_job(config: RunConfig, root: Path, origin: Origin | None = None) -> float:
    """One run in the folder `root`: `root/outputs` and `root/mlflow.db`. Returns the final validation loss.

    Raises ManualBackpropError of the kind that fits; the run's status is written before it gets here.
    """
    origin = origin or Origin()
    warnings_to_terminal()
    with Interruption() as interruption:
        outputs = root / "outputs"
        close_dead_runs(outputs)
        found = None
        if config.resume is not None:
            config, found = resumed_config(config, origin.overrides, outputs)
        return Runner(config, outputs, interruption, found, origin).run()


class Runner:
    """One run. What it has built stands as attributes, for whoever wants to look at or change a part of it."""

    def __init__(
        self,
        config: RunConfig,
        outputs: Path,
        interruption: Interruption,
        resumed: FoundRun | None = None,
        origin: Origin | None = None,
    ):
        """`resumed` is the run to go on with, and its checkpoint. Writes nothing but the corpus' cache."""
        self.origin = origin or Origin()
        self.config, self.outputs, self.interruption, self.resumed = config, outputs, interruption, resumed
        self.started = time.monotonic()
        self.checkpoint = None
        if resumed is not None:
            self.checkpoint = CheckpointManager(resumed.path / "checkpoints").load(resumed.checkpoint)
        self._set_threads()
        torch.set_float32_matmul_precision("highest")
        keep_freed_memory()
        self.corpus = prepare_corpus(config.dataset, config.tokenizer, outputs / "datasets")
        self.network_config = network_config(config, self.corpus)
        self.network = build_network(config.implementation.name, self.network_config)
        self.optimizer = build_optimizer(config, self.network)
        self.windows = Windows(self.corpus.train, config.model.max_seq_len, config.seed)
        validation_batches(self.corpus.validation, config.model.max_seq_len, 1)  # refuses a split that is too short
        self.step = 0  # optimizer steps completed
        self.max_steps = self._max_steps()
        self.device = self.network.device
        self.flops_per_token = flops_per_token(self.network_config, config.model.max_seq_len)
        self.peak_rate = matrix_product_rate(self.network.compute_dtype, self.device)
        corpus = self.corpus
        self.prompts = encode_prompts(config.training.sample_prompts, corpus)
        self.unigram_loss, self.bigram_loss = unigram_and_bigram_loss(
            corpus.train, corpus.validation, corpus.tokenizer.vocab_size
        )
        self.evaluator = Evaluator(self.network, corpus.validation_bytes / len(corpus.validation))
        self.evaluation: tuple[int, Evaluation] | None = None  # the last one, and after how many steps
        self.samples: list[str] = []  # its texts
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        self.first_step = self.step
        self.nonfinite_before = int(self.optimizer.nonfinite_steps)

    # What a run is made of

    def _set_threads(self) -> None:
        """As the config has it, or else as the checkpoint was made with: sums depend on the number of threads."""
        threads = self.config.device.threads
        made_with = None if self.checkpoint is None else self.checkpoint.state.get("threads")
        if threads is None:
            threads = made_with
        if threads is not None:
            torch.set_num_threads(threads)
        if made_with not in (None, torch.get_num_threads()):
            log.warning(
                "The checkpoint was made with %d threads and this run has %d: the last bits will differ.",
                made_with,
                torch.get_num_threads(),
            )

    def _max_steps(self) -> int:
        training = self.config.training
        if training.max_steps is not None:
            return training.max_steps
        assert training.num_epochs is not None
        return max(1, math.ceil(training.num_epochs * self.windows.windows_per_epoch / self.windows_per_step))

    @property
    def windows_per_step(self) -> int:
        return self.config.training.batch_size * self.config.training.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.config.model.max_seq_len

    def _is_due(self, every: int | str) -> bool:
        """After this step, or at the end. `every` is a number of steps, or the word epoch."""
        steps = (
            max(1, round(self.windows.windows_per_epoch / self.windows_per_step)) if every == "epoch" else int(every)
        )
        return self.step % steps == 0 or self.step == self.max_steps

    # The loop

    def run(self) -> float:
        """Train to the end, or to an exception; the run's status says which. Returns the final validation loss."""
        if self.step >= self.max_steps:
            raise InputError(
                f"The run has made {self.step} steps already and training.max_steps is {self.max_steps}: "
                "give a larger training.max_steps to go on."
            )
        directory, tracker = self._open_run()
        report = RunReport(self, directory, tracker)
        status = FAILED
        try:
            with run_log(directory.log):
                try:
                    report.start()
                    self.interruption.defer()
                    self._train(directory, tracker, report)
                    status = FINISHED
                except Interrupted:
                    status = KILLED
                    raise
                except BaseException as error:
                    report.failure(error)
                    raise
                finally:
                    report.end(status)
        finally:
            directory.release()
        assert self.evaluation is not None
        print_summary(self, directory)
        return self.evaluation[1].loss

    def _train(self, directory: RunDirectory, tracker: Tracker, report: RunReport) -> None:
        training = self.config.training
        checkpoints = CheckpointManager(directory.checkpoints, keep=training.keep_checkpoints)
        checkpoints.check_free_space(self._tensors(), copies=2)
        seconds, steps = 0.0, 0  # of training alone, since the last log
        while self.step < self.max_steps:
            self.interruption_point(checkpoints, tracker)
            begin = time.perf_counter()
            loss, rate, norm = self._optimizer_step()
            logs, saves = self._is_due(training.log_every), self._is_due(training.save_every)
            if logs or saves:
                self._check_finite()  # waits for the device, so that the time below is the steps' own
            seconds, steps = seconds + time.perf_counter() - begin, steps + 1
            if logs:
                report.step(loss.item(), rate, norm.item(), seconds / steps)
                seconds, steps = 0.0, 0
            if self._is_due(training.eval_every):
                self._evaluate(report)
            if saves:
                self._save(checkpoints, tracker)

    def interruption_point(self, checkpoints: CheckpointManager, tracker: Tracker) -> None:
        """Between two steps: a signal that came meanwhile ends the run here, with a checkpoint."""
        if self.interruption.received is None:
            return
        if self.step == self.first_step:
            self.interruption.raise_if_received("no step was made, so there was nothing to save.")
        self._check_finite()  # or a resume would not know that this run was to end at such a step
        path = self._save(checkpoints, tracker)
        self.interruption.raise_if_received(
            f"saved {path} after {self.step} steps; go on with resume={checkpoints.directory.parent.name}"
        )

    def _optimizer_step(self) -> tuple[Tensor, float, Tensor]:
        """One update from `gradient_accumulation_steps` batches. Loss and norm stay on the device."""
        training, size = self.config.training, self.config.training.batch_size
        number = self.step + 1
        first = self.step * self.windows_per_step
        if training.overfit_batches is not None:
            first = (self.step % training.overfit_batches) * self.windows_per_step
        rate = self._learning_rate(number)
        self.network.zero_gradients()
        loss = torch.zeros((), device=self.device)
        for piece in range(training.gradient_accumulation_steps):
            row = piece * size
            batch: Batch = self.windows.batch(first + row, size, first_row=row, device=self.device)
            loss = loss + self.network.loss_and_gradients(batch, denominator=self.tokens_per_step, step=number)
        norm = self.optimizer.step(loss, rate, training.max_grad_norm)
        self.step = number
        return loss, rate, norm

    def _learning_rate(self, step: int) -> float:
        config = self.config
        peak = config.optimizer.learning_rate * config.architecture.learning_rate_scale
        floor = config.schedule.min_learning_rate
        return learning_rate(
            config.schedule.name,
            step,
            max_steps=self.max_steps,
            peak=peak,
            floor=peak / 10 if floor is None else floor,
            warmup_steps=round(config.schedule.warmup_ratio * self.max_steps),
        )

    def _check_finite(self) -> None:
        """Raises NotFiniteError as `training.non_finite` has it."""
        _, total, _, longest = self.optimizer.counts.tolist()
        training = self.config.training
        new = total - self.nonfinite_before
        if training.non_finite == "raise" and new:
            raise NotFiniteError(
                f"The loss or the gradient norm was not finite in {new} of the last steps, up to step {self.step}. "
                "Nothing was updated in them. Try a smaller optimizer.learning_rate or a longer schedule.warmup_ratio; "
                "training.non_finite=skip goes on without such steps."
            )
        if training.non_finite == "skip" and longest >= training.non_finite_limit:
            raise NotFiniteError(
                f"{longest} steps in a row, up to step {self.step}, had a loss or gradient norm that was not finite "
                f"(training.non_finite_limit={training.non_finite_limit}). Try a smaller optimizer.learning_rate or a "
                "longer schedule.warmup_ratio."
            )
        self.optimizer.forget_longest()

    # What it writes down

    def _open_run(self) -> tuple[RunDirectory, Tracker]:
        config = self.config
        name = config.run_name or default_run_name(config)
        metrics_length = None
        if self.checkpoint is not None:
            assert self.resumed is not None
            directory = open_run_directory(self.resumed.path, self.step)
        else:
            directory = create_run_directory(self.outputs, name)
        try:
            if self.checkpoint is not None:
                CheckpointManager(directory.checkpoints).set_aside_after(self.step)
                metrics_length = self.checkpoint.state["metrics_length"]
            write_config(config, directory.path / "config.yaml")
            self.corpus.tokenizer.save(directory.path)
            tracker = open_tracker(
                config.tracking.name, directory, self.outputs, config.experiment_name, name, metrics_length
            )
        except BaseException as error:
            end_run(directory.path, KILLED if isinstance(error, Interrupted) else FAILED)
            directory.release()
            raise
        return directory, tracker

    def _evaluate(self, report: RunReport) -> None:
        """Validation loss and samples. The last evaluation of a run is over the whole split."""
        training, corpus = self.config.training, self.corpus
        limit = None if self.step == self.max_steps else training.eval_batches
        evaluation = self.evaluator.evaluate(
            validation_batches(
                corpus.validation, self.config.model.max_seq_len, training.batch_size, limit, self.device
            )
        )
        self.evaluation = self.step, evaluation
        report.evaluation(evaluation)
        if not math.isfinite(evaluation.loss):
            raise NotFiniteError(
                f"The validation loss after step {self.step} is {evaluation.loss}: the parameters have diverged. Try a "
                "smaller optimizer.learning_rate or a longer schedule.warmup_ratio."
            )
        self.samples = draw_samples(self.network, corpus, self.prompts, training.sample_length, self.config.seed)
        report.samples(self.samples)

    def _save(self, checkpoints: CheckpointManager, tracker: Tracker) -> Path | None:
        """The new checkpoint; None where the disk did not take it and the run can go on without."""
        metric = self.evaluation[1].loss if self.evaluation is not None and self.evaluation[0] == self.step else None
        tokenizer = checkpoints.directory.parent / "tokenizer.json"
        try:
            state = {
                "network": asdict(self.network_config),
                "config": self.config.to_dict(),
                "metrics_length": tracker.sync(),
                "threads": torch.get_num_threads(),
                **self._identity(),
            }
            path = checkpoints.save(self.step, self._tensors(), state, metric, files=[tokenizer])
        except StorageError as error:
            if self.step == self.max_steps or self.interruption.received is not None:
                raise
            log.warning("%s. The run goes on without this checkpoint.", error)
            return None
        tracker.log_checkpoints()
        return path

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"parameters": self.network.export_parameters(), "optimizer": self.optimizer.state()}

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint's data and order of data depend on."""
        return {
            "dataset_digest": self.corpus.dataset_digest,
            "tokenizer_digest": self.corpus.tokenizer_digest,
            "windows_per_step": self.windows_per_step,
            "seed": self.config.seed,
            "optimizer": self.config.optimizer.name,
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint was made. Raises CheckpointError with every difference that forbids it."""
        saved = checkpoint.state
        here = self._identity() | {
            name: value for name, value in asdict(self.network_config).items() if name not in ("device", "kernels")
        }
        there = saved | saved.get("network", {})
        differences = [
            f"{name} is {there.get(name)} in the checkpoint and {value} here"
            for name, value in here.items()
            if there.get(name) != value
        ]
        if differences:
            raise CheckpointError(f"{checkpoint.path} cannot be resumed with this config: {'; '.join(differences)}.")
        self.network.load_parameters(checkpoint.tensors["parameters"])
        self.optimizer.load_state(checkpoint.tensors["optimizer"])
        self.optimizer.forget_longest()
        self.step = checkpoint.step
