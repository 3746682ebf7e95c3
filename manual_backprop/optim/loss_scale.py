"""Dynamic loss scaling, by hand (Micikevicius et al. 2018, section 3.2). float16 loses gradients below 6e-8, so
backward starts from a loss that is multiplied by a large factor.

The factor is a power of two, so multiplying rounds nothing. If gradients overflow, the step is skipped and the factor
is halved. After many steps without overflow it is doubled. So it stays as large as possible.
"""

import torch
from torch import Tensor

FIRST, LARGEST = 2.0**16, 2.0**24
STEPS = 2000  # without overflow, until a larger factor is tried


class LossScale:
    """The factor, on the device, so that nothing waits for it. `state`: the factor, and the steps since it changed."""

    def __init__(self, device: torch.device):
        self.state = torch.zeros(2, dtype=torch.float32, device=device)
        self.factor, self.steps = self.state  # views
        self.factor.fill_(FIRST)

    @torch.no_grad()
    def update(self, finite: Tensor, loss: Tensor) -> Tensor:
        """Called after a step. `finite`: whether its loss and gradient norm are finite. Returns whether the step counts
        as non-finite: not if only the factor was too large, and a smaller one is left to try."""
        failed = ~finite & ~(torch.isfinite(loss) & (self.factor > 1))
        steps = torch.where(finite, self.steps + 1, 0)
        grows = steps >= STEPS
        smaller = torch.where(finite, self.factor, (self.factor / 2).clamp(min=1))
        self.factor.copy_(torch.where(grows, (self.factor * 2).clamp(max=LARGEST), smaller))
        self.steps.copy_(torch.where(grows, 0, steps))
        return failed
