"""Statistics of the layers during training: four numbers for each layer in every N-th step
(`training.inspect_every=N`).

    inspect/gradient_norm/LAYER        Euclidean norm of the layer's gradient, before it is clipped
    inspect/update_ratio/LAYER         |change of its parameters in the step| / |parameters before it|
    inspect/dead_units/LAYER           share of a feed-forward network's hidden units that are silent for every token
    inspect/attention_entropy/LAYER    mean entropy of a row of attention probabilities [nats]; 0 looks at one position

The last two are taken over the positions whose targets count, like the loss: padding is left out.

A layer is `embedding`, `blocks.3.attention`, `blocks.3.feed_forward` (each with its norm), `final_norm` or `head`. The
names begin with the quantity, so that MLflow shows four groups of charts, however deep the network is. Inspecting does
not change a bit of the training. `pictures.py` draws the pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...common.batch import AnyBatch, EncoderBatch, PairBatch
from ...common.processes import processes
from ...models.network import Network
from ...models.training_step import UNWATCHED, Unwatched
from ...ops import IGNORED
from ...ops.numerics import wide

PREFIX = "inspect/"
PROBABILITIES, ACTIVATED = "attention.probabilities", ".feed_forward.activated"  # the tensors of the last two
PIECE = 1 << 22  # probabilities whose entropy is computed at a time
SILENT = 0.01  # of the layer's root mean square: a unit that stays below is dead (a dead relu is exactly 0)
BASELINE_NOTE = "training.inspect_every: implementation=baseline shows gradients and updates, no units or attention"


def layer_of(name: str) -> str:
    """The layer of a parameter or an activation: blocks.3.attention_norm.weight -> blocks.3.attention, and
    encoder.blocks.3.attention_norm.weight -> encoder.blocks.3.attention."""
    first, _, rest = name.partition(".")
    if first in ("encoder", "decoder"):
        return f"{first}.{layer_of(rest)}"
    if first == "blocks":
        block, _, rest = rest.partition(".")
        return f"blocks.{block}.{rest.partition('.')[0].removesuffix('_norm')}"
    return "embedding" if first.endswith("embedding") else first


def counted(batch: AnyBatch) -> dict[str, Tensor]:
    """A mask of the positions of a batch that count, by stack: for the decoder, and for the encoder of a source."""
    if isinstance(batch, EncoderBatch):
        return {"encoder": _before(batch.lengths, batch.inputs)}
    found = {"decoder": batch.targets != IGNORED}  # (B, T)
    if isinstance(batch, PairBatch):
        found["encoder"] = _before(batch.source_lengths, batch.source)
    return found


def _before(lengths: Tensor, rows: Tensor) -> Tensor:
    """True in the first `lengths[b]` positions of row b, (B, S)."""
    return torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of each layer, in the order of the network."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    return layers


class Watch(Unwatched):
    """Inspects one step, from its first forward pass until `update`.

    Meanwhile it is the network's recorder; it keeps numbers, not tensors. A step may have several batches.
    """

    def __init__(self, inspector: Inspector):
        self.inspector, self.network = inspector, inspector.network
        self.found: dict[str, Tensor] = {}  # metric -> number on the device
        # masks of the positions of the current batch that count: of the source (B, S), and of the targets (B, T)
        self.counts: dict[str, Tensor] = {}
        self.entropies: dict[str, list[tuple[Tensor, Tensor]]] = {}  # sum over rows, and their number
        self.largest: dict[str, Tensor] = {}  # of each hidden unit (F,), over all tokens so far
        self.squares: dict[str, list[tuple[Tensor, Tensor]]] = {}  # sum of squares, and their number
        self.recorder, self.network.recorder = self.network.recorder, self

    def batch(self, batch: AnyBatch) -> None:
        """Called before each batch."""
        self.counts = counted(batch)

    def wants(self, name: str) -> bool:
        return name.endswith((PROBABILITIES, ACTIVATED))

    @torch.no_grad()
    def __call__(self, name: str, tensor: Tensor) -> None:
        if not self.wants(name):
            return
        assert self.counts, "Watch.batch must be called before each batch"
        layer, counts = layer_of(name), self.counts["encoder" if name.startswith("encoder.") else "decoder"]
        if name.endswith(PROBABILITIES):
            rows = torch.where(counts[:, None], _entropies(tensor), 0)  # (B, H, T)
            self.entropies.setdefault(layer, []).append((rows.sum(), counts.sum() * rows.shape[1]))
        else:
            # `where`, not a product with 0: a position that does not count may be NaN
            activated = torch.where(counts[..., None], tensor.detach(), 0)  # (B, T, F)
            largest = torch.maximum(activated.amax((0, 1)), -activated.amin((0, 1)))
            self.largest[layer] = torch.maximum(self.largest[layer], largest) if layer in self.largest else largest
            squares = torch.linalg.vector_norm(activated, dtype=wide(activated[:0]).dtype).square()
            self.squares.setdefault(layer, []).append((squares, counts.sum() * activated.shape[2]))

    @torch.no_grad()
    def gradients(self) -> None:
        """Called after the last backward pass and before the update, since an optimizer may clip in place."""
        self.network.recorder = self.recorder
        for layer, norm in self._norms(self.network.gradients).items():
            self.found[f"gradient_norm/{layer}"] = norm
        self._gather()
        for layer, sums in self.entropies.items():
            self.found[f"attention_entropy/{layer}"] = _mean(sums)
        for layer, largest in self.largest.items():
            bar = SILENT * _mean(self.squares[layer]).sqrt()
            self.found[f"dead_units/{layer}"] = (wide(largest) <= bar).double().mean()
        self.before = {name: parameter.detach().clone() for name, parameter in self.network.parameters.items()}

    def _gather(self) -> None:
        """Combines the statistics of all processes, if there are several."""
        if processes().size == 1:
            return
        sums = {"entropies": self.entropies, "squares": self.squares}
        mine = {name: {layer: _totals(pairs).tolist() for layer, pairs in of.items()} for name, of in sums.items()}
        parts = processes().gathered(mine | {"largest": {layer: wide(x).tolist() for layer, x in self.largest.items()}})
        device = self.network.device
        for name, of in sums.items():  # a process without a batch has recorded no layer
            for layer in {layer: None for part in parts for layer in part[name]}:
                found = [torch.tensor(part[name][layer], dtype=torch.float64) for part in parts if layer in part[name]]
                total, count = torch.stack(found).sum(0).to(device)
                of[layer] = [(total, count)]
        for layer in {layer: None for part in parts for layer in part["largest"]}:
            found = [torch.tensor(part["largest"][layer]) for part in parts if layer in part["largest"]]
            self.largest[layer] = torch.stack(found).amax(0).to(device)

    @torch.no_grad()
    def update(self) -> None:
        """Called after the update: copies all numbers of the step from the device at once."""
        weights = self._norms(self.before)
        for name, before in self.before.items():  # in place, since one copy of a large network is enough
            torch.sub(self.network.parameters[name], before, out=before)
        changed = self._norms(self.before)
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


def _entropies(probabilities: Tensor) -> Tensor:
    """(B, H, T, S) -> the entropy of each row (B, H, T), for some sequences at a time: this avoids a float32 copy of
    all probabilities."""
    at_once = max(1, PIECE // probabilities[0].numel())
    parts = probabilities.detach().split(at_once)
    return torch.cat([torch.special.entr(wide(part)).sum(-1) for part in parts])


def _totals(sums: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The total of several (sum, number of terms), as a tensor (2)."""
    return torch.stack([torch.stack([number.double() for number in pair]) for pair in sums]).sum(0)


def _mean(sums: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean of several (sum, number of terms); 0 if there are none."""
    totals, counts = (torch.stack(column) for column in zip(*sums, strict=True))
    return totals.sum() / counts.sum().clamp(min=1)


class Inspector:
    """Inspects step 1, every `every`-th step and the last one; no step if `every` is None."""

    def __init__(self, network: Network, every: int | None, last: int):
        self.network, self.every, self.last = network, every, last
        self.layers = layers_of(network.parameters)
        self.metrics: dict[str, float] = {}

    def watch(self, step: int) -> Unwatched:
        """The watch for optimizer step number `step`, from 1: it does nothing in a step that is not inspected."""
        if self.every is None or not (step % self.every == 0 or step in (1, self.last)):
            return UNWATCHED
        return Watch(self)

    def take(self) -> dict[str, float]:
        """The metrics of the last step; empty when called again."""
        metrics, self.metrics = self.metrics, {}
        return metrics
