"""The Runner: builds everything from a config and owns the training loop.

    RunConfig -> corpus -> network, optimizer, windows -> run directory, tracker -> loop -> summary

The loop reads a value from the device only every `log_every` steps, at saves and at the end. A run is resumed from
nothing but its checkpoint: the step says which windows, which learning rate and which dropout masks come next.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .build import build_optimizer, build_order, default_run_name, max_steps, network_config, write_config
from .checkpoint import CheckpointManager
from .circumstances import circumstances, code_digest
from .config import RunConfig
from .data.corpus import prepare_corpus
from .data.order import evaluation_batches
from .durable import storage_errors
from .errors import InputError, Interrupted, NotFiniteError, StorageError
from .evaluation import Evaluation, Evaluator, unigram_and_bigram_loss
from .flops import flops_per_token, matrix_product_rate
from .initial_weights import load_initial_weights
from .inspection import Inspector
from .interruption import Interruption
from .memory import keep_freed_memory
from .memory_estimate import warn_if_too_large
from .models import build_network
from .models.network import Batch
from .origin import Origin
from .out_of_memory import memory_errors
from .report import RunReport
from .resume import Resumed, open_resumed
from .run_log import run_log, warnings_to_terminal
from .run_state import refuse_another_text, restore, state_of, tell_changes, tensors_of
from .samples import draw_samples, encode_prompts
from .schedule import learning_rate
from .summary_page import print_summary
from .tracking import (
    FAILED,
    FINISHED,
    KILLED,
    RunDirectory,
    Tracker,
    close_dead_runs,
    create_run_directory,
    end_run,
    open_tracker,
)

log = logging.getLogger(__name__)

COUNTED_ROWS = 256  # sequences that the counting models are measured on at a time


def run_job(config: RunConfig, root: Path, origin: Origin | None = None) -> float:
    """One run in the folder `root`: `root/outputs` and `root/mlflow.db`. Returns the final validation loss.

    Raises ManualBackpropError of the kind that fits; the run's status is written before it gets here.
    """
    origin = origin or Origin()
    warnings_to_terminal()
    with Interruption() as interruption:
        outputs = root / "outputs"
        close_dead_runs(outputs)
        resumed = None if config.resume is None else open_resumed(config, outputs)
        try:
            with memory_errors(config.training.batch_size):
                loss = Runner(config, outputs, interruption, resumed, origin).run()
        finally:
            if resumed is not None:
                resumed.directory.release()
        interruption.raise_if_received("the run had come to its end already.")  # but a sweep stops here
        return loss


class Runner:
    """One run. What it has built stands as attributes, for whoever wants to look at or change a part of it."""

    def __init__(
        self,
        config: RunConfig,
        outputs: Path,
        interruption: Interruption,
        resumed: Resumed | None = None,
        origin: Origin | None = None,
    ):
        """`resumed` is the run to go on with. Writes nothing but the corpus' cache."""
        self.origin = origin or Origin()
        self.config, self.outputs, self.interruption, self.resumed = config, outputs, interruption, resumed
        self.started = time.monotonic()
        self.checkpoint = None if resumed is None else resumed.checkpoint
        self._set_threads()
        torch.set_float32_matmul_precision("highest")
        keep_freed_memory()
        self.corpus = prepare_corpus(config.dataset, config.tokenizer, outputs / "datasets")
        self.network_config = network_config(config, self.corpus)
        if self.checkpoint is not None:
            refuse_another_text(self.corpus, self.network_config, self.checkpoint)
        warn_if_too_large(config, self.network_config)
        self.network = build_network(config.implementation.name, self.network_config)
        if self.checkpoint is None and config.init_from is not None:
            load_initial_weights(self.network, config.init_from, self.corpus, outputs)
        self.optimizer = build_optimizer(config, self.network)
        self.order = build_order(config, self.corpus, config.training.overfit_batches)
        self._validation_batches(1)  # refuses a split that is too short
        self.step = 0  # optimizer steps completed
        self.max_steps = max_steps(config.training, self.order)
        self.inspector = Inspector(self.network, config.training.inspect_every, self.max_steps)
        self.device = self.network.device
        self.flops_per_token = flops_per_token(self.network_config, config.model.max_seq_len)
        self.peak_rate = matrix_product_rate(self.network.compute_dtype, self.device)
        corpus = self.corpus
        self.prompts = encode_prompts(config.training.sample_prompts, corpus)
        self.unigram_loss, self.bigram_loss = unigram_and_bigram_loss(
            corpus.train, self._validation_batches(COUNTED_ROWS, device="cpu"), corpus.tokenizer.vocab_size
        )
        self.evaluator = Evaluator(self.network, corpus.validation_bytes / len(corpus.validation))
        self.evaluation: tuple[int, Evaluation] | None = None  # the last one, and after how many steps
        self.samples: list[str] = []  # its texts
        self.directory: RunDirectory | None = None  # once it runs
        if self.checkpoint is not None:
            restore(self, self.checkpoint)
        self.first_step = self.step
        self.nonfinite_before = int(self.optimizer.nonfinite_steps)

    # What a run is made of

    def _set_threads(self) -> None:
        """As the config has it, or else as the checkpoint was made with: sums depend on the number of threads."""
        threads = self.config.device.threads
        if threads is None and self.checkpoint is not None:
            threads = self.checkpoint.state["made_with"].get("threads")
        if threads is not None:
            torch.set_num_threads(threads)

    def _validation_batches(
        self, batch_size: int, limit: int | None = None, device: torch.device | str | None = None
    ) -> Iterator[Batch]:
        """`device` None: the network's."""
        corpus, config = self.corpus, self.config
        length, device = config.model.max_seq_len, self.network.device if device is None else device
        return evaluation_batches(
            corpus.validation, corpus.validation_offsets, config.batching, length, batch_size, limit, device
        )

    def _is_due(self, every: int | str) -> bool:
        """After this step, or at the end. `every` is a number of steps, or the word epoch."""
        steps = max(1, round(self.order.steps(1))) if every == "epoch" else int(every)
        return self.step % steps == 0 or self.step == self.max_steps

    def _save_is_due(self) -> bool:
        training = self.config.training
        minutes = training.save_every_minutes
        late = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        return late or self._is_due(training.save_every)

    # The loop

    def run(self) -> float:
        """Train to the end, or to an exception; the run's status says which. Returns the final validation loss.

        From here on a signal is kept until the loop, or a moment between two parts of the start, looks at it.
        """
        cut_short = self.resumed is not None and self.resumed.directory.read()["status"] != FINISHED
        if self.step > self.max_steps or (self.step == self.max_steps and not cut_short):
            raise InputError(
                f"The run has made {self.step} steps already and training.max_steps is {self.max_steps}: "
                "give a larger training.max_steps to go on."
            )
        # Room for what a run cannot do without: the newest checkpoint, and the next one while it is written.
        self._checkpoints(self.outputs / "runs").check_free_space(tensors_of(self), copies=2 - bool(self.checkpoint))
        self.interruption.defer()
        self.interruption.raise_if_received("nothing was trained yet, so there was nothing to save.")
        directory, tracker = self._open_run()
        self.directory = directory
        report = RunReport(self, directory, tracker)
        status = FAILED
        try:
            with run_log(directory.log):
                try:
                    self.interruption_point(directory, tracker)
                    report.start()
                    self._train(directory, tracker, report)
                    self._unless_the_disk_refuses(report.gradient_check)
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
        if self.origin.sweep is None:  # which has a table of all its jobs instead
            print_summary(self, directory)
        return self.evaluation[1].loss

    def _train(self, directory: RunDirectory, tracker: Tracker, report: RunReport) -> None:
        training = self.config.training
        seconds, steps = 0.0, 0  # of training alone, since the last log
        self.saved_at = time.monotonic()
        while self.step < self.max_steps:
            self.interruption_point(directory, tracker)
            begin = time.perf_counter()
            loss, rate, norm = self._optimizer_step()
            if self.step == 1 and self.resumed is None:
                directory.update(made_with=circumstances(self.network))  # compiling may have failed in this step
            if seen := self.inspector.take():
                tracker.log(self.step, seen)
            logs, saves = self._is_due(training.log_every), self._save_is_due()
            if logs or saves:
                try:
                    self._check_finite()  # waits for the device, so that the time below is the steps' own
                except NotFiniteError:
                    report.step(loss.item(), rate, norm.item(), (seconds + time.perf_counter() - begin) / (steps + 1))
                    raise
            seconds, steps = seconds + time.perf_counter() - begin, steps + 1
            if logs:
                report.step(loss.item(), rate, norm.item(), seconds / steps)
                seconds, steps = 0.0, 0
            if self._is_due(training.eval_every):
                self._evaluate(report)
            if saves:
                self._save(directory, tracker)
        if self.evaluation is None:  # it was killed behind its last save: logged is everything, and only this forgotten
            self._evaluated()
            self._draw_samples()

    def interruption_point(self, directory: RunDirectory, tracker: Tracker) -> None:
        """Between two steps: a signal that came meanwhile ends the run here, with a checkpoint."""
        if self.interruption.received is None:
            return
        if self.step == self.first_step:
            self.interruption.raise_if_received("no step was made, so there was nothing to save.")
        self._check_finite()  # or a resume would not know that this run was to end at such a step
        path = self._save(directory, tracker)
        self.interruption.raise_if_received(
            f"saved {path} after {self.step} steps; go on with resume={directory.run_id}"
        )

    def _optimizer_step(self) -> tuple[Tensor, float, Tensor]:
        """One update from `gradient_accumulation_steps` batches. Loss and norm stay on the device."""
        number = self.step + 1
        rate = self._learning_rate(number)
        tokens, batches = self.order.batches(self.step, self.device)
        self.network.zero_gradients()
        watch = self.inspector.watch(number)
        loss = torch.zeros((), device=self.device)
        denominator = self.network.on_device(tokens)  # once for all batches of the step
        for batch in batches:
            watch.batch(batch)
            loss = loss + self.network.loss_and_gradients(batch, denominator=denominator, step=number)
        watch.gradients()
        norm = self.optimizer.step(loss, rate, self.config.training.max_grad_norm)
        watch.update()
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
        if self.resumed is not None:
            directory, metrics_length = self.resumed.directory, self.resumed.checkpoint.state["metrics_length"]
        else:
            directory, metrics_length = create_run_directory(self.outputs, name, origin=self.origin), None
        try:
            if self.resumed is not None:
                tell_changes(self, self.resumed.checkpoint, directory)
                self._checkpoints(directory.checkpoints).set_aside_after(self.step)
            else:
                directory.update(made_with=circumstances(self.network), code=code_digest())
            write_config(config, directory.path / "config.yaml", self.origin.sources)
            with storage_errors(f"write into {directory.path}"):
                self.corpus.tokenizer.save(directory.path)
            tracker = open_tracker(
                config.tracking.name, directory, self.outputs, config.experiment_name, name, metrics_length
            )
        except BaseException:
            with suppress(StorageError):  # the disk that is full, perhaps: the next command sees that the run is dead
                end_run(directory.path, FAILED)
            directory.release()
            raise
        return directory, tracker

    def _evaluate(self, report: RunReport) -> None:
        """Validation loss and samples."""
        evaluation = self._evaluated()
        report.evaluation(evaluation)
        if not math.isfinite(evaluation.loss):
            raise NotFiniteError(
                f"The validation loss after step {self.step} is {evaluation.loss}: the parameters have diverged. Try a "
                "smaller optimizer.learning_rate or a longer schedule.warmup_ratio."
            )
        self._draw_samples()
        self._unless_the_disk_refuses(lambda: report.samples(self.samples))

    def _evaluated(self) -> Evaluation:
        """The last evaluation of a run is over the whole split."""
        training = self.config.training
        limit = None if self.step == self.max_steps else training.eval_batches
        evaluation = self.evaluator.evaluate(self._validation_batches(training.batch_size, limit))
        self.evaluation = self.step, evaluation
        return evaluation

    def _draw_samples(self) -> None:
        length, seed = self.config.training.sample_length, self.config.seed
        self.samples = draw_samples(self.network, self.corpus, self.prompts, length, seed)

    def _unless_the_disk_refuses(self, write: Callable[[], None]) -> None:
        """What a run can do without."""
        try:
            write()
        except StorageError as error:
            log.warning("%s. The run goes on without it.", error)

    def _save(self, directory: RunDirectory, tracker: Tracker) -> Path | None:
        """The new checkpoint; None where the disk did not take it and the run can go on without."""
        self.saved_at = time.monotonic()
        metric = self.evaluation[1].loss if self.evaluation is not None and self.evaluation[0] == self.step else None
        try:
            path = self._checkpoints(directory.checkpoints).save(
                self.step,
                tensors_of(self),
                state_of(self, tracker.sync()),
                metric,
                files=[directory.path / "tokenizer.json"],
            )
        except StorageError as error:
            if self.step == self.max_steps or self.interruption.received is not None:
                raise
            log.warning("%s. The run goes on without this checkpoint.", error)
            return None
        tracker.log_checkpoints()
        return path

    def _checkpoints(self, directory: Path) -> CheckpointManager:
        return CheckpointManager(directory, keep=self.config.training.keep_checkpoints)
