"""Training by hand and by autograd from the same start: the same steps, as long as rounding is not amplified."""

from __future__ import annotations

import difflib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from manual_backprop.common.batch import Batch
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.models import custom as custom_file
from manual_backprop.models import custom_encoders, mirror_encoders
from manual_backprop.models import mirror as mirror_file
from manual_backprop.models.network import Network
from manual_backprop.ops import IGNORED, Dropout, keep_mask, random_key
from manual_backprop.optim.optimizers import AdamW, Optimizer
from manual_backprop.study.gradient_check import ODD, draw_batch
from manual_backprop.study.gradient_check.measure import errors_of
from manual_backprop.study.gradient_check.network_case import counted, wholly_zero
from manual_backprop.study.gradient_check.network_check import networks

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = ("gpt2", "vaswani", "llama")


def optimizer_of(network: Network) -> Optimizer:
    return AdamW(network.layout, network.flat_parameters, network.flat_gradients, weight_decay=0.1)


def losses_of(
    config: CustomTransformerConfig, steps: int, rate: float, B: int, T: int, scale: str
) -> list[list[float]]:
    """By hand and by autograd: every step's loss, with dropout as configured."""
    pair = networks(config, scale)
    optimizers = [optimizer_of(network) for network in pair]
    losses: list[list[float]] = [[], []]
    for step in range(steps):
        batch = draw_batch(config, B, T, seed=step % 3)  # few enough to learn by heart
        for network, optimizer, seen in zip(pair, optimizers, losses, strict=True):
            network.zero_gradients()
            loss = network.loss_and_gradients(batch, denominator=counted(batch), step=step)
            optimizer.step(loss, rate, 1.0)
            seen.append(float(loss))
    return losses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ten_steps_in_float64(architecture: str) -> None:
    """To 1e-10 in every loss and every parameter. The bias of the keys is not updated: its gradient is only rounding
    errors, and Adam divides a gradient by its own size, so the bias would move by whole steps at random."""
    config = replace(ODD, architecture=architecture, dropout=0.1)
    pair = networks(config, "proof")
    optimizers = [optimizer_of(network) for network in pair]
    for step in range(10):
        batch = draw_batch(config, 4, 7, seed=step)
        losses = []
        for network, optimizer in zip(pair, optimizers, strict=True):
            network.zero_gradients()
            losses.append(float(network.loss_and_gradients(batch, denominator=counted(batch), step=step)))
            for name, gradient in network.gradients.items():
                if name.endswith("key.bias"):
                    gradient.zero_()
            optimizer.step(torch.tensor(losses[-1]), 1e-3, 1.0)
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for name, parameter in pair[0].parameters.items():
        torch.testing.assert_close(parameter, pair[1].parameters[name], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_hundred_steps_in_float32(architecture: str) -> None:
    """To 1e-4 in the loss at learning rate 1e-3. Larger rates are chaotic: two correct implementations, which differ
    only by rounding, diverge by 5e-7 in 200 steps at 1e-3 and by up to 3.5e-2 at 5e-3."""
    config = CustomTransformerConfig(
        vocab_size=40,
        d_model=32,
        n_blocks=2,
        n_heads=4,
        d_ffn=64,
        max_seq_len=16,
        architecture=architecture,
        dropout=0.1,
    )
    by_hand, by_autograd = losses_of(config, steps=200, rate=1e-3, B=4, T=16, scale="initial")
    assert by_hand[-1] < by_hand[0] - 0.3, "it has to learn for the comparison to mean anything"
    assert max(abs(a - b) for a, b in zip(by_hand, by_autograd, strict=True)) < 1e-4


# Dropout: a function of (seed, step, place, element)

SHAPE = (6, 40, 50)


def mask(
    probability: float = 0.3,
    seed: int = 1,
    step: int = 2,
    place: str = "here",
    first: tuple[int, ...] = (),
    shape: tuple[int, ...] = SHAPE,
    sizes: tuple[int, ...] = (64,),
) -> torch.Tensor:
    return keep_mask(shape, Dropout(probability, random_key(seed, step, place), sizes, first), torch.device("cpu"))


def test_masks_are_the_same_when_drawn_again() -> None:
    assert torch.equal(mask(), mask())


def test_masks_do_not_depend_on_how_the_batch_is_split() -> None:
    for pieces in ((6,), (1, 5), (2, 2, 2), (1,) * 6):
        start, drawn = 0, []
        for rows in pieces:
            drawn.append(mask(first=(start,), shape=(rows, *SHAPE[1:])))
            start += rows
        assert torch.equal(torch.cat(drawn), mask())


def test_any_tile_of_a_mask_is_drawn_alone() -> None:
    """Of rows, heads, positions and keys, with padding or without: only the index of an element counts."""
    shape, sizes = (4, 3, 10, 12), (3, 16)
    whole = mask(shape=shape, sizes=sizes, first=(5,))
    dropout = Dropout(0.3, random_key(1, 2, "here"), sizes, (5,))
    for start, size in (((0, 0, 0, 0), (2, 3, 7, 7)), ((1, 2, 3, 4), (3, 1, 5, 6)), ((3, 0, 9, 11), (1, 3, 1, 1))):
        part = whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
        assert torch.equal(keep_mask(size, dropout.tile(*start), torch.device("cpu")), part)
        assert torch.equal(keep_mask(size, dropout.tile(start[0]).tile(0, *start[1:]), torch.device("cpu")), part)


def test_a_mask_is_not_larger_than_the_network() -> None:
    with pytest.raises(ValueError, match="larger than"):
        mask(first=(0, 30))


def test_a_key_on_the_device_gives_the_same_mask() -> None:
    for step in range(10):
        key = random_key(1, step, "here")
        on_device = torch.tensor(key - (1 << 64) if key >> 63 else key)
        drawn = keep_mask(SHAPE, Dropout(0.3, on_device, (64,)), torch.device("cpu"))
        assert torch.equal(drawn, mask(step=step))


def test_elements_whose_number_is_beyond_32_bits_are_independent() -> None:
    """In a network with 64 heads and 65,536 positions: elements whose numbers agree in 32 bits, and large numbers."""
    sizes, shape = (64, 1 << 16), (1, 4, 50, 100)
    firsts = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 4, 0, 0), (0, 0, 1 << 15, 0), (1 << 20, 32, 0, 1 << 15), (1 << 26,)]
    drawn = [mask(0.5, shape=shape, sizes=sizes, first=first).double().flatten() - 0.5 for first in firsts]
    correlations = (torch.stack(drawn) @ torch.stack(drawn).T / drawn[0].numel() * 4).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / math.sqrt(drawn[0].numel())


