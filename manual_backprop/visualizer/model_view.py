"""A trained model seen at a text: where every head looks, and the five likeliest next tokens at every place.

The hand-written network is asked, whichever implementation has trained the weights: all have the same, and it shows its
inside to a recorder. Needs torch; nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.errors import InputError
from .style import PLAIN, safe

if TYPE_CHECKING:
    from ..tasks import Reading
    from ..trained_models.saved_model import Found, SavedModel

LONGEST_TEXT = 10_000  # [characters]
MOST_TOKENS = 64  # of a text: a map has as many squares, squared
LIKELIEST = 5
COLUMNS = 4  # maps beside each other
GAP = 0.06  # between them, as a share of the figure
PROBABILITIES = "probabilities"


@dataclass(frozen=True)
class Attention:
    """The attention probabilities of one layer, (H, T, S): rows are the T queries, columns the S keys, with tokens."""

    heads: np.ndarray
    rows: list[str]
    columns: list[str]


@dataclass(frozen=True)
class Seen:
    """`next`: for each place of the text the likeliest tokens after it, with their probabilities; of a whole text or
    series its likeliest labels, or the forecast, which has none."""

    model: str  # which model it is, in a line
    tokens: list[str]
    maps: dict[str, Attention]  # by the layer's name
    title: str  # of `next`
    next: list[list[tuple[str, float | None]]]
    note: str


def look(found: Found, text: str) -> Seen:
    """The model of a checkpoint at a text, on the CPU: of a model of sequences, at the numbers of a row and what it
    writes after them itself; of one that forecasts, at the last values of a series. Raises InputError."""
    if len(text) > LONGEST_TEXT:
        raise InputError(f"the text has {len(text):,} characters: give at most {LONGEST_TEXT:,}")
    import torch

    from ..models.implementations import build_network
    from ..models.recorder import Recorder
    from ..trained_models.saved_model import load_found

    saved = load_found(found, device="cpu")
    network = saved.model.network
    most = min(MOST_TOKENS, network.config.max_seq_len, network.config.source_length)
    reading = _reading(saved, text, most)
    if saved.implementation != "custom":
        network = build_network("custom", replace(network.config, device="cpu"))
        network.load_parameters(saved.model.network.export_parameters())
    network.recorder = recorder = Recorder(f"*.{PROBABILITIES}")
    with torch.no_grad():
        outputs = network.predict(reading.batch)[0].double()  # logits (T, V), or of an encoder (V,), or numbers (O,)
    if not bool(outputs.isfinite().all()):
        raise InputError(f"{saved.line}: its outputs are not finite, the parameters have diverged")
    target, source = ([shown(word) for word in side] for side in (reading.target, reading.source))

    def sides(layer: str) -> tuple[list[str], list[str]]:
        """Whose rows look at whose columns."""
        reads_source = layer.startswith("encoder.") or layer.endswith(".cross_attention")
        return source if layer.startswith("encoder.") else target, source if reads_source else target

    answers: list[list[tuple[str, float | None]]]
    if reading.said is not None:
        answers = [[(shown(word), None) for word in reading.said(outputs.numpy())]]
    else:
        logits = outputs if outputs.dim() == 2 else outputs[None]
        likeliest = logits.softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
        answers = [
            [(shown(reading.word(token)), float(share)) for token, share in zip(*place, strict=True)]
            for place in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        ]
    layers = {name.removesuffix(f".{PROBABILITIES}"): tensor for name, tensor in recorder.tensors.items()}
    return Seen(
        model=saved.line,
        tokens=target,
        maps={
            layer: Attention(tensor[0, :, :most, :most].float().numpy(), *(side[:most] for side in sides(layer)))
            for layer, tensor in layers.items()
        },
        title=reading.title,
        next=answers,
        note=reading.note,
    )


def _reading(saved: SavedModel, text: str, most: int) -> Reading:
    import torch

    from ..common.batch import IGNORED, Batch
    from ..tasks import Reading, task_named
    from ..trained_models.evaluation import restored_task

    if task_named(saved.task_name).inference_command[1] != "--prompt":
        return restored_task(saved).reading(saved.model, text, most)
    from ..trained_models.text_stream import prompt_tokens

    tokenizer = saved.tokenizer()  # which a model of texts has, whether a run has trained it or a program
    tokens = prompt_tokens(tokenizer, text)
    note = f"The first {most} of {len(tokens)} tokens." if len(tokens) > most else ""
    ids = torch.tensor([tokens[:most]])
    words = [tokenizer.decode([token]) for token in tokens[:most]]
    batch = Batch(ids, torch.full_like(ids, IGNORED))
    return Reading(batch, words, (), lambda token: tokenizer.decode([token]), note=note)


def shown(token: str) -> str:
    """A token as it can be seen: blanks and line ends are characters too."""
    visible = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(char if char.isprintable() else "·" for char in visible) or "∅"


def attention_map(seen: Attention) -> dict[str, Any]:
    """All heads of one layer as a plotly figure, four in a row. The colour is the square root of the probability, since
    most are small; keys that a query cannot see have none."""
    count, places, _ = seen.heads.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    x, y = ([f"{place} {safe(token, 12)}" for place, token in enumerate(side)] for side in (seen.columns, seen.rows))
    data: list[dict[str, Any]] = []
    described: dict[str, Any] = PLAIN | {"margin": {"l": 8, "r": 8, "t": 24, "b": 8}, "showlegend": False}
    described |= {"annotations": [], "height": 40 + rows * 270}
    x_axis = {"type": "category", "showgrid": False, "zeroline": False, "ticks": "", "tickfont": {"size": 9}}
    x_axis |= {"automargin": True}
    y_axis = x_axis | {"autorange": "reversed"}
    for head, shares in enumerate(seen.heads):
        row, column = divmod(head, columns)
        number = "" if head == 0 else str(head + 1)
        left, right = column / columns, (column + 1) / columns
        across = (left + (GAP / 2 if column else 0), right - (GAP / 2 if column < columns - 1 else 0))
        down = (1 - (row + 1) / rows + GAP / 2, 1 - row / rows - GAP / 2)
        x_place = {"domain": across, "anchor": f"y{number}", "showticklabels": row == rows - 1}
        y_place = {"domain": down, "anchor": f"x{number}", "showticklabels": column == 0}
        described |= {f"xaxis{number}": x_axis | x_place, f"yaxis{number}": y_axis | y_place}
        described["annotations"].append(
            {"text": f"head {head}", "x": across[0], "y": down[1], "xref": "paper", "yref": "paper", "showarrow": False}
            | {"xanchor": "left", "yanchor": "bottom", "font": {"size": 11}}
        )
        data.append(
            {
                "type": "heatmap",
                "x": x,
                "y": y,
                "z": np.where(shares > 0, np.sqrt(shares), np.nan).astype(np.float32),
                "customdata": shares.astype(np.float32),
                "zmin": 0,
                "zmax": 1,
                "colorscale": [[0, "rgba(47,127,193,0.04)"], [0.5, "rgba(47,127,193,0.65)"], [1, "rgb(224,138,0)"]],
                "showscale": False,
                "xgap": 1 if places <= 32 else 0,
                "ygap": 1 if places <= 32 else 0,
                "hoverongaps": False,
                "xaxis": f"x{number}",
                "yaxis": f"y{number}",
                "hovertemplate": "%{y} looks at %{x}: %{customdata:.1%}<extra></extra>",
            }
        )
    return {"data": data, "layout": described}
