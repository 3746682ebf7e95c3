"""Checks 2 to 6: can the network learn? Initial loss, gradients, updates, overfitting one batch, learning several.

They use small batches of the user's text, without dropout and label smoothing, so that the loss can come near 0. Labels
are shifted here and not by the loader, whose labels check 1 tests.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...common.batch import IGNORED, AnyBatch, Batch, EncoderBatch
from ...config.schema import RunConfig
from ...data.tokens.order import Order
from ...models.network import Network
from ...optim.optimizers import Optimizer
from ..gradient_check.network_case import counted, counting, rows_of, tensors_of, wholly_zero
from .finding import PASSED, Finding, finding
from .rates import RangeTest, range_test

TOKENS = 256  # of a batch
MEMORIZED_TOKENS = 32  # of the row to be memorized
FEWEST_ROWS = 4  # of a batch whose rows have one answer each
FACTOR = 4  # the initial loss of predicted numbers may differ by it from that of a model which predicts 0
BELOW, ABOVE = 0.5, 1.0  # [nats] how far the initial loss may be from ln V; post-norm starts some 0.7 above
SMALLEST, LARGEST = 1e-4, 1e4  # root mean square of a tensor's gradient, relative to the median over all tensors
GLOBAL = 1e-3, 1e3  # norm of the whole gradient
RATIOS = 1e-6, 2.0  # root mean square of a step's change / that of the parameters
LEAST_SIZE = 0.02  # lower bound of the parameters' size in that ratio, since some start at 0
FIRST_STEPS, FIRST_SHARE = {"adamw": 10, "sgd": 40}, 0.2  # so many steps leave less than this share of the loss,
LAST_STEPS, LAST_SHARE = {"adamw": 100, "sgd": 300}, 0.05  # and so many less than this share
LOWER_RATES = (1 / 2, 1 / 4)  # of the picked rate
SEVERAL, ROUNDS = 4, {"adamw": 12, "sgd": 20}  # batches, and how often each is trained on
LASTING = {"adamw": 1 / 3, "sgd": 1.0}  # of the picked rate: post-norm stagnates at a rate that suits one batch
TOGETHER = 0.67  # largest share of its loss that each batch may have left


def samples(order: Order, device: torch.device) -> Iterator[AnyBatch]:
    """Batches of about 256 positions, one from each step of the loader; for a text with labels computed here."""
    for step in itertools.count():
        batch: AnyBatch = next(iter(order.batches(step, device)[1]))
        width = (batch.inputs if isinstance(batch, EncoderBatch) else batch.tokens).shape[1]
        rows = max(1, TOKENS // width)
        yield labelled(batch, rows) if isinstance(batch, Batch) else rows_of(batch, slice(max(FEWEST_ROWS, rows)))


def batch_to_memorize(batches: Sequence[AnyBatch]) -> AnyBatch:
    """The batch to be memorized: the row with the most labels, up to 32 of them; or some rows if each has one
    answer."""
    if isinstance(batches[0], EncoderBatch):
        return rows_of(batches[0], slice(FEWEST_ROWS))
    longest = max(batches, key=lambda batch: int(counting(batch).sum(1).max()))
    place = int(counting(longest).sum(1).argmax())
    row = rows_of(longest, slice(place, place + 1))
    if not isinstance(row, Batch):
        return row
    cut: dict[str, Any] = {name: x[:, :MEMORIZED_TOKENS].contiguous() for name, x in tensors_of(row).items()}
    return replace(row, **cut)


def untrained_loss(network: Network, batches: Sequence[AnyBatch]) -> tuple[float, float, str]:
    """The lowest and highest plausible loss of an untrained model, and a description of the reference: a model for
    which all answers are equally likely, or one that predicts the number 0."""
    config = network.config
    if config.network != "encoder" or config.head_loss == "cross_entropy":
        choices = config.n_outputs if config.network == "encoder" else config.vocab_size
        assert choices is not None
        ignorant = math.log(choices)
        return ignorant - BELOW, ignorant + ABOVE, f"ln V = {ignorant:.2f} for V = {choices:,}"
    if config.head_loss == "squared_error":
        values = torch.cat([batch.targets[counting(batch)] for batch in batches]).double()
        scale = float(values.square().mean())
        return scale / FACTOR, scale * FACTOR, f"{scale:.3g} for a model that predicts 0"
    return -math.inf, math.inf, f"the initial value of head_loss={config.head_loss} is not known"


def labelled(batch: Batch, rows: int) -> Batch:
    """The first `rows` rows of a batch, with the next input as label where both count."""
    batch = rows_of(batch, slice(rows))
    counts = counting(batch)
    labels = torch.full_like(batch.tokens, IGNORED)
    labels[:, :-1] = torch.where(counts[:, :-1] & counts[:, 1:], batch.tokens[:, 1:], IGNORED)
    is_one_token = not bool((labels != IGNORED).any())
    return batch if is_one_token else replace(batch, targets=labels)


class Training:
    """The checks of a training. `fresh` builds a new network and its optimizer, as at the start of a run."""

    def __init__(
        self, config: RunConfig, fresh: Callable[[], tuple[Network, Optimizer]], order: Order, device: torch.device
    ):
        self.config, self.fresh = config, fresh
        self.kind = config.optimizer.name
        self.batches = list(itertools.islice(samples(order, device), SEVERAL))
        self.source = samples(order, device)
        self.first, self.one = self.batches[0], batch_to_memorize(self.batches)

    def step(self, network: Network, optimizer: Optimizer, batch: AnyBatch, rate: float) -> float:
        """Makes an update as in a run; returns the loss before it."""
        network.zero_gradients()
        loss = self.gradients(network, batch)
        optimizer.step(loss, rate, self.config.training.max_grad_norm)
        return loss.item()

    def gradients(self, network: Network, batch: AnyBatch) -> Tensor:
        return network.loss_and_gradients(batch, denominator=counted(batch), step=None)

    # Check 2

    def initial_loss(self) -> Finding:
        network, _ = self.fresh()
        losses = [self.gradients(network, batch).item() for batch in self.batches]
        loss = sum(losses) / len(losses)
        least, most, known = untrained_loss(network, self.batches)
        words = f"{loss:.2f}, and {known}"
        if not math.isfinite(loss):
            return finding(2, f"{words}: the first forward pass is not finite", "")
        if least <= loss <= most:
            return finding(2, None, words)
        why = "the initial weights are too large" if loss > most else "it is lower than that of an untrained model"
        return finding(2, f"{words}: {why}", "")

    # Check 3

    def sane_gradients(self) -> Finding:
        network, _ = self.fresh()
        network.zero_gradients()
        self.gradients(network, self.first)
        sizes = {name: root_mean_square(gradient) for name, gradient in network.gradients.items()}
        zero = wholly_zero(network.config, self.first)
        judged = {name: size for name, size in sizes.items() if name not in zero}
        norm = math.sqrt(sum(size**2 * network.gradients[name].numel() for name, size in sizes.items()))
        right = f"{len(sizes)} tensors, the whole gradient's norm is {norm:.2g}"
        if wrong := [name for name, size in sizes.items() if not math.isfinite(size)]:
            return finding(3, f"not finite: {listed(wrong)}", right)
        if wrong := [name for name, size in judged.items() if size == 0]:
            return finding(3, f"zero, so never learned: {listed(wrong)}", right)
        if not GLOBAL[0] <= norm <= GLOBAL[1]:
            return finding(3, f"the whole gradient's norm is {norm:.1e}; {GLOBAL[0]:g} to {GLOBAL[1]:g} is sane", right)
        median = sorted(judged.values())[len(judged) // 2]
        shares = {name: size / median for name, size in judged.items()}
        if wrong := [name for name, share in shares.items() if not SMALLEST <= share <= LARGEST]:
            worst = max(wrong, key=lambda name: abs(math.log(shares[name])))
            return finding(3, f"{shares[worst]:.0e} times as large as others: {listed(wrong)}", right)
        return finding(3, None, right)

    # Check 4

    def sane_updates(self, rate: float) -> Finding:
        network, optimizer = self.fresh()
        before = network.export_parameters()
        self.step(network, optimizer, self.first, rate)
        after, gradients, zero = network.export_parameters(), network.gradients, wholly_zero(network.config, self.first)
        ratios = {
            name: root_mean_square(after[name].double() - old.double()) / max(root_mean_square(old), LEAST_SIZE)
            for name, old in before.items()
            if name not in zero
        }
        low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        right = f"by {ratios[low]:.1e} ({low}) to {ratios[high]:.1e} ({high}) of its size, at the rate {rate:.1e}"
        # a parameter without a gradient, which check 3 reports, does not move
        moving = [name for name in ratios if float(gradients[name].abs().max()) > 0]
        if still := [name for name in moving if ratios[name] == 0]:
            return finding(4, f"unchanged by a step at the rate {rate:.1e}: {listed(still)}", right)
        few = [name for name in moving if not ratios[name] >= RATIOS[0]]
        many = [n for n, r in ratios.items() if not r <= RATIOS[1]]
        if few or many:
            worst = max(many, key=ratios.__getitem__) if many else min(few, key=ratios.__getitem__)
            words = f"a step at the rate {rate:.1e} changes {worst} by {ratios[worst]:.1e} of its size"
            sane = f"{RATIOS[0]:g} to {RATIOS[1]:g} is sane ({len(few + many)} such tensors)"
            return finding(4, f"{words}; {sane}", right)
        return finding(4, None, right)

    # Checks 5 and 6

    def rates(self) -> RangeTest:
        network, optimizer = self.fresh()
        return range_test(self.kind, lambda _, rate: self.step(network, optimizer, next(self.source), rate))

    def one_batch(self, picked: float) -> Finding:
        """Check 5 at the picked rate, or at a lower one if one row needs less than the rows of the range test."""
        found = [self._memorized(picked)]
        for share in LOWER_RATES:
            if found[-1].status == PASSED:
                return found[-1]
            found.append(self._memorized(share * picked))
        return found[-1] if found[-1].status == PASSED else found[0]

    def _memorized(self, rate: float) -> Finding:
        network, optimizer = self.fresh()
        soon, last = FIRST_STEPS[self.kind], LAST_STEPS[self.kind]
        losses: list[float] = []
        share = 1.0  # of the first loss
        while len(losses) <= last and (len(losses) <= soon or share >= LAST_SHARE):
            losses.append(self.step(network, optimizer, self.one, rate))
            share = losses[-1] / losses[0]
            if not math.isfinite(share):
                return finding(5, f"the loss is not finite after {len(losses) - 1} steps at the rate {rate:.1e}", "")
            if len(losses) == soon + 1:
                early = share
                if early >= FIRST_SHARE:
                    break
        words = (
            f"{counted(self.one)} labels: {1 - early:.0%} of the loss is gone after {soon} steps at the rate {rate:.1e}"
        )
        if early >= FIRST_SHARE:
            hint = "are the gradients right? python -m manual_backprop.verify"
            return finding(5, f"{words}; more than {1 - FIRST_SHARE:.0%} has to be; {hint}", "")
        words += f", {1 - share:.0%} after {len(losses) - 1}"
        return finding(5, None if share < LAST_SHARE else f"{words}; more than {1 - LAST_SHARE:.0%} has to be", words)

    def several_batches(self, picked: float) -> Finding:
        network, optimizer = self.fresh()
        rate = LASTING[self.kind] * picked
        rounds = [
            [self.step(network, optimizer, batch, rate) for batch in self.batches] for _ in range(ROUNDS[self.kind] + 1)
        ]
        # before its first update each batch has the loss of an untrained network
        untaught, _ = self.fresh()
        before = [self.gradients(untaught, batch).item() for batch in self.batches]
        shares = [last / first for first, last in zip(before, rounds[-1], strict=True)]
        words = (
            f"{len(shares)} batches in turn, {len(rounds) - 1} times each at the rate {rate:.1e}: "
            f"{min(shares):.0%} to {max(shares):.0%} of their losses are left"
        )
        if all(share <= TOGETHER for share in shares):  # false for NaN
            return finding(6, None, words)
        return finding(6, f"{words}; each has to be below {TOGETHER:.0%}", words)


def root_mean_square(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.detach().double().square().mean()))


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
