"""AdamW and SGD of `kernels=fused`. They read the gradient twice and everything else once.

An update is bound by memory: for 124M parameters in bfloat16 it moves 2.7 GB. In the compiled version one loop clips,
decays, and updates both moments and the parameter, and writes each number once; where a network keeps rounded matrices
for its products (bf16_mixed), it writes these too. Without a compiler, PyTorch's kernels update pieces that fit into
the cache, in float32 copies.
"""

import functools
import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ...ops.numerics import wide
from ...optim import optimizers as reference
from .compiled import CompiledFunction, compiled, compiled_functions

Number = float | Tensor


@compiled(": float32", "P: parameter")
def gradient_norm(norm: Tensor, gradient: Tensor) -> None:
    """norm, one number, = the root of the sum of the squares of gradient (P)."""
    norm.copy_(torch.linalg.vector_norm(wide(gradient)))


@compiled(*[": float32"] * 5, *[": int64"] * 4, "float", "float")
def check_step(
    clip: Tensor,
    rate: Tensor,
    finite: Tensor,
    norm: Tensor,
    loss: Tensor,
    updates: Tensor,
    nonfinite_steps: Tensor,
    nonfinite_in_a_row: Tensor,
    nonfinite_longest: Tensor,
    learning_rate: Number,
    max_grad_norm: Number,
) -> None:
    """`optim.FlatOptimizer._check`: clip, rate and finite from norm and loss; the counts are updated. All are one
    number; finite is 1 or 0. Without clipping max_grad_norm is infinite."""
    counts = torch.isfinite(norm) & torch.isfinite(loss)
    updates += counts
    nonfinite_steps += ~counts
    nonfinite_in_a_row.copy_(torch.where(counts, 0, nonfinite_in_a_row + 1))
    nonfinite_longest.copy_(torch.maximum(nonfinite_longest, nonfinite_in_a_row))
    clip.copy_((max_grad_norm / (norm + 1e-6)).clamp(max=1))
    rate.copy_(counts * learning_rate)
    finite.copy_(counts)


@compiled("P: parameter", "P", "P: parameter", "P: float32", "P: float32", *["float"] * 10)
def adamw_step(
    parameter: Tensor,
    rounded: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    finite: Number,
    clip: Number,
    beta1: Number,
    share1: Number,
    beta2: Number,
    share2: Number,
    epsilon: Number,
    decay: Number,
    rate: Number,
    updates: Number,
) -> None:
    """`optim.AdamW` for parameters (P) with the same decay; if `finite` is 0 nothing changes.

    `share` is 1 - beta, passed because float32 would lose a few of its digits here. `updates` counts this one too.
    `rounded` (P) is a copy of the parameter in the dtype of the products, or the parameter itself.
    """
    counts = torch.as_tensor(finite, device=parameter.device) > 0
    # 1 - beta^updates, without the digits that beta = 1 - share would lose in float32
    shares = torch.tensor([share1, share2], dtype=torch.float64, device=parameter.device)
    corrections = -torch.expm1(updates * torch.log1p(-shares))
    p, g = wide(parameter), clip * wide(gradient)
    first = beta1 * first_moment + share1 * g
    second = beta2 * second_moment + share2 * g * g
    root = corrections[1].sqrt().to(p)
    change = rate * decay * p + (rate / corrections[0]).to(p) * first / (second.sqrt() / root + epsilon)
    first_moment.copy_(torch.where(counts, first, first_moment))
    second_moment.copy_(torch.where(counts, second, second_moment))
    parameter.copy_(torch.where(counts, p - change, p))
    rounded.copy_(parameter)


@compiled("P: parameter", "P", "P: parameter", "P: float32", *["float"] * 5)
def sgd_step(
    parameter: Tensor,
    rounded: Tensor,
    gradient: Tensor,
    moment: Tensor,
    finite: Number,
    clip: Number,
    momentum: Number,
    decay: Number,
    rate: Number,
) -> None:
    """`optim.SGD`, likewise."""
    counts = torch.as_tensor(finite, device=parameter.device) > 0
    p = wide(parameter)
    total = momentum * moment + clip * wide(gradient)
    moment.copy_(torch.where(counts, total, moment))
    parameter.copy_(torch.where(counts, p - rate * (decay * p + total), p))
    rounded.copy_(parameter)


