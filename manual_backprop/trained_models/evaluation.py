"""A trained model measured on a split of its text, beside models that only count, and that in its run's record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..common.errors import InputError, ManualBackpropError, RunInUseError, StorageError

if TYPE_CHECKING:
    from ..common.batch import Batch
    from ..config.schema import RunConfig
    from ..data.tokens.token_cache import Split
    from ..tasks import LanguageModelTask
    from ..tasks.evaluation import Evaluation
    from .saved_model import Found, SavedModel


@dataclass(frozen=True)
class Part:
    """One split of a run's text, or its first `max_batches` batches."""

    name: str
    split: Split
    task: LanguageModelTask
    max_batches: int | None
    notes: tuple[str, ...] = ()  # what a reader of the numbers must know

    @property
    def config(self) -> RunConfig:
        return self.task.config

    @property
    def targets(self) -> int:
        """How many tokens are predicted in all of the split."""
        return self.task.targets(self.split)

    def rows(self, device: Any) -> Iterator[Batch]:
        """The sequences of all of the split as they are evaluated, one at a time."""
        return self.task.evaluation_batches(self.split, device, rows=1)


@dataclass(frozen=True)
class ShownToken:
    """A target, and what the model expected in its place."""

    target: int
    loss: float  # nats
    rank: int  # 1: it was the likeliest
    likeliest: tuple[tuple[int, float], ...]  # tokens and their probabilities
    begins: bool  # a row: the model sees nothing of the one before


def open_part(saved: SavedModel, name: str, max_batches: int | None, test: str | None = None) -> Part:
    """`test` is where the test split is, if not where the run says. Raises InputError where the text is gone, is
    another one than the run's, or has no such split."""
    from ..data.tokens.test_split import open_test_split
    from ..tasks import LanguageModelTask

    config, cache = saved.config(), saved.found.outputs / "datasets"
    dataset = config.dataset
    try:
        task = LanguageModelTask.open(config, cache)
    except InputError as error:
        raise InputError(f"The text of this run (dataset={dataset.name}) cannot be read any more: {error}") from error
    corpus = task.corpus
    for tag, digest in task.digests.items():
        recorded, what = saved.state.get(tag), tag.removesuffix("_digest")
        if recorded != digest:
            where = dataset.path or dataset.repository or "the documentation in this Python"
            raise InputError(
                f"{where} is not what this model was trained on: the {what}'s digest is {digest[:12]} now and was "
                f"{str(recorded)[:12]}. Evaluate where the old text is, or train on the new one."
            )
    if name != "test":
        return Part(name, corpus.split(name), task, max_batches)
    try:
        split, notes = open_test_split(dataset if test is None else replace(dataset, test=test), corpus, cache)
    except InputError as error:
        raise InputError(f"--split test: {error}") from error
    return Part(name, split, task, max_batches, notes)


def measure(saved: SavedModel, part: Part) -> tuple[Evaluation, dict[str, Evaluation]]:
    """The model's evaluation, and the counting models' on the same tokens (their accuracy is not measured: NaN)."""
    from ..tasks.evaluation import Evaluation

    evaluation = part.task.measure(saved.model, part.split, part.max_batches)
    losses = part.task.counting_losses(part.split, part.max_batches)
    bytes_per_token = part.split.text_bytes / len(part.split.tokens)
    counting = {
        name: Evaluation(loss, math.nan, evaluation.tokens, loss / math.log(2) / bytes_per_token)
        for name, loss in zip(("bigram", "unigram"), reversed(losses), strict=True)
    }
    return evaluation, counting


def token_by_token(saved: SavedModel, part: Part, count: int, likeliest: int) -> Iterator[ShownToken]:
    """The first `count` targets of the split, as they are evaluated, each with so many of the likeliest tokens."""
    from ..common.batch import IGNORED

    network = saved.model.network
    for batch in part.rows(network.device):
        logarithms = network.predict(batch.tokens, batch.segments)[0].double().log_softmax(-1).cpu()  # (T, V)
        best = logarithms.topk(min(likeliest, logarithms.shape[-1]))
        begins = True
        for row, target in enumerate(batch.targets[0].tolist()):
            if target == IGNORED:
                continue
            if count == 0:
                return
            rank = int((logarithms[row] > logarithms[row, target]).sum()) + 1
            expected = zip(best.indices[row].tolist(), best.values[row].exp().tolist(), strict=True)
            yield ShownToken(target, -logarithms[row, target].item(), rank, tuple(expected), begins)
            begins = False
            count -= 1


