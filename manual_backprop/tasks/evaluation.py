"""Loss and accuracy of a model on a split, and the losses of a unigram and a bigram model on the same tokens.

The unigram model knows how frequent each token is, the bigram model how frequent each pair is. A model with a loss
between the two has learned frequencies; one below the bigram model's loss has learned to use more context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..common.batch import AnyBatch, Batch
from ..common.processes import processes
from ..data.tokens.token_shards import Tokens
from ..data.tokens.tokenizer import Tokenizer
from ..ops import IGNORED, cross_entropy_forward

BIGRAM_WEIGHTS = (1, 3, 10, 30, 100)
MOST_COUNTED = 2**24  # [tokens] of the training text that the unigram and bigram models count


@dataclass(frozen=True)
class Evaluation:
    """Means over `tokens` predicted tokens. loss [nats per token]."""

    loss: float
    accuracy: float  # share of targets that were the likeliest token
    tokens: int
    bits_per_byte: float | None = None  # None if the bytes per token are not known

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, float]:
        """The values by the names of a run's metrics."""
        values = {
            "validation/loss": self.loss,
            "validation/perplexity": self.perplexity,
            "validation/accuracy": self.accuracy,
        }
        return values | ({} if self.bits_per_byte is None else {"validation/bits_per_byte": self.bits_per_byte})


class Predicts(Protocol):
    def predict(self, tokens: Any, segments: Tensor | None = None) -> Tensor: ...


class Evaluator:
    """Evaluates a network, or a wrapper around one: `Evaluator(model).evaluate(batches)`.

    `bytes_per_token` of the text converts nats per token into bits per byte, which do not depend on the tokenizer.
    """

    def __init__(self, model: Any, bytes_per_token: float | None = None):
        self.network: Predicts = getattr(model, "network", model)
        self.bytes_per_token = bytes_per_token

    def _predict(self, batch: AnyBatch) -> Tensor:
        if isinstance(batch, Batch):
            return self.network.predict(batch.tokens, batch.segments)
        return self.network.predict(batch)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[AnyBatch]) -> Evaluation:
        """The means over all counted targets in the batches of all processes, 0 if there are none. It waits for the
        device once, at the end."""
        loss_sum: float | Tensor = 0.0
        correct: int | Tensor = 0
        count: int | Tensor = 0
        for batch in batches:
            logits = self._predict(batch)  # (B, T, V)
            counts = batch.targets != IGNORED
            loss, _ = cross_entropy_forward(logits, batch.targets, denominator=1)
            loss_sum = loss_sum + loss.double()
            correct = correct + ((logits.argmax(-1) == batch.targets) & counts).sum()
            count = count + counts.sum()
        sums = torch.tensor([float(loss_sum), float(correct), float(count)], dtype=torch.float64)
        total, right, tokens = processes().summed(sums).tolist()
        mean = total / max(1.0, tokens)
        bits_per_byte = None if self.bytes_per_token is None else mean / math.log(2) / self.bytes_per_token
        return Evaluation(mean, right / max(1.0, tokens), int(tokens), bits_per_byte)


@dataclass(frozen=True)
class ShownToken:
    """A target, and the tokens that the model found likeliest in its place."""

    target: str
    loss: float  # nats
    rank: int  # of the target among all tokens; 1 is the likeliest
    likeliest: tuple[tuple[str, float], ...]  # tokens and their probabilities
    begins: bool  # whether it begins a row, for which the model sees nothing of the row before


def shown_token(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, quoted as in Python; <eos> for the end token, and <ID> for a token without valid text."""
    text = tokenizer.decode([token])
    if token == tokenizer.end_token_id:
        return "<eos>"
    return f"<{token}>" if not text or "\ufffd" in text else repr(text)


def shown_tokens(
    network: Predicts, tokenizer: Tokenizer, rows: Iterable[Batch], count: int, likeliest: int
) -> Iterator[ShownToken]:
    """The first `count` targets of some sequences, one at a time, each with the `likeliest` most likely tokens."""
    for batch in rows:
        logarithms = network.predict(batch.tokens, batch.segments)[0].double().log_softmax(-1).cpu()  # (T, V)
        best = logarithms.topk(min(likeliest, logarithms.shape[-1]))
        begins = True
        for row, target in enumerate(batch.targets[0].tolist()):
            if target == IGNORED:
                continue
            if count == 0:
                return
            rank = int((logarithms[row] > logarithms[row, target]).sum()) + 1
            words = (shown_token(tokenizer, token) for token in best.indices[row].tolist())
            expected = tuple(zip(words, best.values[row].exp().tolist(), strict=True))
            loss = -logarithms[row, target].item()
            yield ShownToken(shown_token(tokenizer, target), loss, rank, expected, begins)
            begins = False
            count -= 1


def unigram_and_bigram_loss(train: Tokens, batches: Iterable[Batch], vocab_size: int) -> tuple[float, float]:
    """Losses [nats per token] of a unigram and a bigram model of `train` on the targets of `batches`; 0 if none.

    unigram: p(b) = (count(b) + 1) / (n + V). bigram: p(b | a) = (count(a b) + k p(b)) / (count(a) + k), where k is the
    best of 1, 3, 10, 30, 100 on `batches`, which makes the comparison as hard as possible. Only the first MOST_COUNTED
    tokens of `train` are counted. `batches` are those that the model is evaluated on, but on the CPU: so the targets
    are the same, packed or padded.
    """
    train = train[:MOST_COUNTED].astype(np.int64)
    unigram = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)  # (V,)
    # A pair is one number; only pairs that occur are kept, since V * V may not fit.
    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    contexts = np.bincount(train[:-1], minlength=vocab_size)
    unigram_sum, bigram_sums, count = 0.0, np.zeros(len(BIGRAM_WEIGHTS)), 0
    for batch in batches:
        counts = batch.targets != IGNORED
        context, target = (ids[counts].numpy() for ids in (batch.tokens, batch.targets))
        asked = context * vocab_size + target
        places = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
        seen = np.where(pairs[places] == asked, pair_counts[places], 0)
        prior = unigram[target]
        unigram_sum -= np.log(prior).sum()
        bigram_sums -= [np.log((seen + k * prior) / (contexts[context] + k)).sum() for k in BIGRAM_WEIGHTS]
        count += len(target)
    return float(unigram_sum / max(1, count)), float(bigram_sums.min() / max(1, count))
