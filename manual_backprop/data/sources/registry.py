"""The source of documents for a dataset's config: `open_source`."""

from collections.abc import Callable

from ...common.errors import InputError
from ...config.schema import PAIRS, DatasetConfig
from .documents import Source
from .files import JsonLines, ParquetFiles, TextFiles
from .hub import HubSource, SavedDataset
from .python_docs import PythonDocs

KINDS: dict[str, Callable[[str, DatasetConfig], Source]] = {  # by dataset.name; each reads dataset.path
    "text": lambda path, _: TextFiles(path),
    "jsonl": lambda path, config: JsonLines(path, config.text_column or "text"),
    "parquet": lambda path, config: ParquetFiles(path, config.text_column or "text"),
    "saved": SavedDataset,
}


def open_source(dataset: DatasetConfig) -> Source:
    """The source that a config names. It reads nothing yet but the names of files. Raises InputError."""
    if dataset.name == "python_docs":
        return PythonDocs()
    if dataset.name == "pretokenized":
        raise InputError(
            f"{dataset.path} holds tokens, not text: train on them with dataset=pretokenized, or give the text that "
            "was tokenized."
        )
    if dataset.repository is not None:
        return HubSource(dataset)
    if dataset.name in PAIRS:
        raise InputError(f"dataset={dataset.name} holds pairs, not documents: train on it with task=translation.")
    if dataset.name not in KINDS:
        raise InputError(
            f"dataset={dataset.name}: there is no such dataset; use python_docs, {', '.join(KINDS)} or hub."
        )
    if dataset.path is None:
        raise InputError(f"dataset={dataset.name} needs a path: give a file or a folder as dataset.path=PATH.")
    return KINDS[dataset.name](dataset.path, dataset)
