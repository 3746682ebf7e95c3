"""How good a trained model is on a split of its text, beside models that only count tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from manual_backprop.common.errors import InputError, ManualBackpropError, RunInUseError, StorageError
from manual_backprop.config.arguments import Parser, add_device, add_run, whole
from manual_backprop.trained_models.saved_model import RUN_HELP

if TYPE_CHECKING:
    from rich.console import Console

    from manual_backprop.common.batch import Batch
    from manual_backprop.config.schema import RunConfig
    from manual_backprop.data.tokens.token_cache import Split
    from manual_backprop.data.tokens.tokenizer import Tokenizer
    from manual_backprop.tasks import LanguageModelTask
    from manual_backprop.tasks.evaluation import Evaluation
    from manual_backprop.trained_models.saved_model import Found, SavedModel

DESCRIPTION = f"""\
Measures a trained model on a split of the text that it comes from.

{RUN_HELP}

The first line says which model it is. Then a table: loss [nats a token], perplexity, bits per byte (which tokenizers
cannot change) and accuracy (how often the likeliest token is the right one), over every token of the split but the
first, or with batching=padded the first of each document, in the rows of training and without overlap; beside it what
the unigram model (how frequent each token is) and the bigram model (what follows what) reach on the same tokens. A loss
between the two has learned frequencies, one below the bigram's uses context.

The splits are train, validation and test. A test split is one that the dataset has (saved, or of the hub), or a file or
folder that dataset.test named when the run was started, or that --test names here; no run reads it.

The values are added to the run's metrics.jsonl at the checkpoint's step, and to MLflow where the run was tracked there,
as evaluation/SPLIT_loss, evaluation/SPLIT_perplexity and so on; with --max-batches as evaluation_part/SPLIT_loss. Doing
it again adds nothing."""

EPILOG = """\
Examples

  python -m manual_backprop.evaluate last
  python -m manual_backprop.evaluate last@last --split train --max-batches 20
  python -m manual_backprop.evaluate last --split test --test held-out.txt
  python -m manual_backprop.evaluate last --generate
  python -m manual_backprop.evaluate last --tokens 40

Exit codes: 0 done, 2 wrong input; the text is no longer there, or is another one now. That MLflow is down is only
said: python -m manual_backprop.sync RUN delivers the values later."""

SPLITS = ("train", "validation", "test")  # the last is read here only
WIDTH = 110  # columns, where there is no terminal to ask
LIKELIEST = 5


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


def open_part(saved: SavedModel, name: str, max_batches: int | None, test: str | None = None) -> Part:
    """`test` is where the test split is, if not where the run says. Raises InputError where the text is gone, is
    another one than the run's, or has no such split."""
    from manual_backprop.data.tokens.test_split import open_test_split
    from manual_backprop.tasks import LanguageModelTask

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
    import math

    from manual_backprop.tasks.evaluation import Evaluation

    evaluation = part.task.measure(saved.model, part.split, part.max_batches)
    losses = part.task.counting_losses(part.split, part.max_batches)
    bytes_per_token = part.split.text_bytes / len(part.split.tokens)
    counting = {
        name: Evaluation(loss, math.nan, evaluation.tokens, loss / math.log(2) / bytes_per_token)
        for name, loss in zip(("bigram", "unigram"), reversed(losses), strict=True)
    }
    return evaluation, counting


def show_evaluation(console: Console, part: Part, evaluation: Evaluation, counting: dict[str, Evaluation]) -> None:
    from rich.table import Table

    whole = "" if part.max_batches is None else f" of {part.targets:,}"
    table = Table(title=f"{part.name}: {evaluation.tokens:,} tokens{whole}", title_justify="left", box=None)
    for column in ("", "loss", "perplexity", "bits per byte", "accuracy"):
        table.add_column(column, justify="right" if column else "left")
    for name, one in (("model", evaluation), *counting.items()):
        accuracy = f"{one.accuracy:.1%}" if one is evaluation else ""
        table.add_row(name, f"{one.loss:.4f}", f"{one.perplexity:,.1f}", f"{one.bits_per_byte:.3f}", accuracy)
    console.print(table)
    for note in part.notes:
        console.print(f"{note[0].upper()}{note[1:]}.", markup=False, highlight=False, soft_wrap=True)


# Token by token


def shown_token(tokenizer: Tokenizer, token: int) -> str:
    """As Python would quote it; bytes that are no text, and the end token, by their number."""
    text = tokenizer.decode([token])
    if token == tokenizer.end_token_id:
        return "<eos>"
    return f"<{token}>" if not text or "\ufffd" in text else repr(text)


