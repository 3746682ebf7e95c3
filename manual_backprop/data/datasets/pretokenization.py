"""Writes a dataset as memory-mapped token shards with a manifest: `pretokenize_dataset`.

The text alone decides which document is in which shard, so that any number of workers writes the same bytes. The work
is done in a folder NAME.partial; an interrupted command resumes with the text and the shards in it. The complete folder
appears by one rename.
"""

import glob
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.digests import file_digest, json_digest
from ...common.durable_files import atomic_file, put_in_place, storage_errors, sync_file, write_atomically
from ...common.errors import InputError
from ...common.uris import expanded
from ...config.schema import DatasetConfig
from ..sources.documents import Source
from ..sources.reading import read_documents, selection
from ..sources.registry import open_source
from ..sources.spool import Spool, SpooledText
from ..tokens.pretrained import tokenizer_named
from ..tokens.run_tokenizer import tokenizer_notes
from ..tokens.token_shards import MANIFEST, check_digests, check_shard, manifest_of
from ..tokens.tokenizer import Tokenizer
from .named import check_whole, dataset_named, title_of

log = logging.getLogger(__name__)

PLACE = Path("outputs/pretokenized")
FORMAT = 2  # increased whenever the same text and settings would give other files
SHARD = 2**24  # [bytes] of text in one shard, approximately: only documents longer than that are cut
SPLITS = ("train", "validation")

Progress = Callable[[int, int, int], None]  # shards done, shards in all, tokens so far


class _Stopped(Exception):
    """Another worker failed, or a signal came."""


