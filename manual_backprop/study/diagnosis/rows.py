"""Checks 1 and 7 for tasks whose examples are rows: a source and a target, or a sequence and one answer. They test what
must hold for the batches of every such task.
"""

import numpy as np
import torch

from ...common.batch import AnyBatch, EncoderBatch, PairBatch
from ...config.schema import RunConfig
from ...data.tokens.order import Order
from ..gradient_check.network_case import counted, counting, tensors_of
from .finding import Finding, finding

MOST_STEPS = 100  # of an epoch
COMPARED = 3  # steps that are read twice


class RowLoader:
    """The loader of a config's rows. `outputs`: the number of classes or tokens."""

    def __init__(self, config: RunConfig, order: Order, outputs: int):
        self.order, self.outputs = order, outputs
        self.rows = config.training.batch_size * config.training.gradient_accumulation_steps
        self.per_epoch = max(1, round(order.steps(1)))
        self.steps = [self._step(step) for step in range(min(self.per_epoch, MOST_STEPS))]

    def _step(self, step: int) -> tuple[int, list[AnyBatch]]:
        count, batches = self.order.batches(step)
        return int(count), list(batches)

    # Check 1

    def labels(self) -> Finding:
        batches = [batch for _, step in self.steps for batch in step]
        labels = torch.cat([batch.targets[counting(batch)] for batch in batches])
        if not len(labels):
            return finding(1, "no label counts", "")
        if wrong := next(filter(None, map(self._wrong_labels, batches)), None):
            return finding(1, wrong, "")
        if isinstance(batches[0], EncoderBatch):
            different = len(labels.unique())
            words = f"{len(labels):,} answers, {different:,} different ones"
            return finding(1, f"{words}: there is nothing to distinguish" if different < 2 else None, words)
        return finding(1, None, f"{len(labels):,} labels, each of them the next input of its row")

    def _wrong_labels(self, batch: AnyBatch) -> str | None:
        counts, targets = counting(batch), batch.targets
        if targets.is_floating_point():
            return "labels are not finite" if not bool(targets[counts].isfinite().all()) else None
        if bool(((targets < 0) | (targets >= self.outputs))[counts].any()):
            return f"labels are not among the {self.outputs:,} outputs of the network"
        if isinstance(batch, PairBatch):
            both = counts[:, :-1] & counts[:, 1:]
            if bool((targets[:, :-1] != batch.tokens[:, 1:])[both].any()):
                return "labels are not the inputs shifted by one: each has to be the token that follows in its row"
        return None

    # Check 7

    def order_and_masks(self) -> Finding:
        wrong = self._wrong_batches() or self._wrong_lengths() or self._wrong_shuffling()
        rows = sum(len(batch.targets) for _, step in self.steps for batch in step)
        return finding(7, wrong, f"{rows:,} rows of an epoch, in a new order each time; padding does not count")

    def _wrong_batches(self) -> str | None:
        """What is wrong with the row at which a batch begins, its size, or the divisor of the loss; or None."""
        for step, (count, batches) in enumerate(self.steps):
            rows = labels = 0
            for batch in batches:
                if batch.first_row != rows:
                    return f"a batch of step {step + 1} says that it begins at row {batch.first_row}; it is row {rows}"
                rows += len(batch.targets)
                labels += counted(batch)
            if not 0 < rows <= self.rows:
                return f"step {step + 1} has {rows} rows; the config asks for {self.rows}"
            if labels != count:
                return f"step {step + 1} has {labels:,} labels that count, and its loss is divided by {count:,}"
        return None

    def _wrong_lengths(self) -> str | None:
        for _, batches in self.steps:
            for batch in batches:
                if isinstance(batch, PairBatch | EncoderBatch):
                    lengths = batch.lengths if isinstance(batch, EncoderBatch) else batch.source_lengths
                    width = (batch.inputs if isinstance(batch, EncoderBatch) else batch.source).shape[1]
                    if bool((lengths > width).any()) or int(lengths.max()) != width:
                        return f"a batch is {width} positions wide, and its longest row has {int(lengths.max())}"
        return None

    def _wrong_shuffling(self) -> str | None:
        for step in range(min(COMPARED, len(self.steps))):
            if not _same(self.steps[step][1], self._step(step)[1]):
                return "the same step has another batch each time it is read: no run could be resumed or repeated"
        if self.per_epoch > COMPARED:
            again = [self._step(self.per_epoch + step)[1] for step in range(COMPARED)]
            if all(_same(self.steps[step][1], batches) for step, batches in enumerate(again)):
                return "every epoch has the same order"
        return None


def _same(one: list[AnyBatch], other: list[AnyBatch]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point())
        for first, second in zip(one, other, strict=True)
        for a, b in zip(tensors_of(first).values(), tensors_of(second).values(), strict=True)
    )
