"""PyTorch's fused optimizers with the interface of `optimizers.py`: the baseline network trains with them.

A step that is not finite is masked on the device by `found_inf`, as `torch.amp.GradScaler` does it: a fused optimizer
then changes nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..ops.numerics import one_number
from .optimizers import Optimizer

# The name of a moment in torch -> its name here, under which implementations exchange it.
MOMENTS = {"exp_avg": "first_moment", "exp_avg_sq": "second_moment", "momentum_buffer": "first_moment"}


class TorchOptimizer(Optimizer):
    """One of torch's optimizers. `places`: {parameter name: (the module's tensor that contains it, its rows there)}."""

    def __init__(
        self,
        kind: Any,
        places: Mapping[str, tuple[nn.Parameter, slice]],
        weight_decay: float,
        settings: Mapping[str, Any],
        moments: tuple[str, ...],
    ):
        self.places, self.moments = places, moments
        wholes = list({id(whole): whole for whole, _ in places.values()}.values())
        super().__init__(wholes[0].device)
        self.wholes, self.weight_decay = wholes, weight_decay
        self.matrices: list[Tensor] = [whole for whole in wholes if whole.dim() >= 2]
        rest = [whole for whole in wholes if whole.dim() < 2]
        self.adam = "exp_avg" in moments
        decay = weight_decay if self.adam else 0.0  # torch's SGD adds the decay to the gradient; see `step`
        groups = [{"params": self.matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
        self.torch_optimizer: Any = kind([group for group in groups if group["params"]], fused=True, **settings)
        for whole in wholes:  # torch creates them in the first step; a checkpoint may need them before
            state = self.torch_optimizer.state[whole]
            if self.adam:
                state["step"] = torch.zeros((), dtype=torch.float32, device=whole.device)
            for moment in moments:
                state[moment] = torch.zeros_like(whole, memory_format=torch.preserve_format)

    @torch.no_grad()
    def step(self, loss: Tensor, learning_rate: float | Tensor, max_grad_norm: float | None = None) -> Tensor:
        gradients = [whole.grad for whole in self.wholes if whole.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.wholes, max_grad_norm, norm)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self._count(finite, loss)
        if self.weight_decay and not self.adam:
            kept = torch.where(finite, one_number(1 - learning_rate * self.weight_decay, norm), 1)
            torch._foreach_mul_(self.matrices, kept)
        for group in self.torch_optimizer.param_groups:
            group["lr"] = learning_rate
        self.torch_optimizer.found_inf = (~finite).float()
        self.torch_optimizer.step()
        increment_version(self.wholes)  # torch's fused optimizers do not do this
        return norm

    def moment_views(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            MOMENTS[moment]: {
                name: self.torch_optimizer.state[whole][moment][rows] for name, (whole, rows) in self.places.items()
            }
            for moment in self.moments
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        if self.adam:
            for whole in self.wholes:
                self.torch_optimizer.state[whole]["step"].copy_(self.updates)
