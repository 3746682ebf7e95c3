"""AdamW and SGD over flat buffers. A step that is not finite changes nothing, and the host does not wait to find out.

Loss, gradient norm and counts stay on the device. Whether a step counts is one boolean there. If it is False, the
gradient becomes 0 by `torch.where` (NaN times 0 is NaN), the decay rates of the moments 1 and the learning rate 0, so
that parameters, moments and their step count keep every bit.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops.numerics import NARROW, one_number
from .loss_scale import LossScale
from .parameters import Flat, Layout, RoundedMatrices, copy_into, copy_on_cpu


class Optimizer(ABC):
    """Counts steps and exposes its state by name: everything that later steps depend on, and nothing else."""

    loss_scale: LossScale | None = None  # of the network, in fp16_mixed

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        # views of one tensor, so that one copy reads or restores all of them
        self.updates, self.nonfinite_steps, self.nonfinite_in_a_row, self.nonfinite_longest = self.counts

    @abstractmethod
    def step(self, loss: Tensor, learning_rate: float | Tensor, max_grad_norm: float | None = None) -> Tensor:
        """One update from the current gradients; returns their norm before clipping, on the device.

        Gradients whose norm exceeds `max_grad_norm` are scaled to it (Pascanu et al. 2013). If the loss or the norm is
        not finite, nothing is updated and the step is counted as non-finite. If only the loss scale was too large for
        float16, the step is not counted and the scale is lowered. The rate may be a number on the device: a recorded
        step reads it there.
        """

    @abstractmethod
    def moment_views(self) -> dict[str, Mapping[str, Tensor]]:
        """{name of a moment: {name of a parameter: view}}."""

    def _count(self, finite: Tensor, loss: Tensor) -> None:
        failed = ~finite if self.loss_scale is None else self.loss_scale.update(finite, loss)
        self.updates += finite
        self.nonfinite_steps += failed
        self.nonfinite_in_a_row.copy_(torch.where(finite, 0, self.nonfinite_in_a_row + failed))
        self.nonfinite_longest.copy_(torch.maximum(self.nonfinite_longest, self.nonfinite_in_a_row))

    def reset_longest_nonfinite(self) -> None:
        """Resets the longest run of consecutive non-finite steps to the current one: the caller has seen the
        earlier."""
        self.nonfinite_longest.copy_(self.nonfinite_in_a_row)

    def state_views(self) -> dict[str, Tensor]:
        """The state, not copied: `moment/parameter` for every moment, and `counts`."""
        moments = self.moment_views().items()
        named = {f"{moment}/{name}": view for moment, views in moments for name, view in views.items()}
        return named | self.whole_views()

    def whole_views(self) -> dict[str, Tensor]:
        """The part of the state that belongs to no parameter."""
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state}
        return {"counts": self.counts} | scale

    def state(self) -> dict[str, Tensor]:
        """Copies of the state, on the CPU."""
        return {name: copy_on_cpu(view) for name, view in self.state_views().items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies a state in. Raises InputError, and changes nothing, if names or shapes differ."""
        copy_into(self.state_views(), state, what="optimizer state")