def pretokenize_dataset(
    name: str | Path | DatasetConfig,
    tokenizer: str | Path | Tokenizer,
    max_length: int | None = None,
    *,
    subset_size: int | None = None,
    output: str | Path | None = None,
    workers: int | None = None,
    progress: Progress = lambda done, shards, tokens: None,
) -> Path:
    """The folder with the token shards of both splits. It is written now, unless it exists and is intact.

    A document longer than `max_length` is cut there; its end token follows the cut. Raises InputError for data that
    cannot be used, and StorageError.

    >>> _ = Path("text.txt").write_text("to be or not to be, that is the question. " * 200)
    >>> tokenizer = train_tokenizer("text.txt", vocab_size=270)
    >>> folder = pretokenize_dataset("text.txt", tokenizer, output="shards", workers=1)
    >>> folder.name, load_pretokenized(folder, "validation").document(0).size > 0
    ('shards', True)
    """
    from filelock import FileLock

    check_whole("max_length", max_length, 1)
    check_whole("workers", workers, 1)
    dataset = name if isinstance(name, DatasetConfig) else dataset_named(name, subset_size=subset_size)
    title = tokenizer.name if isinstance(tokenizer, Tokenizer) else Path(tokenizer).name
    tokens_of = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer_named(tokenizer)
    source = open_source(dataset)
    settings = {
        "format": FORMAT,
        "dataset": selection(dataset, source),
        "on_bad_row": dataset.on_bad_row,
        "tokenizer_digest": tokens_of.digest,
        "max_length": max_length,
    }
    default = PLACE / f"{title_of(dataset)}-{title}-{json_digest(settings)[:8]}"
    folder = default if output is None else expanded(output)
    with storage_errors(f"write {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not _is_there(folder, settings):
                threads = workers or os.cpu_count() or 1
                _make(_Work(folder, dataset, source, tokens_of, settings, threads, progress))
    return folder


def _is_there(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder exists with the same settings. Raises InputError if it holds something else."""
    if not folder.exists():
        return False
    try:
        contents = manifest_of(folder)
        there = contents["settings"]
        for split in SPLITS:
            check_digests(folder, contents, split)
    except InputError as error:
        raise InputError(f"{error} Remove the folder to write it again, or give another --output.") from error
    if there != settings:
        different = ", ".join(key for key in settings if there.get(key) != settings[key])
        raise InputError(f"{folder} holds other tokens (other {different}): remove it, or give another --output.")
    return True


# Writing the shards


@dataclass(frozen=True)
class _Work:
    folder: Path
    dataset: DatasetConfig
    source: Source
    tokenizer: Tokenizer
    settings: dict[str, Any]
    workers: int
    progress: Progress

    @property
    def partial(self) -> Path:
        """The folder of unfinished work, one for each set of settings: work with others cannot be reused."""
        return self.folder.with_name(f"{self.folder.name}.{json_digest(self.settings)[:8]}.partial")


@dataclass(frozen=True)
class _Shard:
    name: str
    spans: np.ndarray  # (spans, 4): begin and end in the text, whether a document ends, and whether one begins there

    def record(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"


def _make(work: _Work) -> None:
    """Write the folder. The caller must have its lock."""
    folder, partial = work.folder, work.partial
    partial.mkdir(exist_ok=True)
    for half in (*partial.glob(".*"), *partial.glob("*.tmp")):  # of a killed process; .tmp: of an older version
        half.unlink()
    try:
        text, parts, notes_and_counts = _text_read_before(partial)
    except (OSError, ValueError, KeyError):
        text, parts, notes_and_counts = _read_text(partial, work)
    lost = tokenizer_notes(work.tokenizer, text.texts(np.concatenate([parts[split] for split in SPLITS])))
    shards = {split: _plan(text, split, parts[split], work.settings["max_length"] is None) for split in SPLITS}
    records = _write_shards(partial, text, shards, work)
    text.close()
    contents = {
        "settings": work.settings,
        "tokenizer": {"vocab_size": work.tokenizer.vocab_size, "end_token_id": work.tokenizer.end_token_id},
        "dtype": np.dtype(work.tokenizer.dtype).name,
        "splits": {split: _split_contents(records[split]) for split in SPLITS},
        **notes_and_counts,
        "notes": [*notes_and_counts["notes"], *lost],
    }
    work.tokenizer.save(partial)
    for unneeded in (
        "text",
        "parts.npz",
        "text.json",
        *(shard.record(partial).name for split in SPLITS for shard in shards[split]),
    ):
        (partial / unneeded).unlink()
    manifest = {"contents": contents, "sha256": json_digest(contents)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    put_in_place(partial, folder)
    for outdated in folder.parent.glob(f"{glob.escape(folder.name)}.*.partial"):  # of other settings or an older text
        shutil.rmtree(outdated, ignore_errors=True)


def _read_text(partial: Path, work: _Work) -> tuple[SpooledText, dict[str, np.ndarray], dict[str, Any]]:
    shutil.rmtree(partial)
    partial.mkdir()
    spool = Spool(partial / "text", skip_bad_rows=work.dataset.on_bad_row == "skip")
    try:
        parts = read_documents(spool, work.source, work.dataset)
    except BaseException:  # an incomplete text cannot be resumed
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            spool.close()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    spool.close()
    np.savez(partial / "parts.npz", train=parts["train"], validation=parts["validation"])
    sync_file(partial / "text")
    sync_file(partial / "parts.npz")
    notes_and_counts = {"notes": [*work.source.notes, *spool.notes()], "counts": spool.counts}
    content = {
        "bytes": (partial / "text").stat().st_size,
        "parts": file_digest(partial / "parts.npz"),
        "said": notes_and_counts,
    }
    write_atomically(partial / "text.json", json.dumps(content).encode())
    return SpooledText(spool.path), parts, notes_and_counts


def _text_read_before(partial: Path) -> tuple[SpooledText, dict[str, np.ndarray], dict[str, Any]]:
    """The text of an interrupted command. Raises OSError, ValueError or KeyError if there is no complete one."""
    content = json.loads((partial / "text.json").read_bytes())
    if content["bytes"] != (partial / "text").stat().st_size or content["parts"] != file_digest(partial / "parts.npz"):
        raise ValueError("the text is incomplete")
    with np.load(partial / "parts.npz", allow_pickle=False) as arrays:
        parts = {split: arrays[split] for split in SPLITS}
    return SpooledText(partial / "text"), parts, content["said"]


def _plan(text: SpooledText, split: str, parts: np.ndarray, may_cut: bool) -> list[_Shard]:
    """The shards of a split, with the spans of text in each."""
    long = parts[:, 1] - parts[:, 0] > SHARD
    if may_cut and long.any():
        spans = np.array([span for part in parts.tolist() for span in _spans(text, *part)], dtype=np.int64)
    else:
        spans = np.column_stack([parts, np.ones(len(parts), dtype=np.int64)])
    spans = np.column_stack([spans, np.concatenate([[1], spans[:-1, 2]])])
    lengths = spans[:, 1] - spans[:, 0]
    numbers = (np.cumsum(lengths) - lengths) // SHARD
    groups = np.split(spans, np.flatnonzero(np.diff(numbers)) + 1)
    return [_Shard(f"{split}-{number:05}", group) for number, group in enumerate(groups)]


def _spans(text: SpooledText, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """A document in spans of about SHARD bytes, cut only where a cut does not change the tokens."""
    place = begin
    if end - begin > SHARD:
        for piece in text.pieces(begin, end):
            place += len(piece.encode("utf-8"))
            if place - begin >= SHARD and place < end:
                yield begin, place, 0
                begin = place
    yield begin, end, 1


def _write_shards(
    partial: Path, text: SpooledText, shards: dict[str, list[_Shard]], work: _Work
) -> dict[str, list[dict[str, Any]]]:
    """Write the missing shards, in threads: the tokenizers library releases Python's global lock."""
    wanted = [shard for split in SPLITS for shard in shards[split]]
    records = {shard.name: record for shard in wanted if (record := _written_before(partial, shard)) is not None}
    left = [shard for shard in wanted if shard.name not in records]
    if records:
        log.info("%d of %d shards were written before", len(records), len(wanted))
    stop = threading.Event()
    executor = ThreadPoolExecutor(work.workers)
    try:
        waiting = {executor.submit(_write_shard, partial, text, shard, work, stop): shard for shard in left}
        for future in as_completed(waiting):
            records[waiting[future].name] = future.result()
            work.progress(len(records), len(wanted), sum(record["tokens"] for record in records.values()))
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)
    return {split: [records[shard.name] for shard in shards[split]] for split in SPLITS}


def _write_shard(partial: Path, text: SpooledText, shard: _Shard, work: _Work, stop: threading.Event) -> dict[str, Any]:
    """Write a shard: NAME.bin holds the tokens, NAME.ends.bin the ends of documents, NAME.json marks both complete."""
    record: dict[str, Any] = {"name": shard.name, "tokens": 0, "bytes": 0, "cut": 0}
    hashed, ends = hashlib.sha256(), [np.zeros(0, dtype=np.int64)]
    with atomic_file(partial / f"{shard.name}.bin") as file:
        for ids, ending, size, cut in _encoded(text, shard.spans, work.tokenizer, work.settings["max_length"]):
            if stop.is_set():
                raise _Stopped
            data = ids.astype(work.tokenizer.dtype).tobytes()
            file.write(data)
            hashed.update(data)
            ends.append(ending + record["tokens"])
            record["tokens"] += len(ids)
            record["bytes"] += size
            record["cut"] += cut
    all_ends = np.concatenate(ends)
    data = all_ends.tobytes()
    write_atomically(partial / f"{shard.name}.ends.bin", data)
    record |= {
        "documents": len(all_ends),
        "sha256": hashed.hexdigest(),
        "ends_sha256": hashlib.sha256(data).hexdigest(),
    }
    write_atomically(shard.record(partial), json.dumps(record).encode())
    return record


def _encoded(
    text: SpooledText, spans: np.ndarray, tokenizer: Tokenizer, max_length: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, int, int]]:
    """Batches of tokens, with the ends of documents in each, the bytes of its text, and the number of cut documents."""
    end = np.array([] if tokenizer.end_token_id is None else [tokenizer.end_token_id], dtype=np.int64)
    begin = np.array(tokenizer.begin_token_ids, dtype=np.int64)
    document = length = 0  # index of the span; its tokens so far, before cutting
    for texts, closes in text.batches(spans[:, :2]):
        arrays, ends, total, size, cut = [np.zeros(0, dtype=np.int64)], [], 0, 0, 0
        for piece, ids, last in zip(texts, tokenizer.encode_many(texts), closes, strict=True):
            if length == 0 and spans[document, 3]:
                ids = np.concatenate([begin, ids])
            kept = ids if max_length is None else ids[: max(0, max_length - length)]
            size += len((piece if len(kept) == len(ids) else tokenizer.decode(kept.tolist())).encode("utf-8"))
            arrays.append(kept)
            total, length = total + len(kept), length + len(ids)
            if last:
                if spans[document, 2]:
                    arrays.append(end)
                    total += len(end)
                    ends.append(total)
                cut += max_length is not None and length > max_length
                document, length = document + 1, 0
        yield np.concatenate(arrays), np.array(ends, dtype=np.int64), size, cut


def _written_before(partial: Path, shard: _Shard) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(shard.record(partial).read_bytes())
        check_shard(partial, record)
        return record
    except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
        return None


def _split_contents(records: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(record[key] for record in records) for key in ("documents", "tokens", "bytes", "cut")}
    return {**sums, "shards": records}
