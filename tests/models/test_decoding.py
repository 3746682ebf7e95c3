"""Decoding with a key-value cache, against the forward of the whole window."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import ARCHITECTURES, CustomTransformerConfig, model_sizes
from manual_backprop.models.decoding.incremental import IncrementalDecoder
from manual_backprop.models.implementations import IMPLEMENTATIONS, build_network
from manual_backprop.models.network import Network
from manual_backprop.models.wrappers.language_model import LanguageModel

VOCAB, LONGEST = 31, 11
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 24, "n_blocks": 2, "n_heads": 4, "d_ffn": 20} | {
    "norm_epsilon": 0.1
}
CASES = [(architecture, None) for architecture in ARCHITECTURES] + [("llama", 2), ("llama", 1)]
PAST_THE_WINDOW = 2 * LONGEST


def lively(architecture: str, n_kv_heads: int | None = None, implementation: str = "custom", **more: Any) -> Network:
    """A network whose logits differ by more than its initial ones do."""
    config = CustomTransformerConfig(
        **SIZES, max_seq_len=LONGEST, architecture=architecture, n_kv_heads=n_kv_heads, **more
    )
    network = build_network(implementation, config)
    generator = torch.Generator().manual_seed(0)
    network.load_parameters(
        {
            name: value + 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in network.export_parameters().items()
        }
    )
    return network


def prompt_of(length: int, rows: int = 3, vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))


def windows_by_hand(network: Network, prompt: Tensor, length: int) -> tuple[Tensor, list[Tensor]]:
    """Greedy decoding without a cache: the tokens, and the logits from which each was chosen. A full window moves on by
    half its length."""
    ids, longest = prompt, network.config.max_seq_len
    start, chosen_from = max(0, prompt.shape[1] - longest), []
    for _ in range(length):
        if ids.shape[1] - start > longest:
            start += max(1, longest // 2)
        logits = network.predict(ids[:, start:])[:, -1]
        chosen_from.append(logits)
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids, chosen_from


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(("architecture", "n_kv_heads"), CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_greedy_is_the_same_with_and_without_kept_keys(
    implementation: str, architecture: str, n_kv_heads: int | None, precision: str
) -> None:
    """Token for token, past the window, from prompts that are shorter, as long and longer than it."""
    network = lively(architecture, n_kv_heads, implementation, precision=precision)
    for length, new in ((1, PAST_THE_WINDOW), (LONGEST, 7), (LONGEST + 9, 7)):
        prompt = prompt_of(length)
        want, _ = windows_by_hand(network, prompt, new)
        drawn = LanguageModel(network).generate(prompt, new, temperature=0)
        assert torch.equal(drawn, want)
        assert len(drawn.unique()) > 3, "a network that says the same all the time shows nothing"


@pytest.mark.parametrize(("architecture", "n_kv_heads"), CASES)
def test_logits_are_those_of_the_whole_window(architecture: str, n_kv_heads: int | None) -> None:
    """Read one by one, in pieces, or at once."""
    network, ids = lively(architecture, n_kv_heads, precision="fp64"), prompt_of(LONGEST)
    want = network.predict(ids)
    for pieces in ([1] * LONGEST, [4, 1, 5, 1], [LONGEST]):
        decoder, end = IncrementalDecoder(network, batch_size=3), 0
        for piece in pieces:
            logits = decoder.read(ids[:, end : end + piece])
            end += piece
            torch.testing.assert_close(logits, want[:, end - 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["bf16", "bf16_mixed"])
@pytest.mark.parametrize(("architecture", "n_kv_heads"), CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_differs_by_rounding_only(
    implementation: str, architecture: str, n_kv_heads: int | None, precision: str
) -> None:
    """The cached path reads the tokens of the other path. Its logits are at most 1.5 times as far from the exact ones
    as those of the other path, and it chooses another token only if the two best logits were closer than that."""
    network = lively(architecture, n_kv_heads, implementation, precision=precision)
    exact = lively(architecture, n_kv_heads, precision="fp64")
    exact.load_parameters(network.export_parameters())
    prompt = prompt_of(4)
    ids, chosen_from = windows_by_hand(network, prompt, LONGEST - 4)
    decoder, unread = IncrementalDecoder(network, batch_size=3), prompt
    own, other, errors = [], [], []
    for step, theirs in enumerate(chosen_from):
        logits = decoder.read(unread)
        unread = ids[:, 4 + step : 5 + step]
        want = exact.predict(ids[:, : 4 + step])[:, -1]
        errors.append((logits.double() - theirs.double()).abs().amax())
        own.append((logits - want).square().mean())
        other.append((theirs - want).square().mean())
        best = logits.argmax(-1, keepdim=True)
        gap = theirs.gather(-1, theirs.argmax(-1, keepdim=True)) - theirs.gather(-1, best)
        assert gap.max() <= 2 * errors[-1]
    assert torch.stack(own).mean().sqrt() <= 1.5 * torch.stack(other).mean().sqrt()


def test_a_full_window_moves_by_half() -> None:
    network = lively("gpt2")
    decoder = IncrementalDecoder(network, batch_size=3)
    decoder.read(prompt_of(LONGEST))
    lengths = []
    for _ in range(LONGEST + 2):
        decoder.read(prompt_of(1))
        lengths.append(decoder.length)
    assert lengths == [7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 7, 8, 9]


def test_the_smallest_window() -> None:
    config = CustomTransformerConfig(**SIZES, max_seq_len=1)
    network = build_network("custom", config)
    want, _ = windows_by_hand(network, prompt_of(3), 5)
    assert torch.equal(LanguageModel(network).generate(prompt_of(3), 5, temperature=0), want)


def test_reading_refuses_what_the_network_refuses() -> None:
    decoder = IncrementalDecoder(lively("gpt2"), batch_size=1)
    with pytest.raises(InputError, match=f"token id {VOCAB}"):
        decoder.read(torch.tensor([[VOCAB]]))
    with pytest.raises(InputError, match="The sequence has 12 tokens"):
        decoder.read(prompt_of(LONGEST + 1, rows=1))
    assert decoder.length == 0


def test_nothing_of_the_network_changes() -> None:
    network = lively("llama", 2, precision="bf16_mixed")
    before = network.export_parameters()
    LanguageModel(network).generate(prompt_of(4), 9)
    assert all(torch.equal(value, network.parameters[name]) for name, value in before.items())
    assert not any(bool(gradient.any()) for gradient in network.gradients.values())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_late_token_costs_what_an_early_one_does(architecture: str) -> None:
    """model=small: up to max_seq_len at most 1.3 times the token at position 10. The least of many rounds, in which all
    positions alternate, so that a busy machine hits none more than another."""
    sizes = {name: value for name, value in model_sizes()["small"].items() if name != "learning_rate"}
    config = CustomTransformerConfig(**(sizes | {"vocab_size": 2048}), architecture=architecture)
    network = build_network("custom", config)
    token = torch.tensor([[7]])
    shortest = [float("inf")] * config.max_seq_len
    for round_number in range(400):
        decoder = IncrementalDecoder(network)
        for position in range(config.max_seq_len):
            begin = time.perf_counter()
            decoder.read(token)
            shortest[position] = min(shortest[position], time.perf_counter() - begin)
        if round_number >= 20 and max(shortest[10:]) <= 1.3 * shortest[9]:
            return
    assert max(shortest[10:]) <= 1.3 * shortest[9]
