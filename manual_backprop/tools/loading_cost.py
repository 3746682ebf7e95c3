"""What loading costs a training step: steps that make their batches, and steps that are given the same ones."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..arguments import Parser, whole
from ..exit_codes import exit_code_of
from ..paired import Row, noise_floor, ratios, turns

if TYPE_CHECKING:
    import torch

    from ..batch import Batch
    from ..data.order import Order

DESCRIPTION = """\
Trains a model of one size on the built-in text, with packed and with padded batches. Each optimizer step is made three
times: once making its batch from the tokens on disk, as a run does, and twice with the same batch given; which comes
first alternates. The ratio is taken step by step. Given against given is the noise floor. Run it on a machine that does
nothing else."""

EPILOG = """\
Examples

  python -m manual_backprop.tools.loading_cost
  python -m manual_backprop.tools.loading_cost --model tiny --pairs 200

Exit codes: 0 at most 2 %, 1 more, 2 wrong input."""

BAR = 0.02  # of a step's time
WARM_UP = 3  # pairs


class Given:
    """An order of batches that makes those of a step when it is told to, and gives them when it is asked."""

    def __init__(self, order: Order, device: torch.device):
        self.order, self.device = order, device

    def prepare(self, step: int) -> None:
        tokens, batches = self.order.batches(step, self.device)
        self.made = tokens, list(batches)

    def batches(self, step: int, device: torch.device) -> tuple[int, list[Batch]]:
        return self.made


def measure(model: str, batching: str, pairs: int, outputs: Path) -> tuple[list[Row], float]:
    """The three rows, and the seconds that making a step's batches takes by itself."""
    from ..command_line import check
    from ..interruption import Interruption
    from ..runner import Runner

    arguments = [f"model={model}", f"batching={batching}", "device=cpu", "tracking=none", f"training.max_steps={10**6}"]
    runner = Runner(check(arguments).jobs[0].config, outputs, Interruption())
    order, given = runner.order, Given(runner.order, runner.model.network.device)

    def seconds(of: Order | Given) -> float:
        """Of the next step, which is not counted as made."""
        runner.order, step = cast(Any, of), runner.step
        begin = time.perf_counter()
        loss, _, _ = runner.train_step()
        loss.item()
        elapsed = time.perf_counter() - begin
        runner.model.step = step
        return elapsed

    orders: dict[str, Order | Given] = {"made": order, "given": given, "given again": given}
    rows = [Row(name) for name in orders]
    for turn, places in enumerate(turns(len(rows), WARM_UP + pairs)):
        given.prepare(runner.step)
        for place in places:
            elapsed = seconds(orders[rows[place].name])
            if turn >= WARM_UP:
                rows[place].seconds.append(elapsed)
        runner.model.step += 1
    return rows, statistics.median(
        _loading_seconds(runner.step + n, order, runner.model.network.device) for n in range(pairs)
    )


def verdict(batching: str, rows: Sequence[Row], loading: float) -> tuple[bool, str]:
    """`loading` [s]. Its share of a step decides: the pairs' difference of two long times has more noise."""
    made, given, again = rows
    low, middle, high = ratios(made.seconds, given.seconds)
    share = loading / given.median
    return share <= BAR, (
        f"{batching}: a step takes {1e3 * given.median:.1f} ms, making its batch {1e3 * loading:.2f} ms, "
        f"or {share:.2%}; in pairs {middle - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%}), noise floor "
        f"{noise_floor(again.seconds, given.seconds):.2%}"
    )


def _loading_seconds(step: int, order: Order, device: torch.device) -> float:
    begin = time.perf_counter()
    for _ in order.batches(step, device)[1]:
        pass
    return time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("tools.loading_cost", DESCRIPTION, EPILOG)
    parser.add_argument("--model", default="small", help="a size of conf/model (small)")
    parser.add_argument("--pairs", type=whole(3), default=40, metavar="N", help="of steps (40)")
    options = parser.parse(arguments)
    with tempfile.TemporaryDirectory(prefix="loading_cost-") as folder:
        passed = True
        for batching in ("packed", "padded"):
            cheap, words = verdict(batching, *measure(options.model, batching, options.pairs, Path(folder)))
            print(words, flush=True)
            passed &= cheap
    print(f"{'ok' if passed else 'FAILED'}: the bar is {BAR:.0%} of a step")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
