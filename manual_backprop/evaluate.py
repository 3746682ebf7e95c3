"""How good a trained model is on a split of its text, beside models that only count tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser, add_device, add_run, whole
from manual_backprop.trained_models.saved_model import RUN_HELP

if TYPE_CHECKING:
    from rich.console import Console

    from manual_backprop.data.tokens.tokenizer import Tokenizer
    from manual_backprop.tasks.evaluation import Evaluation
    from manual_backprop.trained_models.evaluation import Part
    from manual_backprop.trained_models.saved_model import SavedModel

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

A run of task=reversal, copy or sort is measured on rows instead: accuracy and loss with the true tokens before each
(teacher forcing), and exact match, the share of rows that the model writes without a mistake, token by token after its
own (free-running). Its test rows are those that no run trains on.

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
  python -m manual_backprop.evaluate last --split test --predictions 10      # of task=reversal, copy or sort

Exit codes: 0 done, 2 wrong input; the text is no longer there, or is another one now. That MLflow is down is only
said: python -m manual_backprop.sync RUN delivers the values later."""

SPLITS = ("train", "validation", "test")  # the last is read here only
WIDTH = 110  # columns, where there is no terminal to ask
LIKELIEST = 5


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
    from rich.table import Table

    from manual_backprop.trained_models.evaluation import token_by_token

    tokenizer = part.task.corpus.tokenizer
    losses: list[float] = []
    table = Table(title="token by token", title_justify="left", box=None)
    for column in ("", "loss", "rank", "target", f"the {LIKELIEST} likeliest, and their probabilities"):
        table.add_column(column, justify="right" if column in ("", "loss", "rank") else "left", no_wrap=True)
    for place, one in enumerate(token_by_token(saved, part, count, LIKELIEST), 1):
        if one.begins and losses:
            table.add_section()
        expected = "  ".join(f"{shown_token(tokenizer, token)} {value:.0%}" for token, value in one.likeliest)
        cells = str(place), f"{one.loss:.2f}", str(one.rank), shown_token(tokenizer, one.target), expected
        table.add_row(*map(_literal, cells))
        losses.append(one.loss)
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


def evaluate_rows(saved: SavedModel, split: str, max_batches: int | None, predictions: int) -> None:
    """Of a task that makes its own examples: measures, prints and logs."""
    from manual_backprop.trained_models.evaluation import log_evaluation, measure_rows

    measured = measure_rows(saved, split, max_batches, predictions)
    print(f"\n{measured.title}")
    for name, value in measured.table:
        print(f"  {name:<13}{value}")
    if measured.predictions:
        print()
    for line in measured.predictions:
        print(f"  {line}")
    tracking = saved.config().tracking.name
    print(f"\n{log_evaluation(saved.found, saved.step, tracking, measured.metrics)}")


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
    parser.add_argument(
        "--predictions", type=whole(1), metavar="N", help="of a task of rows: show the first N, and which are right"
    )
    add_device(parser)
    options = parser.parse(arguments)

    if options.test is not None and options.split != "test":
        parser.error(f"--test {options.test}: says where the test split is; add --split test")

    from manual_backprop.config.schema import SEQUENCES
    from manual_backprop.trained_models.evaluation import evaluation_metrics, log_evaluation, measure, open_part
    from manual_backprop.trained_models.saved_model import load

    saved = load(options.run, device=options.device)
    print(saved.line, flush=True)
    of_texts = {"--test": options.test, "--generate": options.generate, "--tokens": options.tokens}
    if saved.task_name in SEQUENCES:
        if given := [name for name, value in of_texts.items() if value]:
            parser.error(
                f"{given[0]}: is for texts, and this run has learned task={saved.task_name}; use --predictions N"
            )
        evaluate_rows(saved, options.split, options.max_batches, options.predictions or 0)
        return None
    if options.predictions:
        parser.error("--predictions: is for task=reversal, copy and sort; of a text, use --tokens N or --generate")
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
    sys.exit(exit_code_of(main))
