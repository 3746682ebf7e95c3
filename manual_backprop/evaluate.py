"""Measure a trained model on a split of its data, beside baselines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from manual_backprop.common.columns import table_console
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser, add_device, add_run, whole
from manual_backprop.trained_models.saved_model import RUN_HELP

if TYPE_CHECKING:
    from rich.console import Console

    from manual_backprop.tasks import Measured, Task
    from manual_backprop.tasks.evaluation import ShownToken
    from manual_backprop.trained_models.saved_model import SavedModel

DESCRIPTION = f"""\
Measures a trained model on a split of its data.

{RUN_HELP}

The first line describes the model. Then comes a table. For a language model it has loss [nats per token], perplexity,
bits per byte (independent of the tokenizer) and accuracy (how often the likeliest token is the right one), over every
token of the split but the first, or with batching=padded the first of each document, in rows as in training and without
overlap; and the losses of a unigram model (which knows how frequent each token is) and a bigram model (how frequent
each pair is) on the same tokens. A model between the two has learned frequencies, one below the bigram's uses context.

The splits are train, validation and test. A test split belongs to the dataset (saved, or on the hub), or is a file or
folder, given as dataset.test to the run or as --test here.

A run of task=reversal, copy or sort is measured on rows instead: accuracy and loss with the true tokens before each
(teacher forcing), and exact match, the share of rows that the model writes without a mistake, token by token after its
own (free-running). Its test rows are those that no run trains on. Pairs of task=translation are measured likewise, and
by chrF. Of task=classification there are loss, accuracy and macro F1, of task=forecasting RMSE and MASE, over all and
for each step, beside simple methods on the same examples.

The values are added to the run's metrics.jsonl at the checkpoint's step, and to MLflow if the run was tracked there, as
evaluation/SPLIT_loss, evaluation/SPLIT_perplexity and so on; with --max-batches as evaluation_part/SPLIT_loss.
Repeating a measurement adds nothing."""

EPILOG = """\
Examples

  python -m manual_backprop.evaluate last
  python -m manual_backprop.evaluate last@last --split train --max-batches 20
  python -m manual_backprop.evaluate last --split test --test held-out.txt
  python -m manual_backprop.evaluate last --generate
  python -m manual_backprop.evaluate last --tokens 40
  python -m manual_backprop.evaluate last --split test --predictions 10      # not of a language model

Exit codes: 0 done, 2 wrong input, or the examples are missing or have changed. If MLflow is down, a line says so:
python -m manual_backprop.sync RUN delivers the values later."""

SPLITS = ("train", "validation", "test")  # only this command reads the last
LIKELIEST = 5


def show(console: Console, measured: Measured) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=measured.title, title_justify="left", box=None, show_header=bool(measured.headings))
    for heading in measured.headings or measured.rows[0]:
        table.add_column(heading, justify="right" if measured.headings and heading else "left")
    for row in measured.rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for note in measured.notes:
        console.print(f"{note[0].upper()}{note[1:]}.", markup=False, highlight=False, soft_wrap=True)
    for line in measured.predictions:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_tokens(console: Console, tokens: Iterable[ShownToken]) -> None:
    """Print the first targets of the split with their losses and the likeliest tokens in their place."""
    from rich.markup import escape
    from rich.table import Table

    losses: list[float] = []
    table = Table(title="token by token", title_justify="left", box=None)
    for column in ("", "loss", "rank", "target", f"the {LIKELIEST} likeliest, and their probabilities"):
        table.add_column(column, justify="right" if column in ("", "loss", "rank") else "left", no_wrap=True)
    for place, one in enumerate(tokens, 1):
        if one.begins and losses:
            table.add_section()
        expected = "  ".join(f"{token} {value:.0%}" for token, value in one.likeliest)
        table.add_row(*map(escape, (str(place), f"{one.loss:.2f}", str(one.rank), one.target, expected)))
        losses.append(one.loss)
    console.print()
    console.print(table)
    console.print(f"mean loss of these {len(losses)} tokens: {sum(losses) / len(losses):.4f}")


def show_samples(console: Console, saved: SavedModel, task: Task) -> None:
    from manual_backprop.tasks.samples import count_words

    training = task.config.training
    if not training.sample_prompts or not training.sample_length:
        console.print(
            "\nThis run has no training.sample_prompts, or training.sample_length=0: there is nothing to generate."
        )
        return
    texts = task.predictions(saved.model)
    for number, text in enumerate(texts):
        console.print(f"\n--- sample {number + 1} of {len(texts)}: {count_words(text)}", highlight=False)
        console.print(text, markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("evaluate", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add_run(parser)
    add("--split", choices=SPLITS, default="validation", help="a split of the run's data (validation)")
    add("--test", metavar="PLACE", help="for --split test: a file, a folder or a split's name (the run's dataset.test)")
    add("--max-batches", type=whole(1), metavar="N", help="only the first N batches of training.batch_size rows (all)")
    add("--generate", action="store_true", help="also continue the run's sample prompts, and count words")
    add("--tokens", type=whole(1), metavar="N", help="show the first N tokens one by one, with the likeliest tokens")
    add("--predictions", type=whole(1), metavar="N", help="show predictions of the first N rows, and which are right")
    add_device(parser)
    options = parser.parse(arguments)

    if options.test is not None and options.split != "test":
        parser.error(f"--test {options.test}: names the test split; add --split test")

    from manual_backprop.tasks import task_named
    from manual_backprop.trained_models.evaluation import log_evaluation, measure, metrics_of, open_trained_task
    from manual_backprop.trained_models.saved_model import load

    saved = load(options.run, device=options.device)
    print(saved.line, flush=True)
    known = task_named(saved.task_name).evaluate_options
    for name in ("--test", "--tokens", "--generate", "--predictions"):
        if name not in known and getattr(options, name[2:]):
            parser.error(f"{name}: is not available for task={saved.task_name}; available: {', '.join(known)}")
    task = open_trained_task(saved, options.test)

    console = table_console()
    measured = measure(saved, task, options.split, options.max_batches, options.predictions or 0)
    console.print()
    show(console, measured)
    if options.tokens:
        show_tokens(console, task.token_by_token(saved.model, options.split, options.tokens, LIKELIEST))
    if options.generate:
        show_samples(console, saved, task)
    console.print()
    metrics, tracking = metrics_of(measured, options.split), task.config.tracking.name
    console.print(log_evaluation(saved.found, saved.step, tracking, metrics), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
