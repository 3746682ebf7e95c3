"""Datasets of the hub and of `datasets.save_to_disk`, through the `datasets` library, and files of the hub.

One request tests whether the hub answers. If it does not, the libraries work offline from their caches and repeat no
request. Every failure ends as one sentence that says what to do.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...common.errors import InputError
from ...common.uris import expanded
from ...config.rules import shown
from ...config.schema import DatasetConfig
from .documents import Document, Files, Row, Source
from .files import ROWS, check_column, find_files, inner_column, no_column, row_of, rows_of

log = logging.getLogger(__name__)

TIMEOUT = 5  # [s] to wait for an answer of the hub
TEST_SPLIT = "test"
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", TEST_SPLIT)  # the first that exists is used


class HubUnavailable(InputError):
    """The hub cannot be reached, or the connection broke, and the data is not in the cache."""


class DatasetSplits(Source[Document]):
    """Named splits of rows with columns, on disk or on the hub. Subclasses open them."""

    def __init__(self, dataset: DatasetConfig, where: str, key: str = "text_column"):
        """The column's name is `dataset.text_column`; `key` is the config key that sets it, for messages."""
        self.dataset, self.where, self.key = dataset, where, key
        self.column = dataset.text_column or "text"
        self.notes: list[str] = []
        if dataset.validation == self.split:
            raise InputError(
                f"dataset.validation={self.split}: the split {self.split!r} of {where} is the training split. Name "
                "another split, or give the share of it to use for validation, as in dataset.validation=0.1."
            )

    @cached_property
    def splits(self) -> dict[str, Any]:
        """The splits by name: each a Dataset or an IterableDataset of the `datasets` library."""
        raise NotImplementedError

    @property
    def split(self) -> str:
        return self.dataset.split or "train"

    def rows(self) -> Iterator[Row]:
        self.check_split(self.split, "dataset.split")
        yield from self._rows(self.split, self.dataset.subset_size)

    @property
    def validation_split(self) -> str | None:
        """The name of the validation split; None if a part of the training split is used."""
        wanted = self.dataset.validation
        if isinstance(wanted, float):
            return None
        if wanted is not None:
            self.check_split(wanted, "dataset.validation")
            return wanted
        return next((name for name in VALIDATION_SPLITS if name in self.splits and name != self.split), None)

    def validation_rows(self) -> Iterator[Row] | None:
        split = self.validation_split
        other = f" but {self.split}, the training split" if self.split in VALIDATION_SPLITS else ""
        if split is None and not isinstance(self.dataset.validation, float):
            self.notes.append(
                f"{self.where} has no validation split{other}: a tenth of its documents is used for validation"
            )
        if split == TEST_SPLIT and self.dataset.validation is None:
            self.notes.append(f"{self.where} has no validation split{other}: its test split is used for validation")
        return None if split is None else self._rows(split, evaluation_subset_size(self.dataset.subset_size))

    def check_split(self, name: str, key: str) -> None:
        if name not in self.splits:
            raise InputError(f"{key}={name}: {self.where} has no such split, only {', '.join(self.splits)}.")

    def _rows(self, split: str, limit: int | None) -> Iterator[Row]:
        """The first `limit` documents of a split; None: all."""
        rows, where = self.splits[split], f"{self.where}, split {split}"
        if hasattr(rows, "data"):  # on disk: read Arrow columns
            check_column(rows.features.arrow_schema, self.column, where, self.key)
            table = rows.select(range(len(rows) if limit is None else min(limit, len(rows))))
            for first in range(0, len(table), ROWS):
                batch = table.with_format("arrow")[first : first + ROWS]
                outer = self.column if self.column in rows.column_names else self.column.partition(".")[0]
                for chunk in batch.column(outer).chunks:
                    yield from rows_of(inner_column(chunk, self.column), split, where, first, self.column)
                    first += len(chunk)
            return
        for number, row in enumerate(rows.take(limit), 1):
            if number == 1 and self.column not in row:
                raise no_column(where, self.column, row, self.key)
            yield row_of(row.get(self.column), f"{split}:{number}", f"{where}, row {number}", self.column)


