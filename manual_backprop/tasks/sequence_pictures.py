"""The cross-attention of a trained network from targets to sources, as a number and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.batch import IGNORED, AnyBatch, PairBatch
from ..common.pictures import drawable, new_figure, picture, save_figure
from ..models.recorder import Recorder
from .sequence_rows import Rows

CROSS_ATTENTION = "cross_attention.png"
ROWS = 200  # measured test rows
COLUMNS = 4  # maps side by side
DIAGONALS = {"reversal": "the anti-diagonal", "copy": "the diagonal"}


@dataclass(frozen=True)
class CrossAttention:
    """The cross-attention of the longest measured row: probabilities (blocks, H, T, S) of T predictions over S
    sources."""

    probabilities: np.ndarray
    source: Sequence[str]
    predicted: Sequence[str]
    best_share: float | None  # of all predictions: those for which the best head attends most to the right symbol
    sentence: str


def measure_cross_attention(network: Any, rows: Rows) -> CrossAttention | None:
    """The cross-attention on the first test rows, with teacher forcing. Overwrites the network's gradients. None if the
    network has no cross-attention or cannot record it."""
    numbers = np.arange(min(ROWS, len(rows)))
    lengths = rows.source_lengths[numbers]
    blocks = cross_attention_of(network, rows.batch(numbers, lengths + 1, device=network.device))
    if blocks is None:
        return None
    share, sentence = None, ""
    if (places := rows.origins()) is not None:
        shares = np.stack([diagonal_shares(block, lengths, places[numbers]) for block in blocks])  # (blocks, H)
        block, head = np.unravel_index(shares.argmax(), shares.shape)
        share = float(shares[block, head])
        sentence = (
            f"head {head} of block {block} attends most to {DIAGONALS[rows.name]} for {share:.1%} of the symbols "
            f"predicted in {len(numbers)} rows"
        )
    row = int(lengths.argmax())
    S = int(lengths[row])
    names = [str(token) for token in rows.source[row, :S]]
    predicted = [*(str(token) for token in rows.target[row, :S]), "end"]
    return CrossAttention(blocks[:, row, :, : S + 1, :S], names, predicted, share, sentence)


def cross_attention_of(network: Any, batch: AnyBatch) -> np.ndarray | None:
    """The probabilities (blocks, B, H, T, S) of all cross-attentions, with teacher forcing. Overwrites the network's
    gradients. None if the network has no cross-attention or cannot record it."""
    if not isinstance(batch, PairBatch):
        return None
    recorder = Recorder("*.cross_attention.probabilities")
    before, network.recorder = network.recorder, recorder
    try:
        network.zero_gradients()
        network.loss_and_gradients(batch, denominator=int((batch.targets != IGNORED).sum()), step=None)
    finally:
        network.recorder = before
    if not recorder.tensors:
        return None
    return np.stack([tensor.float().cpu().numpy() for tensor in recorder.tensors.values()])


def diagonal_shares(probabilities: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For each head, the share of predictions for which it attends most to the position of the predicted symbol.

    probabilities (N, H, T, S); lengths (N,), the number of predicted symbols in each of N rows; places (N, at least the
    longest), the position in the source of each symbol. -> (H,)
    """
    longest = int(lengths.max())
    counts = np.arange(longest) < lengths[:, None]  # (N, longest)
    hits = (probabilities[:, :, :longest].argmax(-1) == places[:, None, :longest]) & counts[:, None]
    return np.asarray(hits.sum((0, 2)) / counts.sum())


@picture
def draw_cross_attention(seen: CrossAttention, path: Path, title: str) -> None:
    """Write a PNG with a map for each head."""
    blocks, heads = seen.probabilities.shape[:2]
    columns = min(COLUMNS, heads)
    of_block = -(-heads // columns)
    width, height = (max(2.6, 0.6 + 0.11 * len(side)) for side in (seen.source, seen.predicted))
    figure = new_figure(width * columns, 0.8 + height * of_block * blocks, dpi=110)
    source, predicted = (list(map(drawable, side)) for side in (seen.source, seen.predicted))
    figure.suptitle(
        f"{title}: attention of each predicted token (row) to the source (column)\n{seen.sentence}", fontsize=9
    )
    grid = figure.subplots(of_block * blocks, columns, squeeze=False)
    for axes in grid.flatten():
        axes.set_axis_off()
    for block in range(blocks):
        for head in range(heads):
            axes = grid[block * of_block + head // columns, head % columns]
            axes.set_axis_on()
            axes.imshow(seen.probabilities[block, head], cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks(range(len(source)), source, fontsize=6)
            axes.set_yticks(range(len(predicted)), predicted, fontsize=6)
            axes.set_title(f"block {block}, head {head}", fontsize=8)
    save_figure(figure, path)
