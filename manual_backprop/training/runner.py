"""The Runner: builds everything from a config and owns the training loop.

    RunConfig -> task -> model, optimizer, order of batches -> run directory, tracker -> loop -> summary

The task (`tasks/`) defines what is learned, the network what a step computes, and the report what is logged. The report
gets the facts of a run and not the Runner.
The loop reads a value from the device only every `log_every` steps, at saves and at the end. A run resumes from its
checkpoint alone: the step determines the next windows, learning rate and dropout masks.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import CheckpointManager
from ..common.allocator import keep_freed_memory
from ..common.durable_files import storage_errors
from ..common.errors import (
    CheckFailedError,
    InputError,
    Interrupted,
    ManualBackpropError,
    NotFiniteError,
    StorageError,
    memory_errors,
)
from ..common.interruption import Interruption
from ..common.origin import Origin
from ..common.processes import ALONE, Place, Processes, acting_as, processes
from ..common.startup.output import enduring_output
from ..config.schema import CustomTransformerConfig, RunConfig
from ..config.written_config import default_run_name, write_config
from ..models.flops import matrix_product_rate
from ..models.training_step import Reduction, TrainingStep, build_optimizer
from ..optim.improvement import Improvement
from ..optim.schedule import build_schedule, max_steps
from ..study.estimates.memory import warn_if_too_large, what_would_fit
from ..tasks import Evaluated, Final, open_task
from ..tracking import (
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
from ..tracking.environment import code_digest, environment_of
from ..tracking.run_log import run_log, warnings_to_terminal
from ..tracking.tracker import outputs_of
from ..trained_models.initial_weights import load_initial_weights
from .inspection.inspector import Inspector
from .processes.group import Group
from .processes.reduction import GroupReduction, NullObject, Requests, digest_of
from .processes.start import joined, run_in_processes
from .report import RunReport
from .resume import Resumed, open_resumed
from .run_state import RunFacts, report_changes, restore, state_of, tensors_of

COMPARED_EVERY = 100  # steps between two checks that all processes have the same parameters; also before each save

log = logging.getLogger(__name__)


def run_job(
    config: RunConfig, root: Path, origin: Origin | None = None, interruption: Interruption | None = None
) -> float:
    """One run in the folder `root`: `root/outputs` and `root/mlflow.db`. Returns its final value, as `Runner.run` does.

    Raises a ManualBackpropError after the run's status is written.
    """
    origin = origin or Origin()
    warnings_to_terminal()
    with interruption or Interruption() as interruption:
        if config.device.processes > 1 and Place.found() is None:
            loss = run_in_processes(config, root, origin, interruption)
        else:
            with joined(config) as group:
                loss = _run_job(config, root / "outputs", origin, interruption, group)
        interruption.raise_if_received("the run was already complete.")  # only a sweep stops here
        return loss


def _run_job(config: RunConfig, outputs: Path, origin: Origin, interruption: Interruption, group: Processes) -> float:
    """`run_job` in each of the processes that share the run."""

    def resume() -> Resumed | None:
        if group.is_first:
            close_dead_runs(outputs)
        return None if config.resume is None else open_resumed(config, outputs, owned=group.is_first)

    resumed = group.first_alone(resume)  # the others wait until the first has marked dead runs and owns this one
    try:
        with memory_errors(lambda: what_would_fit(config, network_of(config, outputs))):
            return Runner(config, outputs, interruption, resumed, origin).run()
    finally:
        if resumed is not None:
            resumed.directory.release()


def network_of(config: RunConfig, outputs: Path) -> CustomTransformerConfig | None:
    """The network of a run with prepared examples; None if they cannot be read."""
    try:
        return open_task(config, outputs / "datasets").network_config
    except (ManualBackpropError, MemoryError):
        return None


class Runner:
    """One run. Its parts are attributes, which a caller may inspect or replace before `run`."""

    def __init__(
        self,
        config: RunConfig,
        outputs: Path,
        interruption: Interruption,
        resumed: Resumed | None = None,
        origin: Origin | None = None,
    ):
        """`resumed` is a run to resume. Writes nothing except the cache of the examples."""
        self.origin = origin or Origin()
        self.config, self.outputs, self.interruption, self.resumed = config, outputs, interruption, resumed
        self.started = time.monotonic()
        self.group = processes()
        self.checkpoint = None if resumed is None else resumed.checkpoint
        self._set_threads()
        self._set_gpu()
        torch.set_float32_matmul_precision("highest")
        keep_freed_memory()
        self.task = self.group.first_alone(lambda: open_task(config, outputs / "datasets"))
        self.group.agree(self.task.digests)
        network_config = self.task.network_config
        if self.checkpoint is not None:
            self.task.refuse_other_examples(self.checkpoint.state, self.checkpoint.path)
        warn_if_too_large(config, network_config)
        self.model = self.task.build_model()
        network = self.model.network
        if self.checkpoint is None and config.init_from is not None:
            load_initial_weights(network, config.init_from, self.task.digests, outputs)
        self.optimizer = build_optimizer(config, network)
        group = self.group
        self.reduction = GroupReduction(group, network, self._requests) if isinstance(group, Group) else Reduction()
        self.one_step = TrainingStep(network, self.optimizer, config.training.max_grad_norm, reduction=self.reduction)
        self.order = self.task.order(config.training.overfit_batches)
        self.task.check()
        self.max_steps = max_steps(config.training, self.order)
        self.improvement = Improvement.of(None if self.checkpoint is None else self.checkpoint.state.get("improvement"))
        # the learning rate of each step, by its number from 1
        self.learning_rate = build_schedule(config, self.max_steps, self.improvement)
        self.agreed = Requests()  # the requests of all processes together, as of the last step
        self.inspector = Inspector(network, config.training.inspect_every, self.max_steps)
        self.evaluated: tuple[int, Evaluated] | None = None  # the step of the last evaluation, and its result
        self.predictions: list[str] = []  # the texts that the task predicted at that evaluation
        self.final = Final()  # results that the task adds at the end of the run
        self.directory: RunDirectory | None = None  # set by `run`
        # all processes measure at the same time, before MLflow's starts, which has a core for seconds
        self.peak_rate = sum(group.gathered(matrix_product_rate(network.compute_dtype, network.device)))
        if self.checkpoint is not None:
            restore(self.model, self.optimizer, self.checkpoint)
        self.first_step = self.step
        self.nonfinite_before = int(self.optimizer.nonfinite_steps)

    @property
    def step(self) -> int:
        """The number of completed optimizer steps. The model counts them, since each has its own dropout masks."""
        return self.model.step

    @property
    def facts(self) -> RunFacts:
        return RunFacts(self.config, self.task, self.model, self.order, self.first_step, self.max_steps, self.peak_rate)

    @property
    def is_over(self) -> bool:
        """Whether no step is left, or evaluations have not improved for too long."""
        return self.step >= self.max_steps or self.improvement.is_over(self.config.training.patience)

    @property
    def _without_improvement(self) -> str:
        seen = self.improvement
        return f"{seen.since_best} evaluations without a better {self.task.best_metric} than {seen.best:.4f}"

    # Building

    def _set_threads(self) -> None:
        """Sets the number of threads: that of the config, or else of the checkpoint, since sums depend on it."""
        threads = self.config.device.threads
        if threads is None and self.checkpoint is not None:
            threads = self.checkpoint.state["made_with"].get("threads")
        if threads is not None:
            torch.set_num_threads(threads)

    def _set_gpu(self) -> None:
        """Selects the config's GPU, and turns deterministic algorithms on or off (device.deterministic)."""
        device = self.config.network_config(1).get_device()
        if device.type != "cuda":
            return
        if device.index is not None:
            torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for reproducible products
        torch.use_deterministic_algorithms(bool(self.config.device.deterministic))
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False  # no kernel reads uninitialized memory

    def _is_due(self, every: int | str) -> bool:
        """Whether something is due after this step, or at the end. `every` is a number of steps, or the word epoch."""
        steps = max(1, round(self.order.steps(1))) if every == "epoch" else int(every)
        return self.step % steps == 0 or self.step == self.max_steps

    def _save_is_due(self) -> bool:
        training = self.config.training
        return self.agreed.save or self._is_due(training.save_every)

    def _requests(self) -> Requests:
        """The requests of this process, which all processes follow."""
        minutes = self.config.training.save_every_minutes
        late = self.group.is_first and minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        return Requests(self.interruption.received, late)

    # The loop

    @enduring_output()
    def run(self) -> float:
        """Trains to the end, or until an exception; the run's status says which. Returns the final validation loss, or
        the other metric by which the task chooses the best checkpoint.

        From here on a signal is only recorded; the next `interruption_point` handles it.
        """
        cut_short = self.group.from_first(
            lambda: self.resumed is not None and self.resumed.directory.read()["status"] != FINISHED
        )
        if self.is_over and self.step < self.max_steps and not cut_short:
            raise InputError(
                f"The run has stopped early, after {self.step} steps: {self._without_improvement}. Give a larger "
                "training.patience, or training.patience=null, to continue."
            )
        if self.step > self.max_steps or (self.step == self.max_steps and not cut_short):
            raise InputError(
                f"The run has made {self.step} steps already and training.max_steps is {self.max_steps}: "
                "give a larger training.max_steps to continue."
            )
        # The disk must have room for two checkpoints: the newest one, and the next one while it is written.
        tensors = tensors_of(self.model, self.optimizer)
        if self.group.is_first:
            checkpoints = self._checkpoints(self.outputs / "runs")
            checkpoints.check_free_space(tensors, copies=2 - bool(self.checkpoint))
        del tensors
        self.interruption.defer()
        self.interruption.raise_if_received("no step was made, so there was nothing to save.")
        if not self.group.is_first:  # trains like the first process, but writes, logs and prints nothing
            nothing: Any = NullObject()
            return self._train(nothing, nothing, nothing)
        directory, tracker = self._open_run()
        self.directory = directory
        report = RunReport(self.facts, directory, tracker)
        status = FAILED
        try:
            with run_log(directory.log):
                try:
                    self.interruption_point(directory, tracker)
                    report.start()
                    reached = self._train(directory, tracker, report)
                    self._tolerating_storage_errors(report.gradient_check)
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
        if self.evaluated is not None and self.origin.sweep is None:  # a sweep prints a table of all its jobs instead
            skipped, seconds = int(self.optimizer.nonfinite_steps), time.monotonic() - self.started
            report.summary(self.evaluated[1], self.final, self.predictions, skipped, seconds)
        return reached

    def _train(self, directory: RunDirectory, tracker: Tracker, report: RunReport) -> float:
        """The loop. Returns the final value of the metric by which the task chooses the best checkpoint."""
        training = self.config.training
        seconds, steps = 0.0, 0  # since the last log; without evaluations and saves
        self.saved_at = time.monotonic()
        while not self.is_over:
            self.interruption_point(directory, tracker)
            begin = time.perf_counter()
            loss, rate, norm = self.train_step()
            if self.step == 1 and self.resumed is None:
                directory.update(made_with=environment_of(self.model.network))  # compiling may have failed in this step
            if seen := self.inspector.take():
                tracker.log(self.step, seen)
            logs, saves = self._is_due(training.log_every), self._save_is_due()
            if logs or saves:
                try:
                    self._check_finite()  # waits for the device, so that the time below covers the steps
                except NotFiniteError:
                    self._report_step(report, loss, rate, norm, (seconds + time.perf_counter() - begin) / (steps + 1))
                    raise
            seconds, steps = seconds + time.perf_counter() - begin, steps + 1
            if logs:
                self._report_step(report, loss, rate, norm, seconds / steps)
                seconds, steps = 0.0, 0
            if saves or self._is_due(COMPARED_EVERY):
                self._compare_parameters()
            evaluates = self._is_due(training.eval_every)
            if evaluates:
                self._evaluate(report)
            if self.is_over and self.step < self.max_steps:
                if not logs:
                    self._check_finite()
                    self._report_step(report, loss, rate, norm, seconds / max(1, steps))
                directory.update(stopped_early=self.step)
            if saves or self.is_over:
                self._save(directory, tracker)
            report.print_pending()
            if self.is_over and self.step < self.max_steps:
                report.say(f"stopped early after step {self.step}: {self._without_improvement}")
            if evaluates:
                self._predict(report)
        if self.evaluated is None:  # the run was killed after its last save: everything else is logged already
            self._measure()
            self._predict(report)
        if self.group.is_first:
            with acting_as(ALONE):  # the other processes are done, and wait for this one
                self.final = self.task.final(self.model, directory.path)
            report.final(self.final)
        assert self.evaluated is not None
        return self.evaluated[1].metrics[self.task.best_metric]

    def _report_step(self, report: RunReport, loss: Tensor, rate: float, norm: Tensor, seconds: float) -> None:
        """Reports a step; with label smoothing also its loss without. `seconds` is the mean time of a step."""
        unsmoothed = None
        if self.config.training.label_smoothing:
            batches = self.order.batches(self.step - 1, self.model.network.device)[1]
            unsmoothed = self.task.unsmoothed_loss(self.model, batches)
        report.step(loss.item(), rate, norm.item(), seconds, int(self.optimizer.nonfinite_steps), unsmoothed)

    def interruption_point(self, directory: RunDirectory, tracker: Tracker) -> None:
        """Called between two steps: a signal received meanwhile ends the run here, with a checkpoint."""
        if self.group.size > 1:
            if self.agreed.signal is None:  # the other processes learn of it in the next step
                return
            self.interruption.received = self.agreed.signal
        if self.interruption.received is None:
            return
        if self.step == self.first_step:
            self.interruption.raise_if_received("no step was made, so there was nothing to save.")
        self._check_finite()  # before saving: a resumed run would not know of these steps
        path = self._save(directory, tracker)
        self.interruption.raise_if_received(
            f"saved {path} after {self.step} steps; continue with resume={directory.run_id}"
        )

    def train_step(self) -> tuple[Tensor, float, Tensor]:
        """One update from `gradient_accumulation_steps` batches: loss, learning rate, gradient norm before clipping.

        Loss and norm stay on the device; nothing here waits for it.
        """
        number = self.step + 1
        rate = self.learning_rate(number)
        tokens, batches = self.order.batches(self.step, self.model.network.device)
        loss, norm = self.one_step(batches, tokens, rate, number, self.inspector.watch(number))
        self.agreed = self.reduction.agreed if isinstance(self.reduction, GroupReduction) else self._requests()
        self.model.step = number
        return loss, rate, norm

    def _compare_parameters(self) -> None:
        """Raises CheckFailedError unless all processes have bitwise the same parameters."""
        if self.group.size == 1:
            return
        digests = self.group.gathered(digest_of(self.model.network.parameters.values()))
        if other := [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise CheckFailedError(
                f"After step {self.step} the parameters of process 0 are not those of process {', '.join(other)}: its "
                "machine's memory is faulty, or this is a bug. Go on from an earlier checkpoint: resume=last"
            )

    def _check_finite(self) -> None:
        """Raises NotFiniteError after non-finite steps, as set by `training.non_finite`."""
        _, total, _, longest = self.optimizer.counts.tolist()
        training = self.config.training
        new = total - self.nonfinite_before
        if training.non_finite == "raise" and new:
            raise NotFiniteError(
                f"The loss or the gradient norm was not finite in {new} of the last steps, up to step {self.step}. "
                "Nothing was updated in them. Try a smaller optimizer.learning_rate or a longer schedule.warmup_ratio; "
                "training.non_finite=skip leaves such steps out."
            )
        if training.non_finite == "skip" and longest >= training.non_finite_limit:
            raise NotFiniteError(
                f"{longest} steps in a row, up to step {self.step}, had a loss or gradient norm that was not finite "
                f"(training.non_finite_limit={training.non_finite_limit}). Try a smaller optimizer.learning_rate or a "
                "longer schedule.warmup_ratio."
            )
        self.optimizer.reset_longest_nonfinite()

    # Writing

    def _open_run(self) -> tuple[RunDirectory, Tracker]:
        config = self.config
        name = config.run_name or default_run_name(config)
        if self.resumed is not None:
            directory, metrics_length = self.resumed.directory, self.resumed.checkpoint.state["metrics_length"]
        else:
            directory, metrics_length = create_run_directory(self.outputs, name, origin=self.origin), None
        try:
            if self.resumed is not None:
                report_changes(self.facts, self.resumed.checkpoint, directory)
                self._checkpoints(directory.checkpoints).set_aside_after(self.step)
                if not self.is_over and "stopped_early" in directory.read():
                    directory.update(stopped_early=None)
            else:
                directory.update(made_with=environment_of(self.model.network), code=code_digest())
                best = {"best_metric": self.task.best_metric, "best_is_highest": self.task.best_is_highest}
                directory.update(model=self._model(), **best)
            write_config(config, directory.path / "config.yaml", self.origin.sources)
            with storage_errors(f"write into {directory.path}"):
                self.task.save(directory.path)
            tracker = open_tracker(
                config.tracking.name,
                directory,
                outputs_of(directory.path, self.outputs),
                config.experiment_name,
                name,
                metrics_length,
            )
        except BaseException:
            with suppress(StorageError):  # the disk may be full; the next command notices that the run is dead
                end_run(directory.path, FAILED)
            directory.release()
            raise
        return directory, tracker

    def _model(self) -> dict[str, Any]:
        """The config of the network as it was built, for run.json; the vocabulary size, say, is the tokenizer's."""
        network = self.model.network
        built = {"implementation": self.config.implementation.name, "parameters": network.count_parameters()}
        return asdict(network.config) | built

    def _evaluate(self, report: RunReport) -> None:
        """Evaluates on the validation split and reports the metrics. Raises NotFiniteError if the best one is not."""
        task, schedule = self.task, self.config.schedule
        evaluated = self._measure()
        self.improvement.see(evaluated.metrics[task.best_metric], task.best_is_highest, schedule.patience)
        if self.is_over and self.config.training.eval_batches is not None and self.step < self.max_steps:
            evaluated = self._measure()
        report.evaluation(evaluated)
        name, value = task.best_metric, evaluated.metrics[task.best_metric]  # chooses the best checkpoint
        if not math.isfinite(value):
            raise NotFiniteError(
                f"The {name.replace('/', ' ')} after step {self.step} is {value}: the parameters have diverged. Try a "
                "smaller optimizer.learning_rate or a longer schedule.warmup_ratio."
            )

    def _predict(self, report: RunReport) -> None:
        self.predictions = self.task.predictions(self.model)
        self._tolerating_storage_errors(lambda: report.samples(self.predictions))

    def _measure(self) -> Evaluated:
        """Metrics on the validation split: on `eval_batches` of it, on all of it in a run's last evaluation."""
        limit = None if self.is_over else self.config.training.eval_batches
        evaluated = self.task.evaluate(self.model, limit)
        self.evaluated = self.step, evaluated
        return evaluated

    def _tolerating_storage_errors(self, write: Callable[[], None]) -> None:
        """Writes something that is not essential: a StorageError is only logged."""
        try:
            write()
        except StorageError as error:
            log.warning("%s. The run continues without it.", error)

    def _save(self, directory: RunDirectory, tracker: Tracker) -> Path | None:
        """Saves a checkpoint and returns its path; None if the disk was full and the run can continue without it."""
        self.saved_at = time.monotonic()
        metric = None
        if self.evaluated is not None and self.evaluated[0] == self.step:
            metric = self.evaluated[1].metrics[self.task.best_metric]
        try:
            tensors = tensors_of(self.model, self.optimizer)  # collects the parts of sharded moments from all processes
            if not self.group.is_first:
                return None
            path = self._checkpoints(directory.checkpoints).save(
                self.step,
                tensors,
                state_of(self.facts, tracker.sync(), self.improvement),
                metric,
                files=[directory.path / name for name in self.task.files],
                metric_name=self.task.best_metric,
                higher_is_better=self.task.best_is_highest,
            )
        except StorageError as error:
            if self.is_over or self.interruption.received is not None:
                raise
            log.warning("%s. The run continues without this checkpoint.", error)
            return None
        return path

    def _checkpoints(self, directory: Path) -> CheckpointManager:
        return CheckpointManager(directory, keep=self.config.training.keep_checkpoints)
