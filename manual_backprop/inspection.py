"""Looking at a network while it learns: of each layer, in every N-th step, four numbers (`training.inspect_every=N`).

    inspect/gradient_norm/LAYER        Euclidean norm of the layer's gradient, before it is clipped
    inspect/update_ratio/LAYER         |change of its parameters in the step| / |parameters before it|
    inspect/dead_units/LAYER           share of a feed-forward network's hidden units that are silent for every token
    inspect/attention_entropy/LAYER    mean entropy of a row of attention probabilities [nats]; 0 looks at one position

A layer is `embedding`, `blocks.3.attention`, `blocks.3.feed_forward` (each with its norm), `final_norm` or `head`. The
names begin with the quantity, so that MLflow shows four groups of charts, however deep the network is. Nothing here
changes a bit of what is trained. The pictures are made by `inspection_pictures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .models.network import Network
from .ops.numerics import wide

PREFIX = "inspect/"
SILENT = 0.01  # of the layer's root mean square: a unit that stays below is dead (a dead relu is exactly 0)
BASELINE_NOTE = "training.inspect_every: implementation=baseline shows gradients and updates, no units or attention"


def layer_of(name: str) -> str:
    """Of a parameter's or an activation's name: blocks.3.attention_norm.weight -> blocks.3.attention."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        block, _, rest = rest.partition(".")
        return f"blocks.{block}.{rest.partition('.')[0].removesuffix('_norm')}"
    return "embedding" if first.endswith("embedding") else first


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of each layer, in the order of the network."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    return layers


class Unwatched:
    """A step that nobody looks at."""

    def gradients(self) -> None: ...

    def update(self) -> None: ...


UNWATCHED = Unwatched()


class Watch(Unwatched):
    """One step that is looked at: from its first forward pass to its update, which `update` closes.

    It is the network's recorder meanwhile, and keeps numbers, not tensors. A step may have several batches.
    """

    def __init__(self, inspector: Inspector):
        self.inspector, self.network = inspector, inspector.network
        self.found: dict[str, Tensor] = {}  # metric -> number on the device
        self.entropies: dict[str, list[Tensor]] = {}
        self.largest: dict[str, Tensor] = {}  # of each hidden unit (F,), over all tokens so far
        self.squares: dict[str, list[Tensor]] = {}
        self.recorder, self.network.recorder = self.network.recorder, self

    def __call__(self, name: str, tensor: Tensor) -> None:
        if name.endswith(".attention.probabilities"):
            p = wide(tensor.detach())
            self.entropies.setdefault(layer_of(name), []).append(-torch.special.xlogy(p, p).sum(-1).mean())
        elif name.endswith(".feed_forward.activated"):
            layer, size = layer_of(name), wide(tensor.detach()).abs().flatten(0, -2)  # (N, F)
            largest = size.amax(0)
            self.largest[layer] = torch.maximum(self.largest[layer], largest) if layer in self.largest else largest
            self.squares.setdefault(layer, []).append(size.square().mean())

    @torch.no_grad()
    def gradients(self) -> None:
        """After the last backward pass, before the update: an optimizer may clip in place."""
        self.network.recorder = self.recorder
        for layer, norm in self._norms(self.network.gradients).items():
            self.found[f"gradient_norm/{layer}"] = norm
        for layer, values in self.entropies.items():
            self.found[f"attention_entropy/{layer}"] = torch.stack(values).mean()
        for layer, largest in self.largest.items():
            bar = SILENT * torch.stack(self.squares[layer]).mean().sqrt()
            self.found[f"dead_units/{layer}"] = (largest <= bar).to(largest.dtype).mean()
        self.before = {name: parameter.detach().clone() for name, parameter in self.network.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After the update: all numbers of the step come from the device at once."""
        weights = self._norms(self.before)
        changed = self._norms({name: self.network.parameters[name] - before for name, before in self.before.items()})
        for layer, change in changed.items():
            self.found[f"update_ratio/{layer}"] = change / weights[layer]
        values = torch.stack([value.double() for value in self.found.values()]).tolist()
        self.inspector.metrics = {PREFIX + name: value for name, value in zip(self.found, values, strict=True)}

    def _norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            layer: torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(wide(tensors[name].detach())) for name in names])
            )
            for layer, names in self.inspector.layers.items()
        }


class Inspector:
    """Looks at step 1, every `every`-th and the last; at none where `every` is None."""

    def __init__(self, network: Network, every: int | None, last: int):
        self.network, self.every, self.last = network, every, last
        self.layers = layers_of(network.parameters)
        self.metrics: dict[str, float] = {}

    def watch(self, step: int) -> Unwatched:
        """What is to be told of optimizer step number `step`, from 1, as it goes on."""
        if self.every is None or not (step % self.every == 0 or step in (1, self.last)):
            return UNWATCHED
        return Watch(self)

    def take(self) -> dict[str, float]:
        """The metrics of the step that was just made, once."""
        metrics, self.metrics = self.metrics, {}
        return metrics