class FlatOptimizer(Optimizer):
    """An optimizer over flat buffers: norm, checks and counts, then the update of each part, in pieces."""

    moment_names: tuple[str, ...] = ()
    uses_library = False  # whether it runs compiled where possible (`kernels`)
    rounded: RoundedMatrices | None = None  # products read these instead of the parameters; the kernels write both
    chunk = 1 << 19  # elements: intermediate results of a chunk stay in the processor's cache

    def __init__(self, layout: Layout, parameters: Flat, gradients: Flat, weight_decay: float = 0.0):
        super().__init__(parameters.buffer.device)
        self.parameters, self.gradients, self.weight_decay = parameters, gradients, weight_decay
        buffer = parameters.buffer
        self.wide = torch.float32 if buffer.dtype in NARROW else buffer.dtype  # the dtype of moments and sums
        self.moments = {name: layout.allocate(self.wide, buffer.device) for name in self.moment_names}
        self.part = slice(0, buffer.numel())  # of the buffers: it updates this part and has moments for it

    def keep_part(self, part: slice) -> None:
        """Restrict updates and moments to this part of the buffers from now on: other processes update the rest
        (`sharding`). The gradient norm is still that of all parameters."""
        self.moments = {name: Flat(flat.buffer[part].clone(), {}, 0) for name, flat in self.moments.items()}
        self.part = part

    def moment(self, name: str, piece: slice) -> Tensor:
        """The moment of a piece of the parameters."""
        return self.moments[name].buffer[piece.start - self.part.start : piece.stop - self.part.start]

    def moment_views(self) -> dict[str, Mapping[str, Tensor]]:
        return {name: flat.views for name, flat in self.moments.items()}

    @torch.no_grad()
    def step(self, loss: Tensor, learning_rate: float | Tensor, max_grad_norm: float | None = None) -> Tensor:
        norm = self._gradient_norm()
        self._update_all(*self._check(norm, loss, learning_rate, max_grad_norm))
        return norm

    def _check(
        self, norm: Tensor, loss: Tensor, learning_rate: float | Tensor, max_grad_norm: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Counts the step. Returns the factor that clips the gradient, the learning rate, 0 if the step is not finite,
        and whether it is."""
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self._count(finite, loss)
        clip = torch.ones_like(norm) if max_grad_norm is None else (max_grad_norm / (norm + 1e-6)).clamp(max=1)
        # in the dtype of the norm: torch.where of two Python numbers would be float32
        return clip, torch.where(finite, one_number(learning_rate, norm), 0), finite

    def _gradient_norm(self) -> Tensor:
        # In pieces, because a piece may be converted to the wide dtype, always into the same buffer: a whole copy would
        # be as large as the gradient, and pieces that are freed between small live tensors fragment the memory.
        norms = [
            torch.linalg.vector_norm(piece if piece.dtype == self.wide else self._room[: len(piece)].copy_(piece))
            for piece in self.gradients.buffer.split(self.chunk)
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _parts(self) -> list[tuple[slice, float]]:
        """The part with weight decay, then the part without, each with its decay."""
        begin, end = self.part.start, self.part.stop
        border = min(max(self.parameters.decayed_size, begin), end)
        parts = (slice(begin, border), self.weight_decay), (slice(border, end), 0.0)
        return [(part, decay) for part, decay in parts if part.start < part.stop]

    def _update_all(self, clip: Tensor, rate: Tensor, finite: Tensor) -> None:
        for part, decay in self._parts():
            self._update_part(part, clip, rate, decay, finite)

    def _update_part(self, part: slice, clip: Tensor, rate: Tensor, decay: float, finite: Tensor) -> None:
        """Updates one part of the buffers; changes nothing if `finite` is False."""
        for start in range(part.start, part.stop, self.chunk):
            piece = slice(start, min(start + self.chunk, part.stop))
            gradient = torch.mul(self.gradients.buffer[piece], clip[None], out=self._room[: piece.stop - start])
            self._update(piece, gradient, rate, decay, finite)

    @functools.cached_property
    def _room(self) -> Tensor:
        """A buffer for a piece of the gradient in the wide dtype."""
        gradient = self.gradients.buffer
        return gradient.new_empty(min(self.chunk, gradient.numel()), dtype=self.wide)

    @abstractmethod
    def _update(self, piece: slice, gradient: Tensor, rate: Tensor, decay: float, finite: Tensor) -> None:
        """Updates one piece of the buffers with a clipped gradient in the wide dtype; may write anything if `finite` is
        False."""

    def _write(self, piece: slice, values: Tensor) -> None:
        self.parameters.buffer[piece].copy_(values)


class AdamW(FlatOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

    m = beta1 m + (1 - beta1) g                    first moment, and its bias correction m / (1 - beta1^t)
    v = beta2 v + (1 - beta2) g^2                  second moment, likewise
    p = p - rate (decay p + m_corrected / (sqrt(v_corrected) + epsilon))
    """

    moment_names = ("first_moment", "second_moment")

    def __init__(
        self,
        layout: Layout,
        parameters: Flat,
        gradients: Flat,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ):
        super().__init__(layout, parameters, gradients, weight_decay)
        self.betas, self.epsilon = betas, epsilon

    def _update(self, piece: slice, gradient: Tensor, rate: Tensor, decay: float, finite: Tensor) -> None:
        gradient = torch.where(finite, gradient, 0)
        first = self.moment("first_moment", piece)
        second = self.moment("second_moment", piece)
        p = self.parameters.buffer[piece]
        beta1, beta2 = self.betas
        # a non-finite step keeps the moments: m * 1 + 0
        first.mul_(torch.where(finite, torch.full_like(rate, beta1), 1)).add_(gradient, alpha=1 - beta1)
        second.mul_(torch.where(finite, torch.full_like(rate, beta2), 1)).addcmul_(gradient, gradient, value=1 - beta2)
        updates = self.updates.clamp(min=1).double()
        first_correction = (1 - beta1**updates).to(rate)
        root_of_second_correction = (1 - beta2**updates).sqrt().to(rate)
        denominator = second.sqrt().div_(root_of_second_correction).add_(self.epsilon)
        change = (first / denominator).mul_(rate / first_correction)
        values = p.to(rate.dtype)
        self._write(piece, values * (1 - rate * decay) - change)


class SGD(FlatOptimizer):
    """Gradient descent with momentum (Sutskever et al. 2013, in PyTorch's form) and decoupled weight decay.

    m = momentum m + g;  p = p - rate (decay p + m)
    """

    moment_names = ("first_moment",)

    def __init__(
        self, layout: Layout, parameters: Flat, gradients: Flat, weight_decay: float = 0.0, momentum: float = 0.0
    ):
        super().__init__(layout, parameters, gradients, weight_decay)
        self.momentum = momentum

    def _update(self, piece: slice, gradient: Tensor, rate: Tensor, decay: float, finite: Tensor) -> None:
        gradient = torch.where(finite, gradient, 0)
        first = self.moment("first_moment", piece)
        first.mul_(torch.where(finite, torch.full_like(rate, self.momentum), 1)).add_(gradient)
        values = self.parameters.buffer[piece].to(rate.dtype)
        self._write(piece, values * (1 - rate * decay) - first * rate)