class OnePass(reference.FlatOptimizer):
    """What AdamW and SGD share: one pass over the buffers."""

    loop: CompiledFunction  # (parameters, these rounded, gradients, moments ..., finite, clip, `_numbers`)

    def step(self, loss: Tensor, learning_rate: float | Tensor, max_grad_norm: float | None = None) -> Tensor:
        with compiled_functions(self.uses_library):
            return super().step(loss, learning_rate, max_grad_norm)

    def _check(
        self, norm: Tensor, loss: Tensor, learning_rate: float | Tensor, max_grad_norm: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (
            *self._checked,
            norm,
            loss,
            self.updates,
            self.nonfinite_steps,
            self.nonfinite_in_a_row,
            self.nonfinite_longest,
        )
        if self.loss_scale is not None or not check_step.compiles(*tensors):
            return super()._check(norm, loss, learning_rate, max_grad_norm)
        check_step(*tensors, learning_rate, math.inf if max_grad_norm is None else max_grad_norm)
        return self._checked

    @functools.cached_property
    def _checked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for clip, rate and finite."""
        clip, rate, finite = torch.empty(3, device=self.counts.device)
        return clip, rate, finite

    def _gradient_norm(self) -> Tensor:
        gradient = self.gradients.buffer
        norm = gradient.new_empty((), dtype=torch.float32)
        if not gradient_norm.compiles(norm, gradient):
            return super()._gradient_norm()
        gradient_norm(norm, gradient)
        return norm

    def _update_part(self, part: slice, clip: Tensor, rate: Tensor, decay: float, finite: Tensor) -> None:
        buffers, rounded = self._buffers(part), self.rounded
        fresh = rounded is not None and rounded.is_fresh()
        compiles = self.loop.compiles(*buffers)
        if compiles:
            self.loop(*buffers, finite, clip, *self._numbers(rate, decay))
        else:
            super()._update_part(part, clip, rate, decay, finite > 0)  # of `check_step` it is a number
        increment_version(self.parameters.buffer)  # neither the library nor PyTorch's fused optimizers do this
        if rounded is not None and fresh and compiles:
            rounded.is_written()

    @abstractmethod
    def _numbers(self, rate: Tensor, decay: float) -> tuple[Number, ...]: ...

    def _buffers(self, part: slice) -> list[Tensor]:
        """The part of parameters, rounded parameters, gradients and moments."""
        parameters, decayed = self.parameters.buffer, part.stop <= self.parameters.decayed_size
        rounded = self.rounded.flat.buffer if self.rounded is not None and decayed else parameters
        moments = [self.moment(name, part) for name in self.moments]
        return [*[buffer[part] for buffer in (parameters, rounded, self.gradients.buffer)], *moments]

    def _widened(self, p: Tensor) -> Tensor:
        """The parameters of a piece in the dtype of the moments: p itself, or a copy that the next piece overwrites."""
        return p if p.dtype == self.wide else self._wide_parameters[: len(p)].copy_(p)

    @functools.cached_property
    def _wide_parameters(self) -> Tensor:
        return torch.empty_like(self._room)


class AdamW(OnePass, reference.AdamW):
    """`optim.AdamW`."""

    loop = adamw_step

    def _numbers(self, rate: Tensor, decay: float) -> tuple[Number, ...]:
        beta1, beta2 = self.betas
        return beta1, 1 - beta1, beta2, 1 - beta2, self.epsilon, decay, rate, self.updates

    def _update(self, piece: slice, gradient: Tensor, rate: Tensor, decay: float, finite: Tensor) -> None:
        p = self.parameters.buffer[piece]
        values = self._widened(p)
        torch._fused_adamw_(
            [values],
            [gradient],
            [self.moment("first_moment", piece)],
            [self.moment("second_moment", piece)],
            [],
            [self.updates.float()],
            lr=rate,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=decay,
            eps=self.epsilon,
            amsgrad=False,
            maximize=False,
            found_inf=(~finite).float(),  # 1: nothing changes
        )
        if values is not p:
            self._write(piece, values)


class SGD(OnePass, reference.SGD):
    """`optim.SGD`.

    PyTorch's kernel adds the weight decay to the gradient, which is not decoupled: here the decay is applied before.
    Without momentum PyTorch's kernel keeps no moment, and a resume with momentum would miss it: then it is not called.
    """

    loop = sgd_step

    def _numbers(self, rate: Tensor, decay: float) -> tuple[Number, ...]:
        return self.momentum, decay, rate

    def _update(self, piece: slice, gradient: Tensor, rate: Tensor, decay: float, finite: Tensor) -> None:
        if not self.momentum:
            super()._update(piece, gradient, rate, decay, finite)
            return
        p = self.parameters.buffer[piece]
        values = self._widened(p)
        if decay:
            values.mul_(1 - rate * decay)
        torch._fused_sgd_(
            [values],
            [gradient],
            [self.moment("first_moment", piece)],
            lr=rate,
            momentum=self.momentum,
            dampening=0.0,
            weight_decay=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # the moment is 0 then
            found_inf=(~finite).float(),  # 1: nothing changes
        )
        if values is not p:
            self._write(piece, values)
