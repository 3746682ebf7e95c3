"""The time that loading batches adds to a training step: steps that load a batch, and steps with the same batch ready.

Trains a model of one size on the built-in text, with packed and with padded batches. Each optimizer step runs three
times: once it loads its batch from the tokens on disk, as in a run, and twice the same batch is ready; the order
alternates. Ratios are taken step by step. The ratio of the two steps with a ready batch is the noise floor. Run it on
an idle machine.

Example: python -m manual_backprop.tools.cost loading --model tiny --pairs 200

Exit codes: 0 at most 2 %, 1 more, 2 wrong arguments.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...config.arguments import Parser, whole
from ...study.paired_timing import Row, noise_floor, ratios
from .turns import take_turns, training

if TYPE_CHECKING:
    import torch

    from ...common.batch import Batch
    from ...data.tokens.order import Order

BAR = 0.02  # of a step's time
ROWS = ("made", "given", "given again")
WARM_UP = 3  # pairs


class CachedOrder:
    """An order whose batches are loaded by `prepare`, so that `batches` costs no time."""

    def __init__(self, order: Order, device: torch.device):
        self.order, self.device = order, device
        self.step: int | None = None

    def prepare(self, step: int) -> None:
        if step != self.step:
            tokens, batches = self.order.batches(step, self.device)
            self.step, self.made = step, (tokens, list(batches))

    def batches(self, step: int, device: torch.device) -> tuple[int, list[Batch]]:
        return self.made


def add_options(parser: Parser) -> None:
    parser.add_argument("--model", default="small", help="a size of conf/model (%(default)s)")
    parser.add_argument("--pairs", type=whole(3), default=40, metavar="N", help="of steps (%(default)s)")


def measure(options: Namespace, folder: Path) -> bool:
    passed = True
    for batching in ("packed", "padded"):
        cheap, words = verdict(batching, *in_turns(options.model, batching, options.pairs, folder))
        print(words, flush=True)
        passed &= cheap
    print(f"{'ok' if passed else 'FAILED'}: the bar is {BAR:.0%} of a step")
    return passed


def in_turns(model: str, batching: str, pairs: int, folder: Path) -> tuple[list[Row], float]:
    """The three rows, and the seconds that loading the batches of a step takes alone."""
    overrides = [f"model={model}", f"batching={batching}", "device=cpu", "tracking=none", f"training.max_steps={10**6}"]
    runner = training(overrides, folder)
    device, order, turns = runner.model.network.device, runner.order, count()
    given = CachedOrder(order, device)

    def turn(place: int) -> tuple[float, float]:
        """Wall-clock and processor seconds of a step, which all rows run one after the other."""
        runner.model.step = step = next(turns) // len(ROWS)
        given.prepare(step)
        runner.order = order if ROWS[place] == "made" else cast(Any, given)
        begin, processor = time.perf_counter(), time.process_time()
        loss, _, _ = runner.train_step()
        loss.item()
        return time.perf_counter() - begin, time.process_time() - processor

    rows = take_turns(ROWS, pairs, turn, WARM_UP)
    return rows, statistics.median(_loading_seconds(runner.step + n, order, device) for n in range(pairs))


def _loading_seconds(step: int, order: Order, device: torch.device) -> float:
    begin = time.perf_counter()
    for _ in order.batches(step, device)[1]:
        pass
    return time.perf_counter() - begin


def verdict(batching: str, rows: Sequence[Row], loading: float) -> tuple[bool, str]:
    """Whether loading is fast enough, and a sentence about it. `loading` [s]: its share of a step decides, since the
    difference of two long times is noisier."""
    made, given, again = rows
    low, middle, high = ratios(made.seconds, given.seconds)
    share = loading / given.median
    return share <= BAR, (
        f"{batching}: a step takes {1e3 * given.median:.1f} ms, loading its batch {1e3 * loading:.2f} ms, "
        f"or {share:.2%}; in pairs {middle - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%}), noise floor "
        f"{noise_floor(again.seconds, given.seconds):.2%}"
    )