def evaluation_metrics(part: Part, evaluation: Evaluation, counting: dict[str, Evaluation]) -> dict[str, float]:
    """Under the names that are logged; a part of a split never overwrites the whole."""
    group = "evaluation" if part.max_batches is None else "evaluation_part"
    values = {
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "accuracy": evaluation.accuracy,
        "tokens": evaluation.tokens,
        **{f"{name}_loss": one.loss for name, one in counting.items()},
    }
    return {f"{group}/{part.name}_{name}": float(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class RowsMeasured:
    """A model measured on rows of a task that makes its own examples."""

    title: str
    table: tuple[tuple[str, str], ...]
    metrics: dict[str, float]
    predictions: tuple[str, ...]


def measure_rows(saved: SavedModel, split: str, max_batches: int | None, predictions: int) -> RowsMeasured:
    """On a split of its task's rows: with true tokens before each (accuracy, loss), and free-running (exact match)."""
    from ..tasks.sequences import SequenceTask

    task = SequenceTask.open(saved.config(), saved.found.outputs / "datasets")
    task.refuse_other_examples(saved.state, saved.found.checkpoint)
    rows = task.split(split)
    count = len(rows) if max_batches is None else min(len(rows), max_batches * task.config.training.batch_size)
    evaluation, exact = task.measure(saved.model, rows, count)
    group = "evaluation" if count == len(rows) else "evaluation_part"
    values = {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "exact_match": exact, "rows": float(count)}
    return RowsMeasured(
        title=f"{split}: {count:,} rows" + (f" of {len(rows):,}" if count < len(rows) else ""),
        table=(
            ("exact match", f"{exact:.2%} of the rows, each token after the model's own (free-running)"),
            ("accuracy", f"{evaluation.accuracy:.2%} of {evaluation.tokens:,} tokens, each after the true ones"),
            ("loss", f"{evaluation.loss:.4f} nats a token, likewise"),
        ),
        metrics={f"{group}/{split}_{name}": value for name, value in values.items()},
        predictions=tuple(task.shown_rows(saved.model, rows, predictions)),
    )


def log_evaluation(found: Found, step: int, tracking: str, metrics: dict[str, float]) -> str:
    """Adds the values to the run's metrics, and says where they are. What goes wrong here is said, and changes nothing
    of the result; to repeat it adds nothing."""
    from ..tracking import MetricsFile, load_training_log
    from ..tracking.late_delivery import deliver_run
    from ..tracking.run_directory import own_run_directory

    if found.run is None:
        return "Not logged: the checkpoint lies in no run's directory."
    try:
        run = own_run_directory(found.run)
        try:
            known = load_training_log(found.run).training
            if any(_value(known.get(name), step) != value for name, value in metrics.items()):
                file = MetricsFile(run.metrics)
                file.append(step, metrics)
                file.close()
        finally:
            run.release()
    except RunInUseError:
        return "Not logged: the run is still going on, and writes its own metrics."
    except (StorageError, InputError) as error:
        return f"Not logged: {error}"
    name = next(iter(metrics))
    logged = f"Logged to the run as {name.rpartition('_')[0]}_* at step {step}"
    if tracking != "mlflow":
        return f"{logged}."
    try:
        deliver_run(str(found.run), found.outputs)
    except ManualBackpropError as error:
        return f"{logged}. MLflow did not take it: {error}"
    except Exception as error:  # MLflow's, its database's, its server's: for a user all the same
        reason = " ".join(str(error).split())[:160]
        return f"{logged}. MLflow did not take it ({reason}); later: python -m manual_backprop.sync {found.run.name}"
    return f"{logged}, in metrics.jsonl and MLflow."


def _value(series: Any, step: int) -> float | None:
    return dict(zip(series.steps, series.values, strict=True)).get(step) if series is not None else None
