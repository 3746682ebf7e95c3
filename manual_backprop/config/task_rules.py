"""Rules between a task and the other keys of a config.

`validation.py`, which adds the rules between other keys, calls each function of CHECKS with the values of its keys, if
each of them is valid by itself. It yields one sentence for each violation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from manual_backprop.config.network import multiples
from manual_backprop.config.rules import shown
from manual_backprop.config.schema import (
    DEFAULT_NETWORK,
    FILES,
    FORECASTING,
    HUB,
    LABELLED,
    LABELLED_FORMATS,
    PAIR_FORMATS,
    PAIRS,
    SEQUENCES,
    SERIES,
)

FEWEST_ROWS = 200  # a task that draws sequences needs this many different ones, so that each split gets some
# The datasets that each task can use, the default first
DATASETS = {
    "language_model": ("python_docs", "text", *FILES, "pretokenized", *HUB),
    "translation": PAIRS,
    "forecasting": SERIES,
    "classification": LABELLED,
} | dict.fromkeys(SEQUENCES, ("none",))
# For the tasks that read texts; the others have no tokenizer
DEFAULT_TOKENIZER = dict.fromkeys(("language_model", "translation", "classification"), "bpe")

Check = Callable[..., Iterator[str]]
CHECKS: list[tuple[tuple[str, ...], Check]] = []  # the keys whose values a check takes, and the check


def cross_check(*needed: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS.append((needed, check))
        return check

    return register


def sequence_vocabulary(symbols: int, network: str) -> int:
    """Number of tokens: the symbols, padding, beginning and end; for a decoder also a separator after the source."""
    return symbols + 3 + (network == "decoder")


def longest_row(max_length: int, network: str) -> int:
    """Positions of the longest row: a target with its beginning token; for a decoder source, separator and target."""
    return 2 * max_length + 1 if network == "decoder" else max_length + 1


@cross_check("task.name", "dataset.name", "tokenizer.name", "batching.name")
def the_data_suit_the_task(task: str, dataset: str, tokenizer: str, batching: str) -> Iterator[str]:
    """A task needs a dataset of its kind, or makes its own examples; a task that reads texts needs a tokenizer."""
    datasets, usual = DATASETS[task], DEFAULT_TOKENIZER.get(task)
    if dataset not in datasets:
        others = [name for name, of_task in DATASETS.items() if dataset in of_task and dataset != "none"]
        instead = f", or use task={others[0]}" if others else ""
        if datasets == ("none",):
            yield f"dataset={dataset}: task={task} makes its own examples from the seed; leave dataset out{instead}"
        else:
            known = ", ".join(datasets)
            yield f"dataset={dataset}: task={task} learns from {known}; use dataset={datasets[0]}{instead}"
    if usual is not None and tokenizer == "none":
        yield f"tokenizer={tokenizer}: task={task} reads texts; use tokenizer={usual}, or another"
    if usual is None and tokenizer != "none":
        yield f"tokenizer={tokenizer}: task={task} reads no text; leave tokenizer out"
    if batching != "padded" and not set(datasets) <= set(DATASETS["language_model"]):
        yield f"batching={batching}: task={task} never packs several examples into one row; leave batching out"


@cross_check("task.name", "dataset.subset_size", "dataset.validation", "dataset.max_length", "dataset.on_bad_row")
def own_examples_have_no_dataset(
    task: str, subset_size: Any, validation: Any, max_length: Any, on_bad_row: str
) -> Iterator[str]:
    """A task that makes its own examples takes no settings of a dataset."""
    if task not in SEQUENCES:
        return
    for key, value, instead in (
        ("subset_size", subset_size, "did you mean task.training_rows?"),
        ("validation", validation, "did you mean task.validation_rows?"),
        ("max_length", max_length, "did you mean task.max_length?"),
        ("on_bad_row", None if on_bad_row == "error" else on_bad_row, "leave it out"),
    ):
        if value is not None:
            yield f"dataset.{key}={shown(value)}: task={task} makes its own examples; {instead}"


@cross_check("task.name", "network")
def the_network_suits_the_task(task: str, network: str | None) -> Iterator[str]:
    suiting = (DEFAULT_NETWORK[task], "decoder") if task in SEQUENCES else (DEFAULT_NETWORK[task],)
    if network not in (None, *suiting):
        yield f"network={network}: task={task} needs network={' or '.join(suiting)}; leave it null for {suiting[0]}"


@cross_check("task.name", "task.min_length", "task.max_length", "task.symbols")
def rows_have_a_length(task: str, least: int | None, most: int | None, symbols: int | None) -> Iterator[str]:
    if task not in SEQUENCES or least is None or most is None or symbols is None:
        return
    if least > most:
        yield f"task.min_length={least}: must be at most task.max_length={most}"
    elif most < 60 and (rows := sum(symbols**length for length in range(least, most + 1))) < FEWEST_ROWS:
        yield (
            f"task.max_length={most}: only {rows} different rows have {least} to {most} of {symbols} symbols, too few "
            "for a test split; use longer rows, or more task.symbols"
        )


@cross_check("task.name", "task.max_length", "task.symbols", "network", "model.max_seq_len", "model.vocab_size")
def rows_fit_into_the_network(
    task: str, most: int | None, symbols: int | None, network: str | None, max_seq_len: int, vocab_size: int | None
) -> Iterator[str]:
    if task not in SEQUENCES or most is None or symbols is None:
        return
    network = network or DEFAULT_NETWORK[task]
    needed, tokens = longest_row(most, network), sequence_vocabulary(symbols, network)
    if max_seq_len < needed:
        shorter = (max_seq_len - 1) // 2 if network == "decoder" else max_seq_len - 1
        yield (
            f"model.max_seq_len={max_seq_len}: the longest row of task={task} takes {needed} positions with network="
            f"{network}; use model.max_seq_len={needed}" + (f", or task.max_length={shorter}" if shorter else "")
        )
    if vocab_size not in (None, tokens):
        yield (
            f"model.vocab_size={vocab_size}: task={task} has {tokens} tokens, task.symbols={symbols} and "
            f"{tokens - symbols} of its own; leave it null"
        )


@cross_check("task.name", "init_from")
def only_a_language_model_has_initial_weights(task: str, init_from: str | None) -> Iterator[str]:
    if init_from is not None and task != "language_model":
        yield (
            f"init_from={shown(init_from)}: starts from a language model and its tokenizer, and task={task} uses "
            "another network; leave it out, or resume a run of this task with resume=RUN"
        )


@cross_check("task.name", "dataset.max_length")
def pairs_are_not_cut(task: str, max_length: Any) -> Iterator[str]:
    if task == "translation" and max_length is not None:
        yield (
            f"dataset.max_length={shown(max_length)}: pairs are never cut; model.max_seq_len limits the length of "
            "their sides, and dataset.on_bad_row=skip leaves longer ones out"
        )


@cross_check("dataset.name", "dataset.source_column", "dataset.target_column")
def pairs_have_two_columns(name: str, source: str | None, target: str | None) -> Iterator[str]:
    if name == "pairs" and (source or "source") == (target or "target"):
        yield f"dataset.target_column={shown(target)}: is the column of the sources; name another one for the targets"


@cross_check("dataset.name", "dataset.path", "dataset.format", "dataset.split", "dataset.config", "dataset.revision")
def files_have_a_format(
    name: str, path: str | None, form: str | None, split: str | None, config: str | None, revision: str | None
) -> Iterator[str]:
    """The settings of a dataset of the user's own must suit its format: a file, a saved dataset, or one of the hub."""
    known = {"pairs": PAIR_FORMATS, "labelled": LABELLED_FORMATS}.get(name)
    if known is None:
        return
    if form is not None and form not in known:
        yield f"dataset.format={form}: dataset={name} supports {', '.join(known)}"
    if form not in ("saved", "hub") and split not in (None, "train"):
        yield (
            f"dataset.split={shown(split)}: only dataset.format=saved or hub has splits; leave it out, or give the file"
        )
    for key, value in (("config", config), ("revision", revision)):
        if value is not None and form != "hub":
            yield (
                f"dataset.{key}={shown(value)}: only a dataset of the hub has one; leave it out, or add "
                "dataset.format=hub"
            )
    if form == "hub" and path is not None and path.count("/") != 1:
        yield f"dataset.path={shown(path)}: a dataset of the hub is OWNER/NAME"


