"""The page about one step of an encoder alone: a label of a text, or the next values of a series."""

import math

import torch

from ... import ops
from ...common.batch import EncoderBatch
from .numbers import decimal
from .page import Page, vocabulary
from .words import ENCODERS


class EncoderPage(Page):
    """`names.outputs` are the labels, or the steps that are forecast. What else the introduction says are facts."""

    updated = "head.weight"
    outcome = "outcome_of_encoder"

    @property
    def batch(self) -> EncoderBatch:
        assert isinstance(self.traced.batch, EncoderBatch)
        return self.traced.batch

    @property
    def targets(self) -> list[str]:
        """The target of each output; of classes, the label of each, the true one in bold."""
        if self._predicts_numbers:
            return [written(number) for number in self.batch.targets[0].tolist()]
        true = self.names.outputs[int(self.batch.targets)]
        return [f"**{label}**" if label == true else label for label in self.names.outputs]

    @property
    def _predicts_numbers(self) -> bool:
        return self.traced.network.config.predicts_numbers

    def _beside_the_loss(self) -> str:
        if self._predicts_numbers:
            simple, _ = ops.squared_error_forward(torch.zeros_like(self.batch.targets), self.batch.targets)
            return f"The simple forecast, which is to say 0, would cost {decimal(float(simple))}."
        labels = len(self.names.outputs)
        return f"Guessing among {labels} labels would cost log {labels} = {decimal(math.log(labels))}."

    def _introduction(self) -> list[str]:
        config, read, outputs = self.traced.network.config, self.names.read, self.names.outputs
        numbers, words = self._predicts_numbers, self.names.vocabulary
        sizes = ["1 series" if numbers else "1 text", f"{len(read)} positions"]
        sizes += [f"{config.n_inputs} numbers read at each"] if numbers else []
        sizes += [f"{config.d_model} numbers in its vector", f"{config.n_heads} heads"]
        sizes += [f"{config.d_head} numbers in a head", f"{config.d_ffn} hidden units"]
        sizes += [f"{len(outputs)} steps ahead"] if numbers else [f"{len(words)} words", f"{len(outputs)} labels"]
        facts = {
            "sizes": f"| {' | '.join(sizes)} | B T = {len(read)} positions in all |",
            "architecture": ENCODERS[config.architecture],
        }
        if numbers:
            return self._introducing("introduction_of_series", facts)
        facts |= {
            "text": " ".join(read),
            "label": outputs[int(self.batch.targets)],
            "labels": ", ".join(f"`{label}`" for label in outputs),
            "vocabulary": vocabulary(words, read),
        }
        return self._introducing("introduction_of_labels", facts)

    def _loss(self) -> float:
        if self._predicts_numbers:
            return float(ops.squared_error_forward(self._outputs(), self.batch.targets)[0])
        return super()._loss()

    def _said(self) -> list[float]:
        """The probability of each label, or each forecast, computed by the twin."""
        outputs = self._outputs()[0]
        return (outputs if self._predicts_numbers else outputs.softmax(-1)).tolist()

    def _said_before_and_after(self, before: list[float], after: list[float]) -> list[str]:
        rows = zip(self.names.outputs, self.targets, before, after, strict=True)
        if self._predicts_numbers:
            lines = ["| week | it should say | before | after |", "|---|--:|--:|--:|"]
            return lines + [
                f"| {week} | {wanted} | {decimal(old)} | {decimal(new)} |" for week, wanted, old, new in rows
            ]
        lines = ["| label | probability before | after |", "|---|--:|--:|"]
        return lines + [f"| {label} | {decimal(old)} | {decimal(new)} |" for _, label, old, new in rows]


def written(number: float) -> str:
    return "not known" if math.isnan(number) else decimal(number)
