"""Which tokens an optimizer step learns from: a function of (seed, step), for any accumulation steps and processes."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from manual_backprop.common.batch import Batch
from manual_backprop.common.errors import InputError
from manual_backprop.common.processes import Processes, acting_as
from manual_backprop.config.schema import BatchingConfig, CustomTransformerConfig, DatasetConfig
from manual_backprop.data.tokens.batches import Documents, Windows, rows_of_documents, validation_batches
from manual_backprop.data.tokens.corpus import Corpus
from manual_backprop.data.tokens.order import Order, evaluation_batches, open_order
from manual_backprop.data.tokens.tokenizer import ByteTokenizer
from manual_backprop.models.implementations import build_network
from manual_backprop.ops import IGNORED

T = 8
END = 256
PADDED, PACKED = BatchingConfig("padded"), BatchingConfig("packed", False)
MASKED = BatchingConfig("packed", True)
WHOLE = DatasetConfig("text", "a path")


def joined(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of so many tokens, the end token included; every other token says where it is."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1]) % 250
    tokens[offsets[1:] - 1] = END
    return tokens.astype(np.uint16), offsets


def corpus_of(lengths: list[int]) -> Corpus:
    tokens, offsets = joined(lengths)
    return Corpus(ByteTokenizer(), tokens, tokens, offsets, offsets, "", "", len(tokens), len(tokens))


LENGTHS = np.random.default_rng(3).integers(2, 15, 45).tolist()
CORPUS = corpus_of(LENGTHS)
ORDERS = [
    pytest.param(PACKED, WHOLE, id="packed"),
    pytest.param(MASKED, WHOLE, id="masked"),
    pytest.param(PACKED, replace(WHOLE, max_length=5), id="cut"),
    pytest.param(MASKED, replace(WHOLE, max_length=5), id="masked and cut"),
    pytest.param(PADDED, WHOLE, id="padded"),
    pytest.param(PADDED, replace(WHOLE, max_length=5), id="padded and cut"),
]


def order_of(batching: BatchingConfig, dataset: DatasetConfig = WHOLE, corpus: Corpus = CORPUS, **other: int) -> Order:
    given = {"sequence_length": T, "batch_size": 4, "accumulation_steps": 1, "seed": 1} | other
    return open_order(corpus, batching, dataset, **given)  # type: ignore[arg-type]


def rows(batches: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Inputs and targets that count, row by row."""
    found = []
    for batch in batches:
        for inputs, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            count = sum(target != IGNORED for target in targets)
            found.append((tuple(inputs[:count]), tuple(targets[:count])))
    return found


