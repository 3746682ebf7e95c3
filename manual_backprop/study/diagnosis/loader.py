"""Checks 1 and 7 for texts: are the loader's labels, batches, order and masks right?

Batches of real text do not show where they come from. So the same loader, with the same settings, also reads a text in
which every token is its own position: 0, 1, 2, ... It has the same documents. Then each row shows the positions from
which it was cut, and the checks are simple comparisons. The batches of the real text are compared with these positions
as well.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...common.batch import Batch
from ...config.schema import RunConfig
from ...data.tokens.corpus import Corpus
from ...data.tokens.order import Order
from ...ops import IGNORED
from .finding import Finding, finding

MOST_TOKENS = 2**18  # of the text that is checked: whole documents, unless the first is longer
MOST_STEPS = 2000
FEW = 8  # fewer windows may be in order by chance
COMPARED = 4  # steps of the real text

OpenOrder = Callable[[Corpus], Order]


@dataclass(frozen=True)
class Rows:
    """The rows of an epoch of the text of positions; -1 where a row has no position, IGNORED as in a batch."""

    inputs: np.ndarray  # (rows, T)
    targets: np.ndarray
    segments: np.ndarray | None
    text: np.ndarray  # where a row has text, computed from the documents


class Loader:
    """The loader of a config, checked with a text of positions."""

    def __init__(self, config: RunConfig, corpus: Corpus, open_order: OpenOrder):
        self.config = config
        training, self.length = config.training, config.model.max_seq_len
        self.rows = training.batch_size * training.gradient_accumulation_steps
        self.corpus = beginning(corpus, min(MOST_TOKENS, MOST_STEPS * self.rows * self.length), self.length)
        self.places = replace(self.corpus, train=np.arange(len(self.corpus.train)))
        self.offsets = np.asarray(self.corpus.train_offsets)
        self.order, self.real = open_order(self.places), open_order(self.corpus)
        self.padded = config.batching.name == "padded"
        longest = config.dataset.max_length
        self.longest: int | None = min(longest or self.length, self.length) if self.padded else longest
        self.following = self._following()
        self.per_epoch = round(self.order.steps(1) * self.rows)  # rows; of documents, at most
        self.steps = [self._step(step) for step in range(-(-self.per_epoch // self.rows))]

    def _following(self) -> np.ndarray:
        """The position that follows each position."""
        following = np.arange(1, len(self.places.train) + 1)
        if not self.padded and self.longest is not None:
            starts, ends = self.offsets[:-1], self.offsets[1:]
            cut = ends - starts > self.longest + 1
            following[starts[cut] + self.longest - 1] = ends[cut] - 1
        return following

    def _step(self, step: int) -> tuple[int, list[Batch]]:
        tokens, batches = self.order.batches(step)
        return tokens, list(batches)

    def _epoch(self) -> Rows:
        """The rows of the first epoch."""
        batches = [batch for _, step in self.steps for batch in step]
        inputs = self._rows([batch.tokens.numpy() for batch in batches])
        targets = self._rows([batch.targets.numpy() for batch in batches])
        segments = [batch.segments.numpy() for batch in batches if batch.segments is not None]
        text = np.full(inputs.shape, True)
        if self.padded:
            documents = np.searchsorted(self.offsets, inputs[:, 0], side="right") - 1
            lengths = np.minimum(np.diff(self.offsets)[documents] - 1, self.longest or self.length)
            text = np.arange(self.length) < lengths[:, None]
        return Rows(inputs, targets, self._rows(segments) if len(segments) == len(batches) else None, text)

    def _rows(self, parts: list[np.ndarray]) -> np.ndarray:
        padded = [np.pad(part, ((0, 0), (0, self.length - part.shape[1])), constant_values=-1) for part in parts]
        return np.concatenate(padded)[: self.per_epoch]

    # Check 1

    def labels(self) -> Finding:
        rows = self._epoch()
        counted = rows.text & (rows.targets != IGNORED)
        inputs, targets = rows.inputs[counted], rows.targets[counted]
        right = targets == self.following[inputs]
        words = f"each of {len(inputs):,} labels is the token after its input"
        if right.all() and len(inputs):
            return finding(1, self._other_targets(), words)
        wrong = f"{int((~right).sum()):,} of {len(inputs):,} labels are not the token after their input"
        if not len(inputs):
            wrong = "no position has a label that counts"
        for offset in (0, 2, -1):
            if len(inputs) and (targets == inputs + offset).mean() > 0.9:
                what = "the inputs themselves, not shifted" if offset == 0 else f"the inputs shifted by {offset}"
                wrong = f"the labels are {what}; each has to be the next token"
        return finding(1, wrong, words)

    def _other_targets(self) -> str | None:
        """What is wrong with the labels of the real text, or None. Skips wrong inputs, which check 7 reports."""
        for step, batch, places in self._real_batches():
            if self._same_inputs(batch, places):
                targets, where = batch.targets.numpy(), places.targets.numpy()
                counted = (targets != IGNORED) & (where != IGNORED)
                if (targets[counted] != self.corpus.train[where[counted]]).any():
                    return f"in step {step + 1} labels are not the tokens at these positions of the text"
        return None

    def _real_batches(self) -> Iterator[tuple[int, Batch, Batch]]:
        """The step, the batch of the real text and that of the positions, for the first steps."""
        for step in range(min(COMPARED, len(self.steps))):
            for batch, places in zip(self.real.batches(step)[1], self.steps[step][1], strict=False):
                yield step, batch, places

    def _same_inputs(self, batch: Batch, places: Batch) -> bool:
        if batch.tokens.shape != places.tokens.shape:
            return False
        text = places.targets.numpy() != IGNORED
        return bool((batch.tokens.numpy() == self.corpus.train[places.tokens.numpy()])[text].all())

    # Check 7

    def order_and_masks(self) -> Finding:
        rows = self._epoch()
        wrong = (
            self._wrong_batches()
            or self._wrong_rows(rows)
            or self._wrong_masks(rows)
            or self._wrong_coverage(rows)
            or self._wrong_shuffling(rows)
            or self._other_inputs()
        )
        kind = "documents, each once" if self.padded else "windows, none twice"
        masks = "documents kept apart" if rows.segments is not None else "nothing masked that counts"
        return finding(7, wrong, f"an epoch of {len(rows.inputs):,} {kind}, in a new order each time; {masks}")

    def _wrong_batches(self) -> str | None:
        """What is wrong with sizes, the row at which each batch begins, or the number of targets; or None."""
        short = not self.padded  # if documents are rows, one step of an epoch may be smaller
        for step, (tokens, batches) in enumerate(self.steps):
            rows, counted = 0, 0
            for batch in batches:
                if batch.first_row != rows:
                    return f"a batch of step {step + 1} says that it begins at row {batch.first_row}; it is row {rows}"
                rows += len(batch.tokens)
                counted += int((batch.targets != IGNORED).sum())
            if 0 < rows < self.rows and not short:
                short = True
            elif rows != self.rows:
                return f"step {step + 1} has {rows} rows; the config asks for {self.rows}"
            if tokens != counted:
                return (
                    f"step {step + 1} has {counted:,} labels that count, and its loss is divided by {tokens:,}: "
                    "padding counts, or text does not"
                )
        return None

    def _wrong_rows(self, rows: Rows) -> str | None:
        """What is wrong with the rows, or None: each must be one stretch of the text, and each row of a padded batch
        must begin where a document begins."""
        torn = (rows.inputs[:, 1:] != self.following[rows.inputs[:, :-1]]) & rows.text[:, 1:]
        if torn.any():
            row, place = (int(number) for number in np.argwhere(torn)[0])
            return f"row {row + 1} of the epoch is not a stretch of the text: it jumps after its token {place + 1}"
        if self.padded and not np.isin(rows.inputs[:, 0], self.offsets).all():
            return "a row does not begin where a document begins"
        return None

    def _wrong_masks(self, rows: Rows) -> str | None:
        ignored = (rows.targets == IGNORED) | (rows.targets == -1)  # or without a position
        if (lost := ignored & rows.text).any():
            return f"{int(lost.sum()):,} labels of text do not count"
        if (extra := ~(ignored | rows.text)).any():
            return f"{int(extra.sum()):,} labels of padding count"
        if not self.config.batching.mask_documents:
            return None
        if rows.segments is None:
            return "batching.mask_documents is set, and the batches keep no documents apart"
        documents = np.searchsorted(self.offsets, rows.inputs, side="right")
        if ((np.diff(documents) != 0) != (np.diff(rows.segments) != 0)).any():
            return "positions that may attend to each other are not those of the same document"
        return None

    def _wrong_coverage(self, rows: Rows) -> str | None:
        times = np.bincount(rows.inputs[rows.text], minlength=len(self.following))
        if times.max() > 1:
            return f"{int((times > 1).sum()):,} tokens are read several times in one epoch, and others not at all"
        documents = int((np.diff(self.offsets) > 1).sum())
        if self.padded and len(rows.inputs) != documents:
            return f"an epoch has {len(rows.inputs):,} of {documents:,} documents"
        return None

    def _wrong_shuffling(self, rows: Rows) -> str | None:
        starts = rows.inputs[:, 0]
        if len(starts) < FEW:
            return None
        if (np.diff(starts) > 0).all() or (np.diff(starts) < 0).all():
            return "the text is read in its own order: it is not shuffled"
        count = len(self.steps)
        again = [batch.tokens[:, 0].numpy() for step in (0, count - 1) for batch in self._step(step)[1]]
        first = [batch.tokens[:, 0].numpy() for step in (0, count - 1) for batch in self.steps[step][1]]
        if any(not np.array_equal(one, other) for one, other in zip(first, again, strict=True)):
            return "the same step has another batch each time it is read: no run could be resumed or repeated"
        both = [batch.tokens[:, 0].numpy() for step in range(2 * count) for batch in self._step(step)[1]]
        second = np.concatenate(both)[len(starts) : 2 * len(starts)]
        shift = starts.min() - second.min()  # the windows of another epoch may be shifted
        if len(second) == len(starts) and np.array_equal(starts, second + shift):
            return "every epoch has the same order"
        return None

    def _other_inputs(self) -> str | None:
        for step, batch, places in self._real_batches():
            if not self._same_inputs(batch, places):
                return f"in step {step + 1} inputs are not the tokens at these positions of the text"
        return None


def beginning(corpus: Corpus, most: int, length: int) -> Corpus:
    """The first training tokens, at most `most`, in whole documents unless the first is longer."""
    offsets, most = np.asarray(corpus.train_offsets), max(most, 2 * length + 1)
    if len(corpus.train) <= most:
        return corpus
    documents = int(np.searchsorted(offsets, most, side="right")) - 1
    kept = offsets[: documents + 1] if documents and offsets[documents] > length else np.array([0, most])
    return replace(corpus, train=corpus.train[: kept[-1]], train_offsets=kept)