def show_tokens(console: Console, saved: SavedModel, part: Part, count: int) -> None:
    """The first `count` targets of the split, as they are evaluated: what came, what was expected, at what loss."""
    import torch
    from rich.table import Table

    from manual_backprop.ops import IGNORED

    network, tokenizer = saved.model.network, part.task.corpus.tokenizer
    table = Table(title="token by token", title_justify="left", box=None)
    for column in ("", "loss", "rank", "target", f"the {LIKELIEST} likeliest, and their probabilities"):
        table.add_column(column, justify="right" if column in ("", "loss", "rank") else "left", no_wrap=True)
    place, losses = 0, []
    for batch in part.task.evaluation_batches(part.split, network.device, rows=1):
        if place == count:
            break
        logarithms = network.predict(batch.tokens, batch.segments)[0].double().log_softmax(-1).cpu()  # (T, V)
        best = logarithms.topk(min(LIKELIEST, logarithms.shape[-1]))
        if place:
            table.add_section()  # another row: the model sees nothing of the one before
        for row, target in enumerate(batch.targets[0].tolist()):
            if target == IGNORED or place == count:
                continue
            loss = -logarithms[row, target].item()
            rank = int((logarithms[row] > logarithms[row, target]).sum()) + 1
            expected = "  ".join(
                f"{shown_token(tokenizer, token)} {value:.0%}"
                for token, value in zip(best.indices[row].tolist(), torch.exp(best.values[row]).tolist(), strict=True)
            )
            losses.append(loss)
            place += 1
            table.add_row(
                *map(_literal, (str(place), f"{loss:.2f}", str(rank), shown_token(tokenizer, target), expected))
            )
    console.print()
    console.print(table)
    console.print(f"mean loss of these {len(losses)} tokens: {sum(losses) / len(losses):.4f}")


def _literal(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def show_samples(console: Console, saved: SavedModel, part: Part) -> None:
    from manual_backprop.tasks.samples import count_words

    training = part.config.training
    if not training.sample_prompts or not training.sample_length:
        console.print(
            "\nThis run has no training.sample_prompts, or training.sample_length=0: there is nothing to draw."
        )
        return
    texts = part.task.predictions(saved.model)
    for number, text in enumerate(texts):
        console.print(f"\n--- sample {number + 1} of {len(texts)}: {count_words(text)}", highlight=False)
        console.print(text, markup=False, highlight=False)


# Into the run's record


def log_evaluation(found: Found, step: int, tracking: str, metrics: dict[str, float]) -> str:
    """Adds the values to the run's metrics, and says where they are. What goes wrong here is said, and changes nothing
    of the result; to repeat it adds nothing."""
    from manual_backprop.tracking import MetricsFile, load_training_log
    from manual_backprop.tracking.late_delivery import deliver_run
    from manual_backprop.tracking.run_directory import own_run_directory

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


def main(arguments: Sequence[str] | None = None) -> int | None:
    parser = Parser("evaluate", DESCRIPTION, EPILOG)
    add_run(parser)
    parser.add_argument("--split", choices=SPLITS, default="validation", help="of the run's text (validation)")
    parser.add_argument(
        "--test", metavar="PLACE", help="for --split test: a file, a folder or a split's name (the run's dataset.test)"
    )
    parser.add_argument(
        "--max-batches",
        type=whole(1),
        metavar="N",
        help="only the first N batches of training.batch_size windows (all)",
    )
    parser.add_argument(
        "--generate", action="store_true", help="continue the run's sample prompts as well, and count words"
    )
    parser.add_argument(
        "--tokens", type=whole(1), metavar="N", help="show the first N tokens one by one, with what the model expected"
    )
    add_device(parser)
    options = parser.parse(arguments)

    if options.test is not None and options.split != "test":
        parser.error(f"--test {options.test}: says where the test split is; add --split test")

    from manual_backprop.trained_models.saved_model import load

    saved = load(options.run, device=options.device)
    print(saved.line, flush=True)
    part = open_part(saved, options.split, options.max_batches, options.test)

    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    evaluation, counting = measure(saved, part)
    console.print()
    show_evaluation(console, part, evaluation, counting)
    if options.tokens:
        show_tokens(console, saved, part, options.tokens)
    if options.generate:
        show_samples(console, saved, part)
    metrics = evaluation_metrics(part, evaluation, counting)
    console.print()
    console.print(log_evaluation(saved.found, saved.step, part.config.tracking.name, metrics), soft_wrap=True)
    return None


if __name__ == "__main__":
    from manual_backprop.common.exit_codes import exit_code_of

    sys.exit(exit_code_of(main))
