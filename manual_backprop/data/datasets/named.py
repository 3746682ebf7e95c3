"""A dataset's config from one name: a name in conf/dataset, OWNER/NAME on the hub, or a local file or folder.

The tools and their functions take such a name as an argument; `run` has the whole group `dataset=` instead.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...common.errors import InputError
from ...common.uris import expanded
from ...config.schema import DatasetConfig, shipped_folder
from ..sources.documents import files_below
from ..tokens.token_shards import is_shards

SOURCE = "source.json"  # beside the splits of a downloaded dataset: where they come from
DATASET_KINDS = ("text", "jsonl", "parquet", "saved", "pretokenized", "hub")  # kinds of datasets, not datasets
LARGEST = 2**31 - 1
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ENDINGS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson", ".json")}


def dataset_named(
    name: str | Path,
    *,
    subset_size: int | None = None,
    text_column: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    split: str | None = None,
    on_bad_row: str | None = None,
) -> DatasetConfig:
    """The config of a dataset. Raises InputError for an unknown name. It reads and downloads nothing."""
    check_whole("subset_size", subset_size, 1)
    dataset = _base(str(name))
    if (config or revision) and dataset.repository is None:
        raise InputError(f"{name} is not on the hub: it has no config and no revision; leave them out.")
    if split and dataset.repository is None and dataset.name != "saved":
        raise InputError(f"{name} has no named splits: leave the split out.")
    if text_column and not has_columns(dataset):
        raise InputError(f"{name} is plain text and has no columns: leave the text column out.")
    given: dict[str, Any] = {
        "subset_size": subset_size,
        "text_column": text_column,
        "config": config,
        "revision": revision,
        "split": split,
        "on_bad_row": on_bad_row,
    }
    return replace(dataset, **{key: value for key, value in given.items() if value is not None})


def check_whole(what: str, value: object, least: int) -> None:
    """Raise InputError unless `value` is None (not given) or a whole number of at least `least`."""
    if value is not None and (type(value) is not int or not least <= value <= LARGEST):
        raise InputError(f"{what}={value!r}: must be a whole number from {least} to {LARGEST}.")


def has_columns(dataset: DatasetConfig) -> bool:
    return dataset.name not in ("python_docs", "text", "pretokenized")


def short_name(name: str | Path) -> str:
    """The last part of a path or a hub name, without a suffix, for use in file names."""
    last = Path(str(name).rstrip("/")).name
    for endings in (*_ENDINGS.values(), (".txt",)):
        for ending in endings:
            last = last.removesuffix(ending)
    return re.sub(r"[^\w.-]+", "_", last).strip(".") or "data"


def title_of(dataset: DatasetConfig) -> str:
    """The name of a dataset for use in file names."""
    return short_name(dataset.path or (dataset.repository if dataset.name == "hub" else None) or dataset.name)


def shipped_datasets() -> Iterator[tuple[str, str, DatasetConfig]]:
    """The name, the description and the config of each dataset in conf/dataset, without the kinds in DATASET_KINDS."""
    for file in sorted((shipped_folder("conf") / "dataset").glob("*.yaml")):
        if file.stem not in DATASET_KINDS:
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            yield file.stem, first.removeprefix("#").strip(), _shipped(file.stem)


def _base(name: str) -> DatasetConfig:
    if not name.strip():
        raise InputError("No dataset was given: give a name, OWNER/NAME on the hub, or a file or folder that exists.")
    names = [file.stem for file in (shipped_folder("conf") / "dataset").glob("*.yaml")]
    if name in names and name not in DATASET_KINDS:
        return _shipped(name)
    path = expanded(name)
    if os.path.exists(path):  # unlike Path.exists, False if permission is denied
        return _of_path(path)
    if name in DATASET_KINDS:
        raise InputError(f"{name} is a kind of dataset: give the file or folder itself, or OWNER/NAME.")
    if _HUB_NAME.fullmatch(name):
        shipped = [
            dataset for _, _, dataset in shipped_datasets() if (dataset.repository or "").lower() == name.lower()
        ]
        if shipped:  # with its column, pinned revision and streaming
            return shipped[0]
        return DatasetConfig("hub", repository=name, split="train", text_column="text", streaming=False)
    from ...config.rules import nearest

    meant = nearest(name, [known for known in names if known not in DATASET_KINDS])
    raise InputError(
        f"{name}: no dataset has this name" + (f"; did you mean {meant}?" if meant else ".") + " Known are "
        f"{', '.join(sorted(set(names) - set(DATASET_KINDS)))}; or give OWNER/NAME on the hub, or an existing file or "
        "folder."
    )


def _shipped(name: str) -> DatasetConfig:
    from omegaconf import OmegaConf

    content: Any = OmegaConf.load(shipped_folder("conf") / "dataset" / f"{name}.yaml")
    return DatasetConfig(**content)


def _of_path(path: Path) -> DatasetConfig:
    """The config of a file or folder, by the suffix of the file, or of any file in the folder. The suffix .json counts
    only if all files have it, since many folders hold a .json with settings. A folder that `datasets` saved is
    recognized by the files of that library."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        source = source_of(path)
        column = str(source.get("text_column") or "text")
        return DatasetConfig("saved", str(path), split=split_to_train(source), text_column=column)
    if is_shards(path):
        return DatasetConfig("pretokenized", str(path))
    names = [file.name.lower() for file in (files_below(path) if path.is_dir() else [path])]
    for kind, endings in _ENDINGS.items():
        rows = [name for name in names if name.endswith(endings)]
        if rows and (len(rows) == len(names) or not all(name.endswith(".json") for name in rows)):
            return DatasetConfig(kind, str(path), text_column="text")
    return DatasetConfig("text", str(path))


def split_to_train(source: dict[str, Any]) -> str | None:
    """The split of a downloaded dataset to train on, if none is called `train`; else None."""
    rows = source.get("rows")
    return None if not isinstance(rows, dict) or "train" in rows else next(iter(rows), None)


def source_of(folder: Path) -> dict[str, Any]:
    """The record that `download_dataset` wrote beside the splits; empty if another program wrote the folder."""
    try:
        found = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