class HubSource(DatasetSplits):
    """A dataset of the hub: downloaded once into the cache of `datasets`, or streamed up to `subset_size`."""

    def __init__(self, dataset: DatasetConfig, key: str = "text_column"):
        assert dataset.repository is not None
        super().__init__(dataset, dataset.repository, key)
        self.repository = dataset.repository
        if dataset.streaming and dataset.subset_size is None:
            raise InputError(
                f"dataset.streaming=true needs a limit: {self.repository} is stored on disk as tokens, so that a run "
                "can be resumed; give the number of documents with dataset.subset_size=NUMBER."
            )

    def identity(self) -> dict[str, Any]:
        """The identity of the data. A pinned commit needs no request; otherwise the hub resolves the revision."""
        dataset = self.dataset
        pinned = dataset.revision if is_commit(dataset.revision) else None
        return {
            "kind": "hub 1",
            "repository": self.repository,
            "config": dataset.config,
            "split": self.split,
            "column": self.column,
            "revision": pinned or self._builder.hash,
        }

    @cached_property
    def _builder(self) -> Any:
        with hub_access(), self._readable_errors():
            import datasets

            return datasets.load_dataset_builder(self.repository, self.dataset.config, revision=self.dataset.revision)

    @cached_property
    def splits(self) -> dict[str, Any]:
        builder = self._builder
        with hub_access(), self._readable_errors():
            import datasets

            if self.dataset.streaming:
                return dict(builder.as_streaming_dataset())
            builder.download_and_prepare(download_config=datasets.DownloadConfig(max_retries=1))
            return dict(builder.as_dataset())

    def _rows(self, split: str, limit: int | None) -> Iterator[Row]:
        with hub_access(), self._readable_errors():
            yield from super()._rows(split, limit)

    def _unavailable(self) -> HubUnavailable:
        return HubUnavailable(
            f"{self.repository} cannot be downloaded, since the hub cannot be reached, and no copy of it is on "
            "this machine. Go online (HF_HUB_OFFLINE must not be set); or download it elsewhere and copy the "
            "folder that HF_HOME names, or use dataset=text dataset.path=PATH with text of your own."
        )

    def _interrupted(self, error: Exception) -> HubUnavailable:
        again = "" if self.dataset.streaming else ": it resumes the download"
        return HubUnavailable(
            f"{self.repository} cannot be read: the hub answered, and then the connection to it broke off "
            f"({' '.join(str(error.__cause__ or error).split())[:300]}). Give the command again{again}; or download it "
            "elsewhere and use dataset=jsonl, parquet, saved or text with dataset.path=PATH."
        )

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Turn exceptions of `datasets` and its dependencies into an InputError that says what to do."""
        import datasets
        from huggingface_hub.utils import httpx

        try:
            yield
        except datasets.exceptions.DatasetNotFoundError as error:
            text = str(error)
            if "gated" in text:
                raise InputError(
                    f"{self.repository} is gated: accept its conditions on its page on the hub, then log in with "
                    "`hf auth login` or set HF_TOKEN; or download it elsewhere and use dataset=jsonl, parquet, saved "
                    "or text with dataset.path=PATH."
                ) from error
            if "Revision" in text:
                raise InputError(
                    f"dataset.revision={self.dataset.revision}: {self.repository} has no such revision. Give a commit, "
                    "a branch or a tag of it, or null for the newest."
                ) from error
            raise InputError(
                f"{self.repository} is not on the hub, or private: check the spelling (OWNER/NAME), log in with "
                "`hf auth login` if it is yours, or use dataset=text dataset.path=PATH with text of your own."
            ) from error
        except (ConnectionError, httpx.TransportError) as error:
            offline = datasets.config.HF_HUB_OFFLINE  # set by the user, or since the hub did not answer
            raise (self._unavailable() if offline else self._interrupted(error)) from error
        except InputError:
            raise
        except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            if "LocalEntryNotFoundError" in reason:  # the hub answers but does not deliver the file
                raise self._unavailable() from error
            if "BuilderConfig" in reason or "Config name is missing" in reason:
                raise InputError(
                    f"dataset.config={self.dataset.config}: {self.repository} needs another one ({reason[:300]})."
                ) from error
            raise InputError(
                f"{self.repository} cannot be read: {type(error).__name__}: {reason[:300]}. Try again, or download it "
                "elsewhere and use dataset=jsonl, parquet, saved or text with dataset.path=PATH."
            ) from error


class SavedDataset(DatasetSplits):
    """A folder that `datasets.save_to_disk` wrote: one split, or several."""

    def __init__(self, path: str, dataset: DatasetConfig, key: str = "text_column"):
        super().__init__(dataset, path, key)
        self.path = expanded(path)
        self.on_disk = _SavedFiles(find_files(path, "what datasets.save_to_disk wrote"))

    def identity(self) -> dict[str, Any]:
        return self.on_disk.identity() | {"split": self.split, "column": self.column}

    def check_unchanged(self) -> None:
        self.on_disk.check_unchanged()

    @cached_property
    def splits(self) -> dict[str, Any]:
        import datasets

        try:
            loaded = datasets.load_from_disk(str(self.path))
        except IndexError as error:  # `datasets` raises it for an empty list of data files
            raise InputError(
                f"dataset.path={self.path}: the dataset, or one of its splits, has no rows, and such a dataset cannot "
                "be loaded. Save it again, with rows or without that split."
            ) from error
        except Exception as error:  # several libraries raise their own
            raise InputError(
                f"dataset.path={self.path} is not a dataset that can be loaded ({' '.join(str(error).split())[:200]}). "
                "Give the folder that datasets.save_to_disk wrote."
            ) from error
        if isinstance(loaded, datasets.DatasetDict):
            return dict(loaded)
        own = str(loaded.split or "train")  # a single split is the training split by default, whatever its name
        return {self.split if self.split in ("train", own) else own: loaded}


class _SavedFiles(Files):
    version = "saved 1"


def evaluation_subset_size(subset_size: int | None) -> int | None:
    """The number of documents of a split other than the training split: a tenth of `subset_size`."""
    return None if subset_size is None else max(1, subset_size // 10)


def is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def unpinned(dataset: DatasetConfig, commit: str) -> list[str]:
    """A note for the run's log if the config names no commit: it may mean another text later."""
    if dataset.repository is None or is_commit(dataset.revision):
        return []
    return [
        f"dataset.revision={shown(dataset.revision)} pins no commit of {dataset.repository}; this run read {commit}, "
        f"and dataset.revision={commit} reads the same text again"
    ]