@cross_check("dataset.name", "dataset.text_column", "dataset.label_column")
def labels_have_a_column(name: str, text: str | None, label: str | None) -> Iterator[str]:
    if name == "labelled" and (text or "text") == (label or "label"):
        yield f"dataset.label_column={shown(label)}: is the column of the texts; name another one for the labels"


def shares_leave_something(validation: float | str | None, test: float | None) -> Iterator[str]:
    if isinstance(validation, float) and test is not None and validation + test >= 1:
        yield (
            f"dataset.test_share={test:g}: with dataset.validation={validation:g} nothing is left to train on; "
            "together they must be less than 1"
        )


@cross_check("dataset.name", "dataset.validation", "dataset.test_share", "dataset.test")
def labelled_texts_leave_something(
    name: str, validation: float | str | None, test: float | None, file: str | None
) -> Iterator[str]:
    if name not in LABELLED or test is None:
        return
    if file is not None:
        yield f"dataset.test_share={test:g}: dataset.test={shown(file)} is the test split; leave one of them out"
    else:
        yield from shares_leave_something(validation, test)


@cross_check("task.name", "task.shared_tokenizer", "tokenizer.source_path")
def both_sides_have_tokenizers(task: str, shared: bool | None, source_path: str | None) -> Iterator[str]:
    if source_path is not None and (task != "translation" or shared):
        instead = "add task.shared_tokenizer=false" if task == "translation" else "leave it out"
        yield f"tokenizer.source_path={shown(source_path)}: is for the sources' own tokenizer; {instead}"


