"""Beam search against exhaustive enumeration, against greedy decoding, and with and without a key-value cache."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import pytest
import torch
from test_decoding import CASES, LONGEST, VOCAB, lively, prompt_of
from torch import Tensor

from manual_backprop.common.errors import InputError, NotFiniteError
from manual_backprop.models.decoding.generation import Drawing, beam_search, likeliest, normalizer, one_by_one
from manual_backprop.models.decoding.incremental import IncrementalDecoder
from manual_backprop.models.network import Network
from manual_backprop.models.wrappers.language_model import LanguageModel

END = 0
PENALTIES = [0.0, 0.6, 1.0, 3.0]


class Scripted:
    """A decoder whose logits are random numbers, determined by all tokens so far."""

    def __init__(self, seed: int, V: int = 4, spread: float = 2.0):
        self.seed, self.V, self.spread = seed, V, spread
        self.reads = 0

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{tokens}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return self.spread * torch.randn(self.V, generator=generator, dtype=torch.float64)

    def read(self, tokens: Tensor) -> Tensor:
        self.reads += 1
        self.seen = tokens if self.reads == 1 else torch.cat((self.seen, tokens), dim=1)
        return torch.stack([self.logits(tuple(row)) for row in self.seen.tolist()])

    def select(self, rows: Tensor) -> None:
        self.seen = self.seen[rows]


class Table(Scripted):
    """A decoder with given probabilities after some prefixes; after any other the end is certain."""

    def __init__(self, table: dict[tuple[int, ...], list[float]]):
        super().__init__(0, V=3)
        self.table = table

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        return torch.tensor(self.table.get(tokens[1:], [1.0, 1e-9, 1e-9]), dtype=torch.float64).log()


def completions(decoder: Scripted, prompt: tuple[int, ...], length: int) -> dict[tuple[int, ...], float]:
    """Every complete continuation with its log-probability."""
    found, left = {}, {(): 0.0}
    while left:
        tokens, score = left.popitem()
        for token, log_p in enumerate(decoder.logits(prompt + tokens).log_softmax(-1).tolist()):
            longer = (*tokens, token)
            into = found if token == END or len(longer) == length else left
            into[longer] = score + log_p
    return found


def best_of(found: dict[tuple[int, ...], float], penalty: float) -> list[int]:
    return list(max(found, key=lambda tokens: found[tokens] / ((5 + len(tokens)) / 6) ** penalty))


def to_the_end(decoder: Scripted, prompt: tuple[int, ...], length: int, beams: int, penalty: float) -> list[int]:
    """The same beam search without early stopping: a search that stops earlier must find the same."""
    found: dict[tuple[int, ...], float] = {}
    left: dict[tuple[int, ...], float] = {(): 0.0}
    for new in range(1, length + 1):
        longer = {
            (*tokens, token): score + log_p
            for tokens, score in left.items()
            for token, log_p in enumerate(decoder.logits(prompt + tokens).log_softmax(-1).tolist())
        }
        kept = sorted(longer, key=longer.__getitem__, reverse=True)[:beams]
        found |= {tokens: longer[tokens] for tokens in kept if tokens[-1] == END or new == length}
        left = {tokens: longer[tokens] for tokens in kept if tokens not in found}
    return best_of(found, penalty)


def searched(decoder: Any, prompts: list[tuple[int, ...]], *settings: Any) -> list[list[int]]:
    return [row.tolist() for row in beam_search(decoder, torch.tensor(prompts), *settings, END)]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_beam_that_is_wide_enough_finds_the_best_of_all(penalty: float) -> None:
    lengths = set()
    for seed in range(12):
        decoder, prompt = Scripted(seed), (1, 2)
        want = best_of(completions(decoder, prompt, 4), penalty)
        assert searched(decoder, [prompt], 4, 4 * 27, penalty) == [want]
        lengths.add(len(want))
    assert len(lengths) > 1, "continuations of one length show nothing"


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("beams", [1, 2, 3])
def test_a_search_that_stops_early_misses_nothing(beams: int, penalty: float) -> None:
    stopped = 0
    for seed in range(25):
        decoder, prompt = Scripted(seed, spread=1.5), (seed % 3 + 1,)
        want = to_the_end(decoder, prompt, 7, beams, penalty)
        assert searched(decoder, [prompt], 7, beams, penalty) == [want]
        stopped += decoder.reads < 7
    assert stopped > 3, "a search that never stops early shows nothing"


def test_an_open_beam_that_can_win_is_followed() -> None:
    """The end at once is likeliest at first. With a penalty a longer continuation wins, which is behind until its last
    token. A search that stops at the first end, at as many ends as beams, or when no open beam leads, misses it."""
    table = {
        (): [0.40, 0.35, 0.25],
        (1,): [0.10, 0.85, 0.05],
        (1, 1): [0.20, 0.79, 0.01],
        (1, 1, 1): [0.005, 0.99, 0.005],
        (1, 1, 1, 1): [0.99, 0.005, 0.005],
    }
    assert searched(Table(table), [(2,)], 6, 2, 0.0) == [[END]]
    for penalty in (1.0, 2.0):
        want = best_of(completions(Table(table), (2,), 6), penalty)
        assert searched(Table(table), [(2,)], 6, 2, penalty) == [want]
        assert want == [1, 1, 1, 1, END]
    ahead = math.log(0.40) / normalizer(1, 1.0)
    behind = [math.log(p) / normalizer(n, 1.0) for n, p in ((1, 0.35), (2, 0.35 * 0.85), (3, 0.35 * 0.85 * 0.79))]
    assert max(behind) < ahead, "it must be behind for a while"


def test_a_search_stops_where_nothing_can_win() -> None:
    decoder = Table({(): [0.98, 0.01, 0.01]})
    assert searched(decoder, [(1,)], 50, 2, 0.6) == [[END]]
    assert decoder.reads == 1


def test_the_formula() -> None:
    assert normalizer(1, 0.6) == 1
    assert normalizer(7, 1.0) == 2
    assert normalizer(7, 0.0) == 1
    assert normalizer(19, 2.0) == 16


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_beam_is_greedy(penalty: float) -> None:
    for seed in range(20):
        prompts = [(1, 2), (2, 1), (3, 3)]
        drawn = torch.cat(list(one_by_one(Scripted(seed), torch.tensor(prompts), 6, Drawing(), END)), dim=1).tolist()
        want = [row[: row.index(END) + 1] if END in row else row for row in drawn]
        assert searched(Scripted(seed), prompts, 6, 1, penalty) == want


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_a_batch_is_its_rows_one_by_one(beams: int) -> None:
    """Rows that end early, late and never."""
    prompts = [(a, b) for a, b in itertools.product(range(1, 4), repeat=2)]
    together = searched(Scripted(5), prompts, 6, beams, 0.8)
    assert together == [searched(Scripted(5), [prompt], 6, beams, 0.8)[0] for prompt in prompts]
    assert len(set(map(len, together))) > 2


def test_without_an_end_every_continuation_has_the_full_length() -> None:
    decoder = Scripted(3)
    (found,) = beam_search(decoder, torch.tensor([[1]]), 5, 3, 0.6, None)
    assert len(found) == 5
    assert [row.tolist() for row in beam_search(Scripted(3), torch.tensor([[1], [2]]), 0, 3, 0.6, None)] == [[], []]


def test_of_equal_candidates_the_first_comes_first() -> None:
    values, places = likeliest(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [-math.inf, 5.0, -math.inf, 5.0, 5.0]]), 3)
    assert places.tolist() == [[1, 2, 4], [1, 3, 4]]
    assert values.tolist() == [[3.0, 3.0, 3.0], [5.0, 5.0, 5.0]]


# A network: kept keys and values follow the beams


class Whole:
    """Decodes without a cache: it reads the whole window for every token. A full window moves on by half its length."""

    def __init__(self, network: Network):
        self.network = network
        self.window = torch.empty(0, 0, dtype=torch.int64)
        self.logits: list[Tensor] = []

    def read(self, tokens: Tensor) -> Tensor:
        self.window = torch.cat((self.window, tokens), dim=1) if len(self.window) else tokens
        if self.window.shape[1] > LONGEST:
            self.window = self.window[:, LONGEST // 2 :]
        self.logits.append(self.network.predict(self.window)[:, -1])
        return self.logits[-1]

    def select(self, rows: Tensor) -> None:
        self.window = self.window[rows]


class Watched(IncrementalDecoder):
    def read(self, tokens: Tensor) -> Tensor:
        self.logits = [*getattr(self, "logits", []), super().read(tokens)]
        return self.logits[-1]


@pytest.mark.parametrize(("architecture", "n_kv_heads"), CASES)
def test_kept_keys_change_no_beam(architecture: str, n_kv_heads: int | None) -> None:
    """Compares every logit of the search, also beyond the window."""
    network = lively(architecture, n_kv_heads, precision="fp64")
    kept, whole, prompt = Watched(network, batch_size=3), Whole(network), prompt_of(4)
    found, want = (beam_search(decoder, prompt, LONGEST + 5, 3, 0.6, 7) for decoder in (kept, whole))
    for got, expected in zip(kept.logits, whole.logits, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert len(kept.logits) > LONGEST - 4
    assert [row.tolist() for row in found] == [row.tolist() for row in want]


def test_a_language_model_searches() -> None:
    network = lively("llama", 2, precision="fp64")
    model, prompt = LanguageModel(network), prompt_of(3)
    best = model.generate(prompt, 6, beams=4, length_penalty=0.0, eos_token_id=7)
    want = beam_search(Whole(network), prompt, 6, 4, 0.0, 7)
    for row, continued in zip(want, best[:, 3:].tolist(), strict=True):
        assert continued == row.tolist() + [7] * (best.shape[1] - 3 - len(row))
    assert torch.equal(best[:, :3], prompt)
    assert torch.equal(model.generate(prompt, 0, beams=4), prompt)

    def log_p(ids: Tensor) -> Tensor:
        logs = network.predict(ids)[:, 2:-1].log_softmax(-1)
        return logs.gather(-1, ids[:, 3:, None]).sum((1, 2))

    greedy = model.generate(prompt, 6, temperature=0)
    searched_for = model.generate(prompt, 6, beams=VOCAB, length_penalty=0.0)
    assert bool((log_p(searched_for) >= log_p(greedy) - 1e-12).all())
    assert bool((log_p(searched_for) > log_p(greedy) + 0.1).any())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"beams": 0}, "beams=0: expected how many continuations"),
        ({"beams": 2.5}, "beams=2.5: expected a whole number"),
        ({"beams": 2, "length_penalty": -1.0}, "length_penalty=-1.0: expected 0"),
        ({"beams": 2, "length_penalty": math.nan}, "length_penalty=nan"),
        ({"beams": 2, "max_length": -1}, "max_length=-1: it counts new tokens"),
        ({"beams": 2, "top_k": -1}, "top_k=-1"),
    ],
)
def test_a_search_refuses_what_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LanguageModel(lively("gpt2")).generate(prompt_of(3), **arguments)


def test_a_search_in_diverged_parameters() -> None:
    network = lively("gpt2")
    network.parameters["final_norm.weight"].fill_(math.nan)
    with pytest.raises(NotFiniteError, match="diverged"):
        LanguageModel(network).generate(prompt_of(3), 4, beams=2)