def step_rows(order: Order, step: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return rows(list(order.batches(step)[1]))


@pytest.mark.parametrize(("batching", "dataset"), ORDERS)
def test_a_step_is_a_function_of_its_number(batching: BatchingConfig, dataset: DatasetConfig) -> None:
    """As a resume asks for it: any step first, or again."""
    forward = order_of(batching, dataset)
    steps = [step_rows(forward, step) for step in range(40)]
    for step in (39, 0, 12, 11, 25, 12):
        assert step_rows(order_of(batching, dataset), step) == steps[step]
        assert step_rows(forward, step) == steps[step]
    assert [step_rows(order_of(batching, dataset, seed=2), step) for step in range(12)] != steps[:12]


@pytest.mark.parametrize(("batching", "dataset"), ORDERS)
def test_accumulation_steps_make_the_same_step(batching: BatchingConfig, dataset: DatasetConfig) -> None:
    at_once, accumulated = (
        order_of(batching, dataset, batch_size=6),
        order_of(batching, dataset, batch_size=1, accumulation_steps=6),
    )
    assert at_once.steps(1) == accumulated.steps(1)
    for step in range(25):
        assert step_rows(at_once, step) == step_rows(accumulated, step)
        assert at_once.batches(step)[0] == accumulated.batches(step)[0]
        firsts = [batch.first_row for batch in accumulated.batches(step)[1]]
        assert firsts == list(range(len(firsts)))


@pytest.mark.parametrize(("batching", "dataset"), ORDERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_have_disjoint_parts_of_a_step(batching: BatchingConfig, dataset: DatasetConfig, world_size: int) -> None:
    alone = order_of(batching, dataset, batch_size=6)
    shared = order_of(batching, dataset, batch_size=1, accumulation_steps=6)
    for step in range(25):
        found = []
        for rank in range(world_size):
            with acting_as(one_of(world_size, rank)):
                found += step_rows(shared, step)
                assert shared.batches(step)[0] == alone.batches(step)[0]  # of the whole step
        assert found == step_rows(alone, step)


def one_of(size: int, rank: int) -> Processes:
    group = Processes()
    group.size, group.rank = size, rank
    return group


@pytest.mark.parametrize(("batching", "dataset"), ORDERS)
def test_the_denominator_is_what_counts(batching: BatchingConfig, dataset: DatasetConfig) -> None:
    order, total = order_of(batching, dataset), 0
    for step in range(30):
        assert order.tokens_before(step) == total
        count, batches = order.batches(step)
        assert count == sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        total += count


def documents() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    tokens = CORPUS.train.tolist()
    found = [tokens[begin:end] for begin, end in zip(CORPUS.train_offsets[:-1], CORPUS.train_offsets[1:], strict=True)]
    return [(tuple(one[:-1][:T]), tuple(one[1:][:T])) for one in found]


def test_an_epoch_of_padded_rows_meets_each_document_once() -> None:
    order = order_of(PADDED)
    assert order.steps(1) == 12  # of 45 documents: the last step of an epoch has one
    epochs = [[step_rows(order, step) for step in range(12 * epoch, 12 * epoch + 12)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(row for step in epoch for row in step) == sorted(documents())
        assert sorted(map(len, epoch)) == [1] + [4] * 11
    assert epochs[0] != epochs[1] != epochs[2]
    cut = sum(length - 1 > T for length in LENGTHS)
    assert order.notes == (f"{cut} of 45 documents have more than 8 tokens and are cut there",)


def test_rows_of_like_length_go_together() -> None:
    lengths = np.random.default_rng(0).integers(2, T + 2, 1000).tolist()
    order = order_of(PADDED, corpus=corpus_of(lengths), batch_size=8)
    batches = [batch for step in range(125) for batch in order.batches(step)[1]]
    padding = sum(int((batch.targets == IGNORED).sum()) for batch in batches)
    assert padding / sum(batch.targets.numel() for batch in batches) < 0.05  # in random order it is a third
    assert all((batch.targets != IGNORED).any(0).all() for batch in batches)  # no wider than the longest


def test_the_end_token_is_always_learned_and_padding_never() -> None:
    """Also where the end token is what rows are filled up with: padding is known by its place."""
    tokens, offsets = joined([3, 9, 5, 2])
    (batch,) = rows_of_documents(Documents(tokens, offsets), T, 4)
    assert [sum(row) for row in (batch.targets == END).tolist()] == [1, 1, 1, 1]
    assert (batch.targets != IGNORED).sum(1).tolist() == [2, 8, 4, 1]
    assert batch.tokens[0].tolist() == [*tokens[:2].tolist(), *[0] * 6]
    tokens[tokens == END] = 0  # what rows happen to be filled up with
    (same,) = rows_of_documents(Documents(tokens, offsets), T, 4)
    assert torch.equal(same.targets == IGNORED, batch.targets == IGNORED)
    assert (same.targets == 0).sum() == 4


def network(precision: str = "fp64"):  # type: ignore[no-untyped-def]
    sizes = {"vocab_size": 257, "d_model": 8, "n_blocks": 2, "n_heads": 2, "d_ffn": 12, "max_seq_len": T}
    return build_network("custom", CustomTransformerConfig(**sizes, precision=precision))  # type: ignore[arg-type]


def gradients(order: Order, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = network()
    model.zero_gradients()
    tokens, batches = order.batches(step)
    loss = sum(model.loss_and_gradients(batch, denominator=tokens, step=None).item() for batch in batches)
    return loss, {name: gradient.clone() for name, gradient in model.gradients.items()}


@pytest.mark.parametrize("batching", [PADDED, PACKED, MASKED], ids=["padded", "packed", "masked"])
def test_eight_by_one_is_one_by_eight(batching: BatchingConfig) -> None:
    """In float64, in a full step and in the last, smaller one; so the loss is a mean over tokens that count."""
    at_once, accumulated = order_of(batching, batch_size=8), order_of(batching, batch_size=1, accumulation_steps=8)
    sizes = [len(step_rows(at_once, step)) for step in range(6)]
    for step in (0, int(np.argmin(sizes))):
        loss, want = gradients(at_once, step)
        other, got = gradients(accumulated, step)
        assert abs(loss - other) < 1e-12
        scale = max(float(tensor.norm()) for tensor in want.values())
        assert all(float((got[name] - want[name]).norm()) < 1e-12 * scale for name in want)
    assert batching is not PADDED or min(sizes) == 5


def test_padding_changes_nothing() -> None:
    """A document's loss and gradients beside a longer one are those that it has alone."""
    documents = Documents(*joined([3, 9]))
    numbers, lengths = np.array([0, 1]), np.array([2, 8])
    together = documents.batch(numbers, lengths)
    model = network()
    model.zero_gradients()
    both = model.loss_and_gradients(together, denominator=1, step=None)
    want = {name: gradient.clone() for name, gradient in model.gradients.items()}
    model.zero_gradients()
    alone = [
        model.loss_and_gradients(documents.batch(numbers[[row]], lengths[[row]]), denominator=1, step=None)
        for row in (0, 1)
    ]
    assert float(both) == pytest.approx(float(sum(alone)), abs=1e-12)
    assert all(torch.allclose(model.gradients[name], want[name], rtol=0, atol=1e-12) for name in want)


def test_masked_windows_know_their_documents() -> None:
    tokens, offsets = joined([5, 3, 4, 9, 2, 30])
    windows = Windows(tokens, T, 0, offsets, mask_documents=True)
    batch = windows.batch(0, windows.windows_per_epoch)
    assert batch.segments is not None
    for inputs, segments in zip(batch.tokens.tolist(), batch.segments.tolist(), strict=True):
        ends = [0, *np.cumsum([token == END for token in inputs[:-1]]).tolist()]
        assert segments == ends  # a document ends with its end token
    model = network()
    changed = batch.tokens.clone()
    row, place = next(
        (row, place)
        for row, segments in enumerate(batch.segments.tolist())
        for place in range(2, T)
        if segments[place] != segments[place - 1]
    )
    changed[row, :place] = (changed[row, :place] + 1) % 250
    before, after = (model.predict(inputs, batch.segments)[row] for inputs in (batch.tokens, changed))
    assert torch.equal(before[place:], after[place:])
    assert not torch.equal(before[:place], after[:place])
    (first, *_) = validation_batches(tokens, T, 2, offsets=offsets)
    assert first.segments is not None
    assert first.segments[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_a_packed_document_that_is_cut_still_ends() -> None:
    tokens, offsets = joined([5, 30, 4, 12])
    windows = Windows(tokens, 4, 0, offsets, max_length=6)
    assert windows.notes == ("2 of 4 documents have more than 6 tokens and are cut there",)
    begins = offsets.tolist()
    kept = [*range(5), *range(begins[1], begins[1] + 6), begins[2] - 1, *range(begins[2], begins[3])]
    kept += [*range(begins[3], begins[3] + 6), begins[4] - 1]
    want = tokens[kept].tolist()
    found = set()
    for number in range(60):
        batch = windows.batch(number, 1)
        window = [*batch.tokens[0].tolist(), int(batch.targets[0, -1])]
        places = [place for place in range(len(want) - 4) if want[place : place + 5] == window]
        assert places, window
        found.update(places)
    assert found == set(range(len(want) - 4))


def test_evaluation_meets_every_token_of_long_documents() -> None:
    targets = [
        target for batch in evaluation_batches(*joined([20, 3, 9, 1, 17]), PADDED, T, 3) for target in rows([batch])
    ]
    tokens, offsets = joined([20, 3, 9, 1, 17])
    want = [token for begin, end in pairwise(offsets) for token in tokens[begin + 1 : end]]
    assert [token for _, row in targets for token in row] == want
    limited = list(evaluation_batches(*joined([20, 3, 9, 1, 17]), PADDED, T, 3, limit=1))
    assert len(limited) == 1
    assert len(limited[0].tokens) == 3


def test_what_is_to_be_memorized_is_repeated() -> None:
    for batching in (PACKED, PADDED):
        order, whole = order_of(batching, repeat=3), order_of(batching)
        assert [step_rows(order, step) for step in range(7)] == [step_rows(whole, step % 3) for step in range(7)]
        assert order.tokens_before(7) == 2 * whole.tokens_before(3) + whole.tokens_before(1)


def test_documents_of_one_token_are_counted() -> None:
    order = order_of(PADDED, corpus=corpus_of([1, 5, 1, 4]))
    assert order.notes == ("2 of 4 documents have a single token, so they have no target",)
    assert len(step_rows(order, 0)) == 2
    with pytest.raises(InputError, match="No document has two tokens"):
        order_of(PADDED, corpus=corpus_of([1, 1]))
    with pytest.raises(InputError, match="validation split has no document with two tokens"):
        evaluation_batches(*joined([1, 1]), PADDED, T, 1)


def test_a_corpus_shorter_than_a_batch_is_met_again_and_again() -> None:
    for batching in (PACKED, MASKED, PADDED):
        order = order_of(batching, corpus=corpus_of([6, 5]), batch_size=100)
        count, batches = order.batches(3)
        assert count == sum(int((batch.targets != IGNORED).sum()) for batch in batches) > 0
