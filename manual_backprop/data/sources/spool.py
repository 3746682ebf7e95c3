"""All documents of a source, one after the other in one file, and their split into training and validation.

A source is read once: it may be a stream, or a file that changes. Everything later (the sample for a tokenizer, the
split, the tokens) reads this file in pieces, so that memory does not grow with the text.
"""

import hashlib
import logging
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...common.errors import BadRowError, InputError
from .documents import BadRow, Document, Row, not_utf8

log = logging.getLogger(__name__)

FEWEST_DOCUMENTS_TO_SPLIT = 20  # with fewer, the sizes of the splits would be left to chance
PIECE = 2**18  # [bytes] of text read at once
BATCH = 2**21  # [characters] of text encoded at once
SAMPLE = 32 * 2**20  # [bytes] of text, evenly spread, that BPE learns from; a shorter text is used as a whole
MOST_BAD_ROWS = 0.01  # largest share of bad rows, with dataset.on_bad_row=skip
ROWS_TO_JUDGE = 10_000  # number of rows to read before too many bad ones end the reading early


class SpooledText:
    """A file of text, read by byte positions; several threads may read it at once."""

    def __init__(self, path: Path, mode: Literal["rb", "w+b"] = "rb"):
        self.path = path
        self._file: Any = path.open(mode, buffering=2**20)

    def close(self) -> None:
        self._file.close()

    def pieces(self, begin: int, end: int) -> Iterator[str]:
        """The text between two byte positions, in pieces that give the same tokens of byte-level BPE as the whole.

        A piece ends before a space that a visible character follows: the regular expression that splits text into words
        never matches across this place, nor looks back across it. If a piece has no such place, it ends anywhere.
        """
        place = begin
        while place < end:
            data = os.pread(self._file.fileno(), min(PIECE, end - place), place)
            if place + len(data) == end:
                yield data.decode("utf-8")
                return
            whole = len(data)
            while data[whole - 1] & 0xC0 == 0x80:
                whole -= 1
            whole -= data[whole - 1] >= 0xC0  # an incomplete character is left to the next piece
            text = data[:whole].decode("utf-8")
            border = text.rfind(" ")
            while border > 0 and (border + 1 == len(text) or text[border + 1].isspace()):
                border = text.rfind(" ", 0, border)
            if border > 0:
                text = text[:border]
            yield text
            place += len(text.encode("utf-8"))

    # Below, `parts` (documents, 2) are parts of the text, as rows (begin, end) of byte positions

    def texts(self, parts: np.ndarray) -> Iterator[str]:
        """The text of parts, in pieces."""
        for begin, end in parts.tolist():
            yield from self.pieces(begin, end)

    def sample(self, parts: np.ndarray) -> Iterator[str]:
        """The text of parts for training a tokenizer; of more than SAMPLE bytes, evenly spread pieces with about that
        size."""
        share = min(1.0, SAMPLE / max(1, int((parts[:, 1] - parts[:, 0]).sum())))
        seen = taken = 0
        for text in self.texts(parts):
            size = len(text.encode("utf-8"))
            if taken <= seen * share:
                taken += size
                yield text
            seen += size

    def batches(self, parts: np.ndarray) -> Iterator[tuple[list[str], list[bool]]]:
        """Batches of a few megabytes of text in pieces, and for each piece whether a document ends with it."""
        texts: list[str] = []
        closes: list[bool] = []
        size = 0
        for text, closing in self._closing_pieces(parts):
            texts.append(text)
            closes.append(closing)
            size += len(text)
            if size >= BATCH:
                yield texts, closes
                texts, closes, size = [], [], 0
        if texts:
            yield texts, closes

    def _closing_pieces(self, parts: np.ndarray) -> Iterator[tuple[str, bool]]:
        for begin, end in parts.tolist():
            previous = None  # delayed by one piece, to know whether it is the last
            for text in self.pieces(begin, end):
                if previous is not None:
                    yield previous, False
                previous = text
            assert previous is not None
            yield previous, True


