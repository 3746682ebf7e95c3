"""The pictures of `training.inspect_every`: heat maps over layers and steps, histograms, attention maps.

The heat maps are drawn from metrics.jsonl, so that they contain the steps before a resume. The other two show the
network at the end, for one example that depends only on the data (`Task.example`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...common.batch import AnyBatch, EncoderBatch
from ...common.pictures import new_figure, picture, save_figure, with_grid
from ...models.network import Network
from ...models.recorder import Recorder
from ...ops import IGNORED
from ...tasks import Task
from ...tracking import TrainingLog
from .inspector import PREFIX, layers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYERS, HISTOGRAMS, ATTENTION = "layers.png", "histograms.png", "attention.png"  # files
QUANTITIES = {
    "gradient_norm": "gradient norm",
    "update_ratio": "update / weight",
    "dead_units": "share of dead units",
    "attention_entropy": "entropy of attention [nats]",
}
LOGARITHMIC = ("gradient_norm", "update_ratio")
MOST_TOKENS = 32  # of the example, in an attention map
MOST_BLOCKS = 12  # in an attention map, spread over the depth
MOST_TICKS = 6
BINS = 80


def draw_inspection(log: TrainingLog, folder: Path, title: str, network: Network | None, task: Task) -> list[Path]:
    """Draws all pictures; without a `network` only those from the log. Returns their paths. Overwrites the network's
    gradients."""
    paths = [folder / LAYERS] if draw_layers(log, folder / LAYERS, title) else []
    if network is not None:
        snapshot = PassSnapshot(network, task.example(network.device))
        if draw_histograms(snapshot, folder / HISTOGRAMS, title):
            paths.append(folder / HISTOGRAMS)
        if draw_attention(snapshot, task.text(snapshot.batch, snapshot.places), folder / ATTENTION, title):
            paths.append(folder / ATTENTION)
    return paths


@picture
def draw_layers(log: TrainingLog, path: Path, title: str) -> bool:
    """Heat maps over layers and steps, one for each quantity. Returns False, without a file, if nothing was
    inspected."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, series in log.training.items():
        if name.startswith(PREFIX):
            quantity, _, layer = name.removeprefix(PREFIX).partition("/")
            found.setdefault(quantity, {})[layer] = dict(zip(series.steps, series.values, strict=True))
    shown = [quantity for quantity in QUANTITIES if quantity in found]
    if not shown:
        return False
    rows = max(len(layers) for layers in found.values())
    figure = new_figure(12, 1.6 + 0.4 * max(rows, 8), dpi=110)
    figure.suptitle(title, fontsize=11, parse_math=False)
    columns = 2 if len(shown) > 1 else 1
    grid = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).flatten()
    for axes, quantity in zip(grid, shown, strict=False):
        _heat_map(axes, figure, quantity, found[quantity])
    save_figure(figure, path)
    return True


def _heat_map(axes: Axes, figure: Figure, quantity: str, layers: Mapping[str, Mapping[int, float]]) -> None:
    from matplotlib.colors import LogNorm

    steps = sorted({step for values in layers.values() for step in values})
    values = np.array([[layers[layer].get(step, math.nan) for step in steps] for layer in layers], dtype=float)
    logarithmic = quantity in LOGARITHMIC
    values[~np.isfinite(values) | ((values <= 0) & logarithmic)] = math.nan
    axes.set_title(QUANTITIES[quantity], fontsize=10)
    if np.isnan(values).all():
        axes.text(0.5, 0.5, "nothing finite to show", ha="center", transform=axes.transAxes)
        return
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    scale = {"norm": LogNorm(low, max(high, low * 1.01))} if logarithmic else {"vmin": 0.0, "vmax": max(high, 1e-3)}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", **scale)
    figure.colorbar(image, ax=axes)
    axes.set_yticks(range(len(layers)), list(layers), fontsize=7)
    ticks = np.unique(np.linspace(0, len(steps) - 1, MOST_TICKS).round().astype(int))
    axes.set_xticks(ticks, [str(steps[tick]) for tick in ticks], fontsize=8)
    axes.set_xlabel("optimizer steps", fontsize=8)


class PassSnapshot:
    """Attention probabilities, activations and gradients of one forward and backward pass on a row of an example.

    It overwrites the network's gradients.
    """

    def __init__(self, network: Network, batch: AnyBatch):
        targets = batch.targets
        count = int((~targets.isnan() if targets.is_floating_point() else targets != IGNORED).sum())
        before, network.recorder = network.recorder, (recorder := Recorder("*.probabilities", "*.activated"))
        try:
            network.zero_gradients()
            network.loss_and_gradients(batch, denominator=count, step=None)
        finally:
            network.recorder = before
        self.network, self.batch, self.recorded = network, batch, recorder.tensors
        tokens = batch.inputs if isinstance(batch, EncoderBatch) else batch.tokens
        self.places = min(tokens.shape[1], MOST_TOKENS)

    def attention(self) -> dict[int, np.ndarray]:
        """Attention probabilities (H, T, T) over the first positions of the example, for each block of the decoder, or
        of the encoder if there is no decoder."""
        maps = {name: tensor for name, tensor in self.recorded.items() if name.endswith(".attention.probabilities")}
        of_decoder = {name: tensor for name, tensor in maps.items() if not name.startswith("encoder.")}
        return {
            int(name.partition("blocks.")[2].split(".")[0]): tensor[0, :, : self.places, : self.places]
            .float()
            .cpu()
            .numpy()
            for name, tensor in (of_decoder or maps).items()
        }

    def activated(self) -> dict[str, Tensor]:
        """The hidden units after the activation, for each feed-forward network."""
        return {
            name.rpartition(".")[0]: tensor.float().cpu()
            for name, tensor in self.recorded.items()
            if name.endswith(".feed_forward.activated")
        }


