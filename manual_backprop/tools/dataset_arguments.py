"""What the command lines of the data tools share: how a dataset is named, and how they handle errors and signals."""

import argparse
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ..common.errors import InputError, Interrupted
from ..config.arguments import whole
from ..config.schema import DatasetConfig

DATASETS = """\
DATASET is a name in conf/dataset (python_docs, tinystories, wikitext, ...; tools.download_dataset --list shows all),
OWNER/NAME on the hub, or your own file or folder: .jsonl, .parquet, a folder of datasets.save_to_disk, else text."""

# Errors of the data room name config keys of `run`; these tools have options or other words instead.
_OPTION_OF_KEY = {
    "use dataset=text dataset.path=PATH with text of your own": "give the path of text of your own",
    "use dataset=jsonl, parquet, saved or text with dataset.path=PATH": "give its path instead of the name",
    "dataset.text_column=NAME": "--text-key NAME",
    "dataset.text_column=": "--text-key ",
    "dataset.config=": "--config ",
    "dataset.revision=": "--revision ",
    "dataset.split=": "--split ",
    "dataset.path=": "",
    "use tokenizer=bpe, which is learned from your text, or tokenizer=file tokenizer.path=FOLDER with a tokenizer": (
        "give byte, or the folder of a tokenizer that tools.tokenization train learned, or of one"
    ),
    "tokenizer.path=": "",
    "dataset.on_bad_row=skip": "--skip-bad-rows",
}


_PLAIN = re.compile(r"[\w/.+-]+", re.ASCII)
_NO_TEXT = re.compile(r"null|true|false|[+-]?(inf|nan|[\d._]+(e[+-]?\d+)?)", re.IGNORECASE)


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-key", metavar="NAME", help="the column or JSON key of the text (text)")
    parser.add_argument("--config", metavar="NAME", help="of a hub dataset that has several")
    parser.add_argument("--revision", metavar="COMMIT", help="of a hub dataset (the pinned one, or the newest)")


def add_subset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subset", type=whole(2), metavar="N", help="the first N training documents (all)")


def add_skip_bad_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that are not text, up to 1 %%")


def dataset_of(name: str, options: argparse.Namespace) -> DatasetConfig:
    from ..data.datasets.named import dataset_named

    return dataset_named(
        name,
        subset_size=getattr(options, "subset", None),
        text_column=options.text_key,
        config=options.config,
        revision=options.revision,
        split=getattr(options, "split", None),
        on_bad_row="skip" if getattr(options, "skip_bad_rows", False) else None,
    )


def datasets_of(names: list[str], options: argparse.Namespace) -> list[DatasetConfig]:
    """The datasets of these names. --text-key applies to those with columns, of which there must be at least one."""
    from ..data.datasets.named import dataset_named, has_columns

    columns = [has_columns(dataset_named(name)) for name in names]
    plain = argparse.Namespace(**(vars(options) | {"text_key": None}))
    return [
        dataset_of(name, options if has or not any(columns) else plain)
        for name, has in zip(names, columns, strict=True)
    ]


@contextmanager
def errors_name_options() -> Iterator[None]:
    """A context in which error messages name the options of these tools instead of config keys."""
    try:
        yield
    except InputError as error:
        raise InputError(with_options_for_keys(str(error))) from error


def with_options_for_keys(message: str) -> str:
    for key, option in _OPTION_OF_KEY.items():
        message = message.replace(key, option)
    return message


def pasted(key: str, value: object) -> str:
    """KEY=VALUE that can be pasted into a shell, quoted as the grammar of `run` requires."""
    text = str(value)
    if _PLAIN.fullmatch(text) and not _NO_TEXT.fullmatch(text):
        return f"{key}={text}"
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)  # backslashes before a quote are doubled
    text = re.sub(r"(\\+)$", r"\1\1", text)
    quoted = f"{key}='{text}'"
    return shlex.quote(quoted) if set(quoted) & set('"$`\\!') else f'"{quoted}"'


@contextmanager
def interruptible(left_behind: str) -> Iterator[None]:
    """A context in which a signal stops the work, and incomplete results are removed. `left_behind` is a sentence about
    what remains."""
    from ..common.interruption import Interruption

    with Interruption():
        try:
            yield
        except Interrupted as error:
            name = signal.Signals(error.signal_number).name
            raise Interrupted(error.signal_number, f"{name}: {left_behind}") from error
