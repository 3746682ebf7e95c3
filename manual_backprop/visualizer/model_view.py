"""A trained model seen at a text: where every head looks, and the five likeliest next tokens at every place.

The hand-written network is asked, whichever implementation has trained the weights: all have the same, and it shows its
inside to a recorder. Needs torch; nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from manual_backprop.common.errors import InputError
from manual_backprop.visualizer.style import safe

if TYPE_CHECKING:
    from manual_backprop.trained_models.saved_model import Found

LONGEST_TEXT = 10_000  # [characters]
MOST_TOKENS = 64  # of a text: a map has as many squares, squared
LIKELIEST = 5
COLUMNS = 4  # maps beside each other
PROBABILITIES = "probabilities"


@dataclass(frozen=True)
class Attention:
    """Of one layer: probabilities (H, T, S), and the tokens of its T rows and S columns; rows look at columns."""

    heads: np.ndarray
    rows: list[str]
    columns: list[str]


@dataclass(frozen=True)
class Seen:
    """`next`: for each place of the text the likeliest tokens after it, with their probabilities."""

    model: str  # which model it is, in a line
    tokens: list[str]
    maps: dict[str, Attention]  # by the layer's name
    next: list[list[tuple[str, float]]]
    note: str


def look(found: Found, text: str) -> Seen:
    """The model of a checkpoint at a text, on the CPU. Raises InputError."""
    if len(text) > LONGEST_TEXT:
        raise InputError(f"the text has {len(text):,} characters: give at most {LONGEST_TEXT:,}")
    import torch

    from manual_backprop.models.custom import CustomTransformer
    from manual_backprop.models.recorder import Recorder
    from manual_backprop.trained_models.saved_model import load_found
    from manual_backprop.trained_models.text_stream import prompt_tokens

    saved = load_found(found, device="cpu")
    tokenizer, network = saved.tokenizer(), saved.model.network
    if not isinstance(network, CustomTransformer):
        custom = CustomTransformer(replace(network.config, device="cpu"))
        custom.load_parameters(network.export_parameters())
        network = custom
    ids = prompt_tokens(tokenizer, text)
    most = min(MOST_TOKENS, network.config.max_seq_len)
    note = f"The first {most} of {len(ids)} tokens." if len(ids) > most else ""
    ids = ids[:most]
    network.recorder = recorder = Recorder(f"*.{PROBABILITIES}")
    with torch.no_grad():
        logits = network.predict(torch.tensor([ids]))[0].double()  # (T, V)
    if not bool(logits.isfinite().all()):
        raise InputError(f"{saved.line}: its logits are not finite, the parameters have diverged")
    likeliest = logits.softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
    tokens = [shown(tokenizer.decode([token])) for token in ids]
    return Seen(
        model=saved.line,
        tokens=tokens,
        maps={
            name.removesuffix(f".{PROBABILITIES}"): Attention(tensor[0].float().numpy(), tokens, tokens)
            for name, tensor in recorder.tensors.items()
        },
        next=[
            [(shown(tokenizer.decode([token])), float(probability)) for token, probability in zip(*place, strict=True)]
            for place in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        ],
        note=note,
    )


def shown(token: str) -> str:
    """A token as it can be seen: blanks and line ends are characters too."""
    visible = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(char if char.isprintable() else "·" for char in visible) or "∅"


def attention_map(seen: Attention) -> dict[str, Any]:
    """All heads of one layer as a plotly figure, four beside each other. A square's colour is the root of its
    probability, since most of them are small; where nothing can be seen, there is none."""
    heads = seen.heads
    count, places, _ = heads.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    x, y = ([f"{place} {safe(token, 12)}" for place, token in enumerate(side)] for side in (seen.columns, seen.rows))
    data, described = [], _square_layout(rows)
    gap = 0.06
    for head in range(count):
        row, column = divmod(head, columns)
        number = "" if head == 0 else str(head + 1)
        across = (
            column / columns + (gap / 2 if column else 0),
            (column + 1) / columns - (gap / 2 if column < columns - 1 else 0),
        )
        down = (1 - (row + 1) / rows + gap / 2, 1 - row / rows - gap / 2)
        quiet = {"showgrid": False, "zeroline": False, "ticks": "", "tickfont": {"size": 9}, "automargin": True}
        described[f"xaxis{number}"] = quiet | {
            "domain": across,
            "anchor": f"y{number}",
            "showticklabels": row == rows - 1,
        }
        described[f"yaxis{number}"] = quiet | {
            "domain": down,
            "anchor": f"x{number}",
            "autorange": "reversed",
            "showticklabels": column == 0,
        }
        described["annotations"].append(
            {"text": f"head {head}", "x": across[0], "y": down[1], "xref": "paper", "yref": "paper", "showarrow": False}
            | {"xanchor": "left", "yanchor": "bottom", "font": {"size": 11}}
        )
        data.append(
            {
                "type": "heatmap",
                "x": x,
                "y": y,
                "z": np.where(heads[head] > 0, np.sqrt(heads[head]), np.nan).astype(np.float32),
                "customdata": heads[head].astype(np.float32),
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
    described["height"] = 40 + rows * 270
    return {"data": data, "layout": described}


def _square_layout(rows: int) -> dict[str, Any]:
    return {
        "margin": {"l": 8, "r": 8, "t": 24, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#7d838c"},
        "annotations": [],
        "showlegend": False,
    }