@picture
def draw_histograms(snapshot: PassSnapshot, path: Path, title: str) -> None:
    """Draws for each layer histograms of its weights, its gradients, and its activations."""
    from matplotlib import colormaps

    network = snapshot.network
    layers, gradients = layers_of(network.parameters), network.gradients
    weights = {layer: _joined([network.parameters[name] for name in names]) for layer, names in layers.items()}
    by_layer = {layer: _joined([gradients[name] for name in names]) for layer, names in layers.items()}
    panels: list[tuple[str, Mapping[str, Tensor]]] = [
        ("parameters (gains of norms start at 1)", weights),
        (
            "gradients: log10 of their size",
            {layer: values[values != 0].abs().log10() for layer, values in by_layer.items()},
        ),
    ]
    if activated := snapshot.activated():
        panels.append(("hidden units, after the activation", activated))
    figure = new_figure(5 * len(panels), 5.5, dpi=110)
    figure.suptitle(title, fontsize=11, parse_math=False)
    colours = colormaps["viridis"](np.linspace(0, 0.95, len(layers)))
    for axes, (about, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _histograms(axes, values, dict(zip(layers, colours, strict=True)))
        axes.set_title(about, fontsize=10)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(len(layers), 6), frameon=False, fontsize=7)
    save_figure(figure, path)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float().flatten().cpu() for tensor in tensors])


def _histograms(axes: Axes, values: Mapping[str, Tensor], colours: Mapping[str, np.ndarray]) -> None:
    """Histograms of each layer's numbers over their common range, from the 0.1 % to the 99.9 % quantile."""
    finite = {layer: numbers.flatten()[numbers.flatten().isfinite()].numpy() for layer, numbers in values.items()}
    finite = {layer: numbers for layer, numbers in finite.items() if len(numbers)}
    if finite:
        low = min(float(np.quantile(numbers, 0.001)) for numbers in finite.values())
        high = max(float(np.quantile(numbers, 0.999)) for numbers in finite.values())
        edges = np.linspace(low, high if high > low else low + 1e-6, BINS + 1)
        for layer, numbers in finite.items():
            counts, _ = np.histogram(numbers, edges)
            axes.step(edges[:-1], counts / len(numbers), where="post", color=colours[layer], linewidth=1, label=layer)
    else:
        axes.text(0.5, 0.5, "nothing finite to show", ha="center", transform=axes.transAxes)
    axes.set_yscale("log")
    axes.set_ylabel("share of a layer's numbers", fontsize=8)
    with_grid(axes)


@picture
def draw_attention(snapshot: PassSnapshot, text: str, path: Path, title: str) -> bool:
    """Draws a row of maps for each block, a map for each head. Returns False, without a file, if the network records no
    attention."""
    from matplotlib.colors import PowerNorm

    maps = snapshot.attention()
    if not maps:
        return False
    chosen = sorted({sorted(maps)[int(place)] for place in np.linspace(0, len(maps) - 1, MOST_BLOCKS).round()})
    heads, places = maps[chosen[0]].shape[:2]
    cell = places + 2  # a margin of 2 between maps
    mosaic = np.full((len(chosen) * cell - 2, heads * cell - 2), math.nan)
    for row, block in enumerate(chosen):
        for head in range(heads):
            mosaic[row * cell : row * cell + places, head * cell : head * cell + places] = maps[block][head]
    size = max(6.0, min(2 + 1.8 * heads, 22)), min(2 + 1.8 * len(chosen), 22)
    figure = new_figure(*size, dpi=110)
    read = shorten(f"Row: query, column: key. {places} positions of: {' '.join(text.split())}", 200, placeholder="...")
    figure.suptitle(f"{title}\n{fill(read, int(13 * size[0]))}", fontsize=9, parse_math=False)
    axes = figure.subplots()
    # shows the square root of the probabilities, since most of them are small
    image = axes.imshow(mosaic, cmap="magma", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.6)
    across, down = (np.arange(count) * cell + places / 2 for count in (heads, len(chosen)))
    axes.set_xticks(across, [f"head {head}" for head in range(heads)], fontsize=8)
    axes.set_yticks(down, [f"block {block}" for block in chosen], fontsize=8)
    save_figure(figure, path)
    return True