class Spool(SpooledText):
    """Writes the text of documents into a file. `counts` has the numbers of rows, and of bad and empty ones."""

    def __init__(self, path: Path, skip_bad_rows: bool = False):
        super().__init__(path, "w+b")
        self.skip_bad_rows = skip_bad_rows
        self.ends = array("q")  # [bytes] where each document ends in the file
        self.characters = array("q")  # of each document
        self.places = array("Q")  # a hash of each document's name
        self.counts = {"rows": 0, "bad_rows": 0, "empty_documents": 0}
        self.first_bad_row: str | None = None
        self._size = 0

    def __len__(self) -> int:
        return len(self.ends)

    def notes(self) -> list[str]:
        """Sentences about the rows that were left out."""
        counts = self.counts
        notes = []
        bad, empty = counts["bad_rows"], counts["empty_documents"]
        if bad:
            which = "" if bad == 1 else ", the first"
            notes.append(f"{_left_out(bad, 'bad row', counts['rows'])}{which}: {self.first_bad_row}")
        if empty:
            notes.append(_left_out(empty, "empty document", counts["rows"]))
        return notes

    def read(self, rows: Iterable[Row]) -> None:
        """Add documents. Raises InputError for a bad row; if bad rows are skipped, for too many of them."""
        for row in rows:
            self.counts["rows"] += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                self._add(row)
            except BadRow as bad:
                self._note(bad)
        self._check_bad_rows()
        self._file.flush()

    def _add(self, document: Document) -> None:
        begin, characters = self._size, 0
        try:
            for piece in document.pieces:
                data = piece.encode("utf-8")
                self._file.write(data)
                self._size, characters = self._size + len(data), characters + len(piece)
        except (BadRow, UnicodeEncodeError) as error:
            self._file.seek(begin)
            self._file.truncate()
            self._size = begin
            if isinstance(error, BadRow):
                raise
            raise not_utf8(document.where or document.name, error) from error
        if characters == 0:
            self.counts["empty_documents"] += 1
            log.info("%s is empty", document.where or document.name)
            return
        self.ends.append(self._size)
        self.characters.append(characters)
        self.places.append(int.from_bytes(_place(document.name)[:8], "big"))

    def _note(self, bad: BadRow) -> None:
        if not self.skip_bad_rows:
            raise BadRowError(
                bad,
                "Correct it, or leave such rows out with dataset.on_bad_row=skip, which counts them and allows no more "
                f"than {MOST_BAD_ROWS:.0%} of all rows.",
            ) from bad
        self.counts["bad_rows"] += 1
        self.first_bad_row = self.first_bad_row or str(bad)
        log.info("left out: %s", bad)
        if self.counts["rows"] >= ROWS_TO_JUDGE:
            self._check_bad_rows()

    def _check_bad_rows(self) -> None:
        rows, bad = self.counts["rows"], self.counts["bad_rows"]
        if bad > MOST_BAD_ROWS * rows:
            raise InputError(
                f"{bad} of {rows} rows {'is' if bad == 1 else 'are'} bad, more than the {MOST_BAD_ROWS:.0%} that "
                f"dataset.on_bad_row=skip leaves out. The first: {self.first_bad_row}. Correct such rows, or remove "
                "them or their files from the data."
            )

    # Parts of the text, as rows (begin, end) of byte positions

    def parts(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """The parts that are documents number `first` to `last` - 1."""
        ends = np.frombuffer(self.ends, dtype=np.int64)
        begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        return np.stack([begins, ends], axis=1)[first:last]

    def split(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """The parts of the training split and those of the validation split, which are disjoint. Raises InputError.

        20 documents or more are visited in the order of a hash of their names; each that still fits into the `share` of
        all characters goes to validation. So a document mostly stays in its split when others are added or removed, and
        a very long one goes to training. Fewer documents are taken as one text, whose last characters go to validation.
        """
        lengths = np.frombuffer(self.characters, dtype=np.int64)
        if len(self) < FEWEST_DOCUMENTS_TO_SPLIT:
            return self._cut(lengths, share)
        room, shortest = int(lengths.sum() * share), int(lengths.min())
        chosen = np.zeros(len(self), dtype=bool)
        for number in np.argsort(np.frombuffer(self.places, dtype=np.uint64), kind="stable"):
            if lengths[number] <= room:
                room -= int(lengths[number])
                chosen[number] = True
            elif room < shortest:
                break
        parts = self.parts()
        if not chosen.any() or chosen.all():
            raise InputError(f"A share of {share:g} of {len(self)} documents leaves nothing to validate on.")
        return parts[~chosen], parts[chosen]

    def _cut(self, lengths: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        total = int(lengths.sum())
        border = total - -(-total * round(share * 10**6) // 10**6)  # in whole numbers: 1,003,854 of 1,115,394
        if border == 0:
            raise InputError(
                f"There {'is' if total == 1 else 'are'} only {total} {'character' if total == 1 else 'characters'} of "
                "text, too few for training and validation: give more text."
            )
        before = np.cumsum(lengths) - lengths
        at = int(np.searchsorted(before, border, side="right")) - 1  # the document that holds the border
        parts = self.parts()
        begin, left = int(parts[at][0]), border - int(before[at])
        place = begin
        for piece in self.pieces(begin, int(parts[at][1])):
            place += len(piece[:left].encode("utf-8"))
            left -= min(left, len(piece))
        training = np.concatenate([parts[:at], [[begin, place]]])
        validation = np.concatenate([[[place, parts[at][1]]], parts[at + 1 :]])
        return _not_empty(training), _not_empty(validation)


def _not_empty(parts: np.ndarray) -> np.ndarray:
    return parts[parts[:, 1] > parts[:, 0]]


def _place(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _left_out(count: int, what: str, among: int) -> str:
    return f"{count} {what}{'' if count == 1 else 's'} of {among} {'was' if count == 1 else 'were'} left out"
