"""Descriptions of datasets from their first rows and their files: splits, columns, sizes, numbers of rows."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import InputError
from ...config.schema import DatasetConfig
from ..sources.documents import BadRow, Document, FileSource, Row, Source, not_utf8, unreadable
from ..sources.files import JsonLines, ParquetFiles, TextFiles, brief, broken, check_column, no_column, row_of, value_of
from ..sources.hub import DatasetSplits, HubSource, hub_access
from ..sources.registry import open_source
from ..tokens.token_shards import load_pretokenized, manifest_of

RAW_BYTES = 1000  # shown of a text file
NO_TEXT = "no text: "  # the beginning of a bad row's sample


@dataclass(frozen=True)
class SplitDescription:
    name: str
    rows: int | None  # None: unknown
    size: int | None  # [bytes]
    columns: dict[str, str]  # name: kind
    samples: list[tuple[str, str]]  # stored form and text of each row


def describe(dataset: DatasetConfig, count: int) -> list[SplitDescription]:
    """The splits with their first `count` rows. From the hub no more rows are downloaded. Raises InputError."""
    if dataset.repository is not None:
        return _of_hub(dataset, count)
    source = open_source(dataset)
    if isinstance(source, DatasetSplits):
        return _of_splits(source, count)
    return [_of_documents(source, count)]


def describe_shards(path: str | Path, count: int) -> list[SplitDescription]:
    """The splits of a folder that `pretokenize` wrote: rows are documents, stored as token ids."""
    described = []
    for name, sizes in manifest_of(path)["splits"].items():
        tokens = load_pretokenized(path, name)
        samples = []
        for number in range(min(count, tokens.documents)):
            ids = tokens.document(number).tolist()
            samples.append((" ".join(map(str, ids)), tokens.tokenizer.decode(ids)))
        size = int(len(tokens) * np.dtype(tokens[:0].dtype).itemsize)
        kind = f"{len(sizes['shards'])} shards, {len(tokens):,} of {tokens[:0].dtype}"
        described.append(SplitDescription(name, tokens.documents, size, {"tokens": kind}, samples))
    return described


def _of_hub(dataset: DatasetConfig, count: int) -> list[SplitDescription]:
    """The splits of a dataset of the hub, streamed; from the cache of `datasets` if streaming fails."""
    try:
        with hub_access():
            return _of_splits(HubSource(replace(dataset, streaming=True, subset_size=max(2, count))), count)
    except InputError as error:
        if "gated" in str(error) or "column" in str(error):
            raise
        with hub_access():
            return _of_splits(HubSource(replace(dataset, streaming=False, subset_size=None)), count)


def _of_splits(source: DatasetSplits, count: int) -> list[SplitDescription]:
    described = []
    for name, split in source.splits.items():
        on_disk = hasattr(split, "data")
        info = (split.info.splits or {}).get(name) if split.info is not None else None
        rows = len(split) if on_disk else getattr(info, "num_examples", None) or None
        size = split.data.nbytes if on_disk else getattr(info, "num_bytes", None) or None
        taken = list(itertools.islice(iter(split), count))
        features = split.features or {key: type(value).__name__ for key, value in (taken[0] if taken else {}).items()}
        if source.column not in features:
            raise no_column(source.where, source.column, features)
        where = f"{source.where}, split {name}, row"
        samples = [
            (_as_json(row), _text(row_of(row.get(source.column), name, f"{where} {number}", source.column)))
            for number, row in enumerate(taken, 1)
        ]
        columns = {key: str(getattr(kind, "dtype", kind)) for key, kind in features.items()}
        described.append(SplitDescription(name, rows, size, columns, samples))
    return described


def _of_documents(source: Source, count: int) -> SplitDescription:
    size = sum(file.status[0] for file in source.files) if isinstance(source, FileSource) else None
    rows, columns = None, {"text": "string"}
    if isinstance(source, ParquetFiles):
        rows, columns = _parquet(source)
    elif isinstance(source, TextFiles):
        rows = len(source.files)
    elif isinstance(source, JsonLines):
        columns = {}
    samples = []
    for raw, text in itertools.islice(zip(_raw(source), _texts(source), strict=False), count):
        samples.append((raw or json.dumps(text), text))
        if isinstance(source, JsonLines):
            columns |= _keys(raw)
    return SplitDescription("train", rows, size, columns, samples)


def _text(row: Row) -> str:
    """The text of a row; for a bad row, the reason."""
    try:
        if isinstance(row, BadRow):
            raise row
        text = row.text
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        assert isinstance(row, Document)
        return f"{NO_TEXT}{not_utf8(row.where or row.name, error)}"
    except BadRow as bad:
        return f"{NO_TEXT}{bad}"
    return text


def _texts(source: Source) -> Iterator[str]:
    try:
        yield from map(_text, source.rows())
    except InputError as error:
        if not isinstance(source, ParquetFiles):
            raise
        yield f"{NO_TEXT}{error}"  # the file could be opened but is damaged inside


def _raw(source: Source) -> Iterator[str]:
    """The stored form of each row; empty if a row is nothing but its text."""
    if isinstance(source, ParquetFiles):
        for file in source.files:
            yield from _raw_parquet(file.path)
    elif isinstance(source, TextFiles | JsonLines):
        for file in source.files:
            try:
                with file.path.open("rb") as opened:
                    if isinstance(source, TextFiles):
                        yield repr(opened.read(RAW_BYTES))
                    else:
                        yield from (line.decode("utf-8", "replace").strip() for line in opened if line.strip())
            except OSError as error:
                raise unreadable(file.path, error) from error
    else:
        yield from itertools.repeat("")


def _raw_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(10):
                for row in range(batch.num_rows):
                    names = batch.schema.names
                    values = [value_of(column[row]) for column in batch]
                    values = [repr(one.object) if isinstance(one, UnicodeDecodeError) else one for one in values]
                    yield _as_json(dict(zip(names, values, strict=True)))
    except (pyarrow.ArrowException, OSError) as error:  # any column may be damaged; the text's may still be intact
        yield from itertools.repeat(f"(damaged: {brief(error)})")


def _parquet(source: ParquetFiles) -> tuple[int, dict[str, str]]:
    import pyarrow
    import pyarrow.parquet

    rows = 0
    columns: dict[str, str] = {}
    for file in source.files:
        try:
            file.path.open("rb").close()
        except OSError as error:
            raise unreadable(file.path, error) from error
        try:
            with pyarrow.parquet.ParquetFile(file.path) as opened:
                count, schema = opened.metadata.num_rows, opened.schema_arrow
        except (pyarrow.ArrowException, OSError) as error:
            raise broken(file.path, error) from error
        check_column(schema, source.column, str(file.path))
        rows += count
        columns |= {field.name: str(field.type) for field in schema}
    return rows, columns


def _keys(line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return {key: type(value).__name__ for key, value in row.items()} if isinstance(row, dict) else {}


def _as_json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)
