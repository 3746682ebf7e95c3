"""Validation loss, perplexity, accuracy and bits per byte; the unigram and bigram models beside them."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from manual_backprop import CustomTransformerConfig, CustomTransformerWrapper, Evaluator, TorchTransformer
from manual_backprop.common.batch import Batch
from manual_backprop.config.schema import BatchingConfig
from manual_backprop.data.tokens.batches import validation_batches
from manual_backprop.data.tokens.order import evaluation_batches, evaluation_targets
from manual_backprop.ops import IGNORED
from manual_backprop.tasks.evaluation import BIGRAM_WEIGHTS, Evaluation, unigram_and_bigram_loss

V = 13


@pytest.fixture
def model() -> CustomTransformerWrapper:
    wrapper = CustomTransformerWrapper(
        CustomTransformerConfig(V, d_model=8, n_blocks=1, n_heads=2, d_ffn=8, max_seq_len=6, precision="fp64")
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapper.network.parameters.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator))
    return wrapper


def random_tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, length).astype(np.uint16)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_evaluate_whole_split(model: CustomTransformerWrapper, batch_size: int) -> None:
    """Every token but the first is predicted once, the short last window included."""
    tokens = random_tokens(40)  # six windows of 6 and a last one of 3
    evaluation = Evaluator(model, bytes_per_token=2.5).evaluate(validation_batches(tokens, 6, batch_size))

    total, correct = 0.0, 0
    ids = torch.from_numpy(tokens.astype(np.int64))
    for start in range(0, 39, 6):
        window = ids[start : start + 7]
        logits = model.forward(window[None, :-1])["logits"][0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        correct += int((logits.argmax(-1) == window[1:]).sum())
    assert evaluation.tokens == 39
    assert evaluation.loss == pytest.approx(total / 39, rel=1e-12)
    assert evaluation.accuracy == correct / 39
    assert 0 < correct < 39
    assert evaluation.perplexity == pytest.approx(math.exp(total / 39), rel=1e-12)
    assert evaluation.bits_per_byte == pytest.approx(total / 39 / math.log(2) / 2.5, rel=1e-12)


def test_ignored_targets_do_not_count(model: CustomTransformerWrapper) -> None:
    tokens, targets = torch.from_numpy(np.stack([random_tokens(6, seed) for seed in (1, 2)]).astype(np.int64)), None
    targets = tokens.roll(-1, 1)
    targets[:, 4:] = -100
    targets[1] = -100
    evaluation = Evaluator(model).evaluate([Batch(tokens, targets), Batch(tokens, torch.full_like(targets, -100))])
    logits = model.forward(tokens)["logits"]
    assert evaluation.tokens == 4
    assert evaluation.loss == pytest.approx(F.cross_entropy(logits[0, :4], targets[0, :4]).item(), rel=1e-12)
    assert evaluation.accuracy == (logits[0, :4].argmax(-1) == targets[0, :4]).double().mean().item()
    assert evaluation.bits_per_byte is None


def test_nothing_to_evaluate(model: CustomTransformerWrapper) -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    for batches in ([], [Batch(ids, torch.full_like(ids, -100))]):
        assert Evaluator(model).evaluate(batches) == Evaluation(0.0, 0.0, 0)


def test_network_or_wrapper_of_any_kind(model: CustomTransformerWrapper) -> None:
    mirror = TorchTransformer(model.config)
    mirror.load_parameters(model.network.export_parameters())
    batches = list(validation_batches(random_tokens(40), 6, 4))
    want = Evaluator(model).evaluate(batches)
    assert Evaluator(model.network).evaluate(batches) == want
    by_autograd = Evaluator(mirror).evaluate(batches)
    assert by_autograd.loss == pytest.approx(want.loss, rel=1e-12)
    assert by_autograd.accuracy == want.accuracy


def test_evaluation_has_no_dropout_and_changes_nothing(model: CustomTransformerWrapper) -> None:
    from dataclasses import replace

    with_dropout = CustomTransformerWrapper(replace(model.config, dropout=0.5))
    with_dropout.network.load_parameters(model.network.export_parameters())
    before = with_dropout.network.flat_parameters.buffer.clone()
    batches = list(validation_batches(random_tokens(40), 6, 4))
    assert Evaluator(with_dropout).evaluate(batches) == Evaluator(model).evaluate(batches)
    assert torch.equal(with_dropout.network.flat_parameters.buffer, before)
    assert not with_dropout.network.flat_gradients.buffer.any()


def test_metrics_have_the_names_of_the_contract() -> None:
    assert Evaluation(2.0, 0.25, 10, 1.5).metrics() == {
        "validation/loss": 2.0,
        "validation/perplexity": math.exp(2.0),
        "validation/accuracy": 0.25,
        "validation/bits_per_byte": 1.5,
    }
    assert "validation/bits_per_byte" not in Evaluation(2.0, 0.25, 10).metrics()


def test_perplexity_of_what_is_not_finite() -> None:
    assert Evaluation(1e4, 0.0, 1).perplexity == math.inf
    assert Evaluation(math.inf, 0.0, 1).perplexity == math.inf


# Counting models


def windows(tokens: np.ndarray, length: int = 0) -> list[Batch]:
    """Batches in which each token but the first is a target once."""
    return list(validation_batches(tokens, length or len(tokens) - 1, 1))


def test_unigram_and_bigram_by_hand() -> None:
    train, validation = np.array([0, 1, 0, 1, 0, 2]), np.array([2, 0, 1, 1])
    # counts 3, 2, 1 of 6 tokens and V = 4
    p = [4 / 10, 3 / 10, 2 / 10, 1 / 10]
    unigram = -(math.log(p[0]) + 2 * math.log(p[1])) / 3
    # pairs 01 twice of the three 0s, 10 twice of the two 1s, 02 once; 2 is followed by nothing
    bigram = min(
        -(
            math.log((0 + k * p[0]) / (0 + k))  # 2 0: 2 was never a context
            + math.log((2 + k * p[1]) / (3 + k))  # 0 1
            + math.log((0 + k * p[1]) / (2 + k))  # 1 1: never seen
        )
        / 3
        for k in BIGRAM_WEIGHTS
    )
    assert unigram_and_bigram_loss(train, windows(validation, 2), 4) == pytest.approx((unigram, bigram), rel=1e-14)


def slow(train: list[int], texts: list[list[int]], vocab_size: int) -> tuple[float, float]:
    """The definitions, with dictionaries, of what each text says after its first token."""
    counts, pairs, contexts = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    p = [(counts[token] + 1) / (len(train) + vocab_size) for token in range(vocab_size)]
    asked = [pair for text in texts for pair in pairwise(text)]
    unigram = -sum(math.log(p[b]) for _, b in asked) / len(asked)
    bigram = min(
        -sum(math.log((pairs[a, b] + k * p[b]) / (contexts[a] + k)) for a, b in asked) / len(asked)
        for k in BIGRAM_WEIGHTS
    )
    return unigram, bigram


@pytest.mark.parametrize(
    ("train_length", "used", "vocab_size"), [(2, 5, 5), (50, 5, 5), (3000, 40, 50), (3000, 7, 70_000)]
)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_against_dictionaries(train_length: int, used: int, vocab_size: int, dtype: type) -> None:
    """uint16 tokens times V must not wrap around; most of a large V never occurs."""
    generator = np.random.default_rng(train_length)
    train = (generator.integers(0, used, train_length) * (vocab_size // used) % 65_000).astype(dtype)
    validation = (generator.integers(0, used, 400) * (vocab_size // used) % 65_000).astype(dtype)
    got = unigram_and_bigram_loss(train, windows(validation, 30), vocab_size)
    assert got == pytest.approx(slow(train.tolist(), [validation.tolist()], vocab_size), rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_the_same_tokens_as_the_model(batching: str, batch_size: int) -> None:
    """Of a padded split no document's first token, for no model; of windows all but the very first."""
    lengths = [9, 1, 4, 17, 2]
    tokens, offsets = random_tokens(sum(lengths), 3), np.cumsum([0, *lengths])
    train = random_tokens(500, 4)
    batches = list(evaluation_batches(tokens, offsets, BatchingConfig(batching), 6, batch_size))
    texts = [tokens[a:b].tolist() for a, b in pairwise(offsets)] if batching == "padded" else [tokens.tolist()]
    want = slow(train.tolist(), texts, V)
    assert unigram_and_bigram_loss(train, batches, V) == pytest.approx(want, rel=1e-12)
    counted = sum(len(text) - 1 for text in texts)
    assert sum(int((batch.targets != IGNORED).sum()) for batch in batches) == counted
    assert evaluation_targets(offsets, BatchingConfig(batching)) == counted
    assert unigram_and_bigram_loss(train, [], V) == (0.0, 0.0)


def test_best_weight_is_taken() -> None:
    """Training text that says everything about the validation text wants little smoothing, noise wants much."""
    cycle = np.tile(np.arange(10), 100)
    unigram, bigram = unigram_and_bigram_loss(cycle, windows(cycle), 10)
    assert unigram == pytest.approx(math.log(10))
    assert bigram < 0.02
    noise, other = (np.random.default_rng(seed).integers(0, 10, 300) for seed in (1, 2))
    unigram, bigram = unigram_and_bigram_loss(noise, windows(other), 10)
    assert bigram == pytest.approx(slow(noise.tolist(), [other.tolist()], 10)[1])
    assert abs(bigram - unigram) < 0.1
