"""Dynamic loss scaling, by hand (Micikevicius et al. 2018, section 3.2): float16 loses gradients below 6e-8, so that
backward is run on a loss which is so many times larger that they are none.

The factor is a power of two, by which nothing is rounded. Where gradients overflow, the step is left out and the factor
is halved; after many steps without it is doubled, so that it stays as large as it can be.
"""

import torch
from torch import Tensor

FIRST, LARGEST = 2.0**16, 2.0**24
STEPS = 2000  # without an overflow, until a larger factor is tried


class LossScale:
    """The factor, on the device, where nothing waits for it. `state`: the factor, and the steps since it changed."""

    def __init__(self, device: torch.device):
        self.state = torch.zeros(2, dtype=torch.float32, device=device)
        self.factor, self.steps = self.state  # views
        self.factor.fill_(FIRST)

    @torch.no_grad()
    def update(self, finite: Tensor, loss: Tensor) -> Tensor:
        """After a step: `finite`, whether its loss and gradient norm are. Returns whether it has failed: not where the
        factor was too large alone, and a smaller one is there to be tried."""
        failed = ~finite & ~(torch.isfinite(loss) & (self.factor > 1))
        steps = torch.where(finite, self.steps + 1, 0)
        grows = steps >= STEPS
        smaller = torch.where(finite, self.factor, (self.factor / 2).clamp(min=1))
        self.factor.copy_(torch.where(grows, (self.factor * 2).clamp(max=LARGEST), smaller))
        self.steps.copy_(torch.where(grows, 0, steps))
        return failed