def test_every_row_of_a_mask_is_drawn_by_itself() -> None:
    """No two of 200,000 rows of 60 elements are alike, and their means spread as those of independent numbers."""
    rows = mask(0.5, shape=(8, 5, 5000, 60), sizes=(5, 5000)).flatten(0, 2)
    numbers = rows.long() @ (1 << torch.arange(60))
    assert len(numbers.unique()) == len(rows)
    spread = float(rows.double().mean(1).var()) / (0.25 / 60)
    assert abs(spread - 1) < 5 * math.sqrt(2 / len(rows))


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_as_many_are_dropped_as_asked(probability: float) -> None:
    masks = torch.stack([mask(probability, seed=seed) for seed in range(20)])
    expected = math.sqrt(probability * (1 - probability) / masks.numel())  # standard deviation of the rate
    assert abs(float((~masks).double().mean()) - probability) < 5 * expected


@pytest.mark.parametrize("other", [{"seed": 7}, {"step": 3}, {"place": "there"}, {"first": (6,)}], ids=str)
def test_masks_of_other_places_are_independent(other: dict) -> None:
    one, two = mask(0.5).double() - 0.5, mask(0.5, **other).double() - 0.5
    correlation = float((one * two).mean() * 4)
    assert abs(correlation) < 5 / math.sqrt(one.numel())


def test_neighbours_are_independent() -> None:
    centred = mask(0.5).double() - 0.5
    for axis in range(3):
        length = SHAPE[axis]
        correlation = float((centred.narrow(axis, 0, length - 1) * centred.narrow(axis, 1, length - 1)).mean() * 4)
        assert abs(correlation) < 5 / math.sqrt(centred.numel()), axis


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_place_of_the_network_has_its_own_mask(architecture: str) -> None:
    """A step with dropout differs from the next step, from another seed and from none; evaluation has none."""
    config = replace(ODD, architecture=architecture, dropout=0.3)
    batch = draw_batch(config, 2, 7)
    network, _ = networks(config)
    losses = [float(network.loss_and_gradients(batch, denominator=9, step=step)) for step in (1, 1, 2, None, None)]
    assert losses[0] == losses[1]
    assert losses[3] == losses[4]
    assert len(set(losses)) == 3
    assert torch.equal(network.forward(batch.tokens), network.predict(batch.tokens))


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_has_the_same_masks_alone_and_padded(architecture: str, kernels: str) -> None:
    """Loss and gradients of short texts, of their own length or padded to the longest, in one batch or row by row."""
    config = replace(ODD, architecture=architecture, dropout=0.3, kernels=kernels)
    network, _ = networks(config)
    alone = draw_batch(config, 3, 5)
    beyond = torch.zeros(3, 4, dtype=torch.int64)
    padded = Batch(
        torch.cat((alone.tokens, beyond), 1),
        torch.cat((alone.targets, beyond + IGNORED), 1),
        torch.cat((beyond[:, :1].expand(3, 5), beyond - 1), 1),
        alone.first_row,
    )
    rows = [Batch(alone.tokens[r : r + 1], alone.targets[r : r + 1], first_row=alone.first_row + r) for r in range(3)]
    found = []
    for batches in ([alone], [padded], rows):
        network.zero_gradients()
        losses = [network.loss_and_gradients(batch, denominator=counted(alone), step=4) for batch in batches]
        found.append({"loss": torch.stack(losses).sum()} | {n: g.clone() for n, g in network.gradients.items()})
    apart = wholly_zero(config, alone)
    assert max(errors_of(found[1], found[0], apart).values()) < 1e-12
    assert max(errors_of(found[2], found[0], apart).values()) < 1e-12


# The lesson


@pytest.mark.parametrize(
    ("by_hand", "mirror", "most"),
    [(custom_file, mirror_file, 350), (custom_encoders, mirror_encoders, 120)],
    ids=["decoder", "encoders"],
)
def test_the_two_files_differ_in_little_but_what_autograd_does(
    by_hand: ModuleType, mirror: ModuleType, most: int
) -> None:
    """Functions stand in the same order under the same names; what differs is caches, and the backward halves."""
    texts = [Path(str(file.__file__)).read_text(encoding="utf-8").splitlines() for file in (by_hand, mirror)]
    names = [[line.split("(")[0].split()[1] for line in text if line.startswith("    def ")] for text in texts]
    assert [name for name in names[0] if not name.endswith("_backward")] == names[1]
    differing = [line for line in difflib.ndiff(*texts) if line.startswith(("- ", "+ "))]
    assert len(differing) < most