@cross_check("dataset.name", "dataset.subset_size", "dataset.validation", "dataset.max_length", "dataset.test_share")
def a_series_is_split_by_time(
    dataset: str, subset_size: int | None, validation: float | str | None, max_length: int | None, test: float | None
) -> Iterator[str]:
    if dataset not in SERIES:
        return
    for key, value in (("subset_size", subset_size), ("max_length", max_length)):
        if value is not None:
            yield f"dataset.{key}={shown(value)}: a series is always used as a whole; leave it out, or cut the file"
    if isinstance(validation, float):
        yield from shares_leave_something(validation, test)
    else:
        yield (
            f"dataset.validation={shown(validation)}: for a series this is a share of its steps, those before the test "
            "split; use dataset.validation=0.1"
        )


@cross_check("task.name", "task.history", "task.season", "task.patch", "model.max_seq_len")
def a_window_can_be_read(
    task: str, history: int | None, season: int | None, patch: int | None, max_seq_len: int
) -> Iterator[str]:
    if task not in FORECASTING or history is None or patch is None:
        return
    if history % patch:
        yield (
            f"task.patch={patch}: must divide task.history={history}, since all positions have equally many steps; use "
            f"task.history={multiples(history, patch)}, or task.patch=1"
        )
        return
    if season is not None and history <= season:
        yield (
            f"task.season={season}: must be less than task.history={history}, or the value one season before the last "
            f"is not in it; use task.history={-(-(season + 1) // patch) * patch} at least, or task.season=null"
        )
    if (positions := history // patch) > max_seq_len:
        yield (
            f"model.max_seq_len={max_seq_len}: task.history={history} takes {positions} positions of "
            f"task.patch={patch} steps; use model.max_seq_len={positions}"
        )


@cross_check("task.name", "model.vocab_size", "training.label_smoothing")
def numbers_have_no_tokens(task: str, vocab_size: int | None, label_smoothing: float) -> Iterator[str]:
    if task not in FORECASTING:
        return
    if vocab_size is not None:
        yield f"model.vocab_size={vocab_size}: task={task} reads numbers, not tokens; leave it null"
    if label_smoothing:
        yield (
            f"training.label_smoothing={label_smoothing:g}: the squared error of task={task} has no labels to smooth; "
            "leave it out"
        )
