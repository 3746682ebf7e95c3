"""The order of training is a function of (seed, epoch), and validation meets every token once."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from manual_backprop.common.batch import IGNORED
from manual_backprop.common.errors import InputError
from manual_backprop.data.tokens.batches import Windows, validation_batches

N, T = 1003, 16
TOKENS = np.arange(N, dtype=np.uint16)  # a token is its own position


def starts(windows: Windows, first: int, count: int) -> list[int]:
    return windows.batch(first, count).tokens[:, 0].tolist()


def test_a_batch_is_windows_and_the_tokens_that_follow() -> None:
    batch = Windows(TOKENS, T, seed=0).batch(5, 7, first_row=21)
    assert batch.tokens.shape == batch.targets.shape == (7, T)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.is_contiguous()
    assert batch.targets.is_contiguous()
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.first_row == 21
    assert batch.segments is None


def test_an_epoch_meets_each_window_once() -> None:
    windows = Windows(TOKENS, T, seed=3)
    assert windows.windows_per_epoch == (N - 1 - (T - 1)) // T == 61
    for epoch in range(50):
        found = sorted(starts(windows, epoch * 61, 61))
        assert 0 <= found[0] < 2 * T
        assert found == [found[0] + T * window for window in range(61)]
        assert found[-1] + T < N


def test_borders_and_order_change_with_epoch_and_seed() -> None:
    windows = Windows(TOKENS, T, seed=3)
    epochs = [starts(windows, epoch * 61, 61) for epoch in range(100)]
    assert {min(epoch) for epoch in epochs} >= set(range(T))
    orders = {tuple(np.argsort(epoch)) for epoch in epochs}
    assert len(orders) == 100
    others = [starts(Windows(TOKENS, T, seed=seed), 0, 61) for seed in range(-2, 3)]
    assert len(set(map(tuple, others))) == 5


def test_every_token_is_met_with_time() -> None:
    windows = Windows(TOKENS, T, seed=0)
    tokens = windows.batch(0, 61 * 100)
    assert set(tokens.tokens.flatten().tolist()) == set(range(N - 1))
    assert set(tokens.targets.flatten().tolist()) == set(range(1, N))


def test_a_window_depends_on_its_number_only() -> None:
    whole = starts(Windows(TOKENS, T, seed=1), 0, 400)  # six epochs and a half
    in_pieces = Windows(TOKENS, T, seed=1)
    for first, count in [(399, 1), (58, 9), (0, 61), (61, 61), (17, 300), (3, 2)]:
        assert starts(in_pieces, first, count) == whole[first : first + count]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    order = np.array(starts(Windows(TOKENS, T, seed=1337), 0, 1000), dtype="<i8")
    assert (
        hashlib.sha256(order.tobytes()).hexdigest()
        == "b26fc180913578e40cde339dd6c1970d9856278ad6120e47ec5fe672c0b22a0a"
    )


@pytest.mark.parametrize(("n", "windows"), [(T + 1, 1), (2 * T - 1, 1), (2 * T, 1), (2 * T + 1, 1), (3 * T, 2)])
def test_the_shortest_texts(n: int, windows: int) -> None:
    short = Windows(TOKENS[:n], T, seed=0)
    assert short.windows_per_epoch == windows
    batch = short.batch(0, 200)
    assert batch.targets.max() <= n - 1
    assert set(batch.tokens.flatten().tolist()) == set(range(n - 1))


def test_one_token_windows() -> None:
    windows = Windows(TOKENS, 1, seed=0)
    assert windows.windows_per_epoch == N - 1
    assert sorted(starts(windows, 0, N - 1)) == list(range(N - 1))


def test_memory_mapped_tokens_of_four_bytes(tmp_path: Path) -> None:
    (np.arange(100, dtype=np.uint32) + 2**31).tofile(tmp_path / "tokens")
    tokens = np.memmap(tmp_path / "tokens", dtype=np.uint32, mode="r")
    batch = Windows(tokens, 8, seed=0).batch(0, 4)
    assert batch.tokens.min() >= 2**31
    (first, *_) = validation_batches(tokens, 8, 4)
    assert first.tokens[0].tolist() == [2**31 + place for place in range(8)]


@pytest.mark.parametrize(("first", "count"), [(-1, 4), (0, 0)])
def test_numbers_that_no_window_has(first: int, count: int) -> None:
    with pytest.raises(InputError, match=r"windows from number|A batch of"):
        Windows(TOKENS, T, seed=0).batch(first, count)


@pytest.mark.parametrize("n", [T + 1, 5 * T, 5 * T + 1, 5 * T + 2, N])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_validation_predicts_every_token_but_the_first_once(n: int, batch_size: int) -> None:
    tokens = TOKENS[:n] + 7  # no token is 0, so that padding can be told apart
    batches = list(validation_batches(tokens, T, batch_size))
    got = torch.cat([batch.targets.flatten() for batch in batches])
    assert got[got != IGNORED].tolist() == (np.arange(1, n) + 7).tolist()
    inputs = torch.cat([batch.tokens.flatten() for batch in batches])
    assert torch.equal(inputs[got != IGNORED] + 1, got[got != IGNORED])
    assert (inputs[got == IGNORED] == 0).all()
    assert all(batch.tokens.shape == batch.targets.shape for batch in batches)
    assert [len(batch.tokens) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(got) == -(-(n - 1) // T) * T


def test_a_limited_validation_is_the_beginning_of_the_whole() -> None:
    whole, limited = list(validation_batches(TOKENS, T, 4)), list(validation_batches(TOKENS, T, 4, limit=3))
    assert len(limited) == 3
    for some, all_of_them in zip(limited, whole[:3], strict=True):
        assert torch.equal(some.tokens, all_of_them.tokens)
        assert torch.equal(some.targets, all_of_them.targets)
    assert len(list(validation_batches(TOKENS, T, 4, limit=1000))) == len(whole)


def test_a_text_shorter_than_a_window_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"training split has 16 tokens.* needs 17.*shorter model\.max_seq_len"):
        Windows(TOKENS[:T], T, seed=0)
    with pytest.raises(
        InputError, match=r"validation split has 16 tokens.*hold out more of it \(dataset\.validation=SHARE\)\."
    ):
        validation_batches(TOKENS[:T], T, 1)  # nothing has been asked of it yet
    with pytest.raises(InputError, match="at least 1"):
        Windows(TOKENS, 0, seed=0)
