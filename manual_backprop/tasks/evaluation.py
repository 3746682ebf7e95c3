"""Loss and accuracy of a model on a split, and the losses of a unigram and a bigram model on the same tokens.

The unigram model knows how frequent each token is, the bigram model how frequent each pair is. A model with a loss
between the two has learned frequencies; one below the bigram model's loss has learned to use more context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..common.batch import AnyBatch, Batch, EncoderBatch, PairBatch
from ..common.errors import ConfigError, InputError
from ..common.processes import processes
from ..data.tokens.token_shards import Tokens
from ..data.tokens.tokenizer import Tokenizer
from ..models.network import Network
from ..models.wrappers.language_model import LanguageModel
from ..models.wrappers.mappings import batch_of
from ..models.wrappers.wrapper import NetworkWrapper
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
        """exp(loss); infinite where that is too large for a float."""
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
    """Measures the loss and the accuracy of a model, without dropout and label smoothing.

    `model` is a wrapper such as CustomTransformerWrapper, or a network such as CustomTransformer. `bytes_per_token` of
    the text turns nats per token into bits per byte, which can be compared between tokenizers. `device` is where to
    calculate (cpu, cuda, cuda:1 or auto): None means where the model is; for another one, each evaluation copies the
    model there. Raises InputError for a model that predicts nothing and for a `bytes_per_token` that is not above 0,
    ConfigError for a device that does not exist.

    >>> model = CustomTransformerWrapper(vocab_size=8, d_model=8, n_blocks=1, n_heads=2, d_ffn=8, max_seq_len=4)
    >>> for parameter in model.network.parameters.values():
    ...     _ = parameter.zero_()
    >>> batch = {"input_ids": [[1, 2, 3, 4]], "labels": [[1, 2, 3, -100]]}
    >>> found = Evaluator(model).evaluate([batch])
    >>> found.tokens, round(found.perplexity, 3)  # it knows nothing: all 8 tokens are equally likely
    (2, 8.0)
    """

    def __init__(self, model: Any, bytes_per_token: float | None = None, *, device: str | torch.device | None = None):
        self.network: Predicts = getattr(model, "network", model)
        if not callable(getattr(self.network, "predict", None)):
            raise InputError(
                f"model is a {type(model).__name__}; expected a network such as CustomTransformer, or a wrapper such "
                "as CustomTransformerWrapper."
            )
        if bytes_per_token is not None and not bytes_per_token > 0:
            raise InputError(f"bytes_per_token={bytes_per_token!r}: expected the bytes of the text over its tokens")
        self.bytes_per_token = bytes_per_token
        self._model = model
        self._device = None if device is None else _checked_device(self.network, str(device))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[AnyBatch | Mapping[str, Any]]) -> Evaluation:
        """The means over all targets that count, in the batches of all processes; 0 where there is none. The device is
        waited for once, at the end.

        `batches` is any iterable, such as a list or a DataLoader. A batch is a mapping, as transformers' datasets and
        collators give it, or a Batch, PairBatch or EncoderBatch. Values of a mapping are tensors, arrays or lists:

        - input_ids: (B, T) token ids; of an encoder-decoder (B, S), the source.
        - labels: of a decoder (B, T), usually input_ids, shifted inside; of an encoder-decoder (B, T), the target
          without its beginning; of an encoder (B,), the classes. -100 does not count.
        - attention_mask, if there is one: 1 for real tokens, 0 for padding.

        Raises InputError for what the model cannot read.
        """
        network, reader = self._there()
        loss_sum: float | Tensor = 0.0
        correct: int | Tensor = 0
        count: int | Tensor = 0
        for given in _iterated(batches):
            batch = self._read(given, reader)
            logits = _predict(network, batch)  # (B, T, V)
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

    def _there(self) -> tuple[Predicts, NetworkWrapper | None]:
        """The network, and what reads mappings for it; None: nothing does."""
        network: Any = self.network
        model = self._model
        if isinstance(network, Network) and self._device not in (None, network.device):
            there = type(network)(replace(network.config, device=str(self._device)))
            there.load_parameters(network.parameters)
            network = there
        if isinstance(model, NetworkWrapper) and isinstance(network, Network):
            model = copy(model)
            model.network = network
            return network, model
        if isinstance(network, Network) and network.config.network == LanguageModel.kind:
            return network, LanguageModel(network)
        return network, None

    def _read(self, given: Any, reader: NetworkWrapper | None) -> AnyBatch:
        if isinstance(given, Batch | PairBatch | EncoderBatch):
            if given.targets.is_floating_point():
                raise InputError("The targets are numbers; an Evaluator measures the loss of tokens or classes.")
            return given if self._device is None else _moved(given, self._device)
        if not isinstance(given, Mapping):
            raise InputError(
                f"A batch is a {type(given).__name__}; expected a mapping with input_ids and labels, or a Batch."
            )
        if reader is None:
            raise InputError(
                f"{type(self.network).__name__} reads no mappings: give the Evaluator the wrapper around it "
                "(EncoderDecoderWrapper, EncoderWrapper), or batches of its own kind."
            )
        return batch_of(reader, given)


def _predict(network: Predicts, batch: AnyBatch) -> Tensor:
    return network.predict(batch.tokens, batch.segments) if isinstance(batch, Batch) else network.predict(batch)


def _iterated(batches: Any) -> Iterator[Any]:
    """Raises InputError for one batch in place of several, and for what cannot be iterated over."""
    if isinstance(batches, Mapping | Tensor | Batch | PairBatch | EncoderBatch) or not isinstance(batches, Iterable):
        raise InputError(f"batches is a {type(batches).__name__}; expected several batches: put one into a list.")
    return iter(batches)


def _checked_device(network: Predicts, name: str) -> torch.device:
    """Raises ConfigError for one that there is not, or that this network cannot be on."""
    if not isinstance(network, Network):
        raise InputError(f"device={name}: {type(network).__name__} stays where it is; leave device out.")
    config = replace(network.config, device=name)
    if violations := config.violations():
        raise ConfigError(violations)
    device = config.get_device()
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError([f"device={name}: PyTorch sees {torch.cuda.device_count()} GPUs here; use cpu or auto"])
    return device


def _moved(batch: AnyBatch, device: torch.device) -> AnyBatch:
    tensors: dict[str, Any] = {name: one.to(device) for name, one in vars(batch).items() if isinstance(one, Tensor)}
    return replace(batch, **tensors)


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
