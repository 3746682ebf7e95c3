"""Downloads a dataset of the hub into a folder that `dataset=saved` reads.

Rows come through the `datasets` library and its cache; an interrupted download resumes in the middle of a file
(`hub_files`). A stream is not cached by the library: its rows are saved in shards beside the folder, and a resumed
download starts after the last shard. The complete folder appears by one rename.
"""

import glob
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...common.digests import json_digest
from ...common.durable_files import new_folder, storage_errors, sync_file
from ...common.errors import InputError
from ...common.uris import expanded
from ...config.schema import DatasetConfig
from ..sources.files import no_column
from ..sources.hub import HubSource, evaluation_subset_size, hub_access
from ..sources.hub_files import fetch_files
from .named import SOURCE, source_of, title_of

DATASETS = Path("outputs/datasets")
SHARD = 10_000  # rows of a stream in one shard
POSITION = "position.json"  # state of the stream after a shard


@dataclass(frozen=True)
class Downloaded:
    folder: Path
    source: dict[str, Any]  # the content of SOURCE: repository, revision, settings, rows of each split
    was_there: bool  # from an earlier download


def download(
    dataset: DatasetConfig,
    split: str | None = None,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Downloaded:
    """Download all splits of a dataset, or one. Raises InputError if it is not available, and StorageError."""
    from filelock import FileLock

    if dataset.repository is None:
        where = "is part of every Python installation" if dataset.name == "python_docs" else "is on this machine"
        raise InputError(f"{title_of(dataset)} {where}: there is nothing to download.")
    folder = DATASETS / title_of(dataset) if output is None else expanded(output)
    source = HubSource(dataset)
    if dataset.subset_size is not None and not dataset.streaming and not Path(source._builder.cache_dir).exists():
        dataset = replace(dataset, streaming=True)  # do not download the rest
        source = HubSource(dataset)
    identity = source.identity()
    wanted = {
        "repository": dataset.repository,
        "config": dataset.config,
        "revision": identity["revision"],
        "split": split,
        "subset_size": dataset.subset_size,
        "text_column": source.column,
    }
    if not folder.exists():
        say(f"{dataset.repository}, revision {identity['revision']}")
        if not dataset.streaming:
            with hub_access(), source._readable_errors():
                fetch_files(source._builder, say)
        else:
            say(f"streamed: downloads only the parts of its files with the first {dataset.subset_size:,} rows")
        _check_split(source, split)  # downloads the data, so that a failure comes before anything is written
    with storage_errors(f"write {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.exists():
                return Downloaded(folder, _checked_source(folder, wanted), True)
            return Downloaded(folder, _save(source, wanted, folder, say), False)


def _checked_source(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The source of an existing folder. Raises InputError if it is not what is wanted."""
    there = source_of(folder)
    if different := [key for key in wanted if there.get(key) != wanted[key]]:
        what = ", ".join(different) if there else "it was not downloaded by this command"
        raise InputError(f"{folder} exists and holds other data ({what}): remove it, or give another --output.")
    return there


def _check_split(source: HubSource, split: str | None) -> None:
    """Raises InputError if the dataset has no such split, or no such text column."""
    if split is not None and split not in source.splits:
        raise InputError(f"--split {split}: {source.where} has no such split, only {', '.join(source.splits)}.")
    if source.column not in (columns := next(iter(source.splits.values())).features or {source.column: None}):
        raise no_column(source.where, source.column, columns)


def _save(source: HubSource, wanted: dict[str, Any], folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes the folder, and returns the content of its SOURCE."""
    kept = folder.with_name(f".{folder.name}.{json_digest(wanted)[:8]}.partial")  # shards of a stream
    with new_folder(folder) as staged:
        import datasets

        splits = source.splits
        names = list(splits) if wanted["split"] is None else [wanted["split"]]
        tables, rows = {}, {}
        for name in names:
            size = wanted["subset_size"]
            limit = size if name == source.split or len(names) == 1 else evaluation_subset_size(size)
            tables[name] = _table(source, splits[name], limit, kept / name, say)
            rows[name] = len(tables[name])
            say(f"{name}: {rows[name]:,} rows")
        datasets.DatasetDict(tables).save_to_disk(str(staged))
        content = wanted | {"rows": rows}
        (staged / SOURCE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for outdated in folder.parent.glob(f"{glob.escape(f'.{folder.name}')}.*.partial"):  # also those of other settings
        shutil.rmtree(outdated, ignore_errors=True)
    return content


def _table(source: HubSource, split: Any, limit: int | None, kept: Path, say: Callable[[str], None]) -> Any:
    """The first `limit` rows as a Dataset on disk: from the library's cache, or taken from a stream."""
    if hasattr(split, "data"):
        return split if limit is None or limit >= len(split) else split.select(range(limit))
    with hub_access(), source._readable_errors():
        return _taken_from_stream(split if limit is None else split.take(limit), kept, say)


def _taken_from_stream(stream: Any, kept: Path, say: Callable[[str], None]) -> Any:
    """All rows of an IterableDataset, saved in shards below `kept`, each with the state of the stream after it. Shards
    of an earlier attempt are reused."""
    import datasets

    shards = [datasets.load_from_disk(str(folder)) for folder in sorted(kept.glob("?????"))]
    features = shards[0].features if shards else stream.features
    if shards:
        say(f"{kept.name}: resuming after the first {sum(map(len, shards)):,} rows")
        stream.load_state_dict(json.loads((kept / f"{len(shards) - 1:05}" / POSITION).read_bytes()))
    rows: list[Any] = []

    def keep() -> None:
        folder = kept / f"{len(shards):05}"
        staged = folder.with_suffix(".staged")
        shutil.rmtree(staged, ignore_errors=True)  # left by a killed process
        shard = datasets.Dataset.from_list(rows, features=features or (shards[0].features if shards else None))
        shard.save_to_disk(str(staged))
        (staged / POSITION).write_text(json.dumps(stream.state_dict()), encoding="utf-8")
        for file in staged.iterdir():
            sync_file(file)
        staged.rename(folder)
        shards.append(datasets.load_from_disk(str(folder)))
        rows.clear()

    for row in stream:
        rows.append(row)
        if len(rows) == SHARD:
            keep()
    if rows or not shards:
        keep()
    return datasets.concatenate_datasets(shards)