@contextmanager
def hub_access() -> Iterator[None]:
    """Within this context the libraries of the hub work online if the hub answers, and from their caches if not.

    The libraries alone would repeat requests for half a minute; here one request decides.
    """
    import datasets
    import huggingface_hub.constants

    modules = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not any(before) and not _hub_answers(huggingface_hub.constants.ENDPOINT):
        _set_offline(modules, [True, True])
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 2
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 1
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        _set_offline(modules, before)


def _set_offline(modules: tuple[Any, ...], values: list[bool]) -> None:
    for module, value in zip(modules, values, strict=True):
        module.HF_HUB_OFFLINE = value


@cache  # one request per process
def _hub_answers(endpoint: str) -> bool:
    """Whether a server answers at this address, with any status. It uses the environment's proxies."""
    import urllib.error
    import urllib.request

    if not _is_address(endpoint):
        raise InputError(
            f"HF_ENDPOINT={shown(endpoint)}: this is not the address of a hub. Give one that begins with https://, "
            "or unset it for huggingface.co."
        )
    request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "manual_backprop"})
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        log.warning("The hub (%s) cannot be reached: only what was downloaded before can be used.", endpoint)
        return False
    return True


def _is_address(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, a missing bracket
        return False


def hub_file(repository: str, name: str, revision: str | None, way_out: str) -> Path:
    """A file of a model's repository, downloaded or from the library's cache. Raises InputError that ends with
    `way_out`, what to do instead."""
    from huggingface_hub import hf_hub_download

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    missing = f"{name} of {repository} was not downloaded before, and the hub cannot be reached. {way_out}"
    with hub_download(missing, f"{name} of {repository}:", f". {way_out}"):
        return Path(hf_hub_download(repository, name, revision=revision))


@contextmanager
def hub_download(missing: str, failed: str, way_out: str) -> Iterator[None]:
    """`hub_access` to download a model's files. Raises HubUnavailable with the message `missing`, or InputError with
    `failed`, the library's reason and `way_out`."""
    with hub_access():
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            yield
        except (LocalEntryNotFoundError, ConnectionError) as error:
            raise HubUnavailable(missing) from error
        except Exception as error:  # the library has a class for each failure: no access, a wrong name
            raise InputError(f"{failed} {' '.join(str(error).split())[:300]}{way_out}") from error
