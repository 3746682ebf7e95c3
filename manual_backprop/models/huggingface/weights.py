"""Converts weights: ours to the names and shapes of `transformers`, and back. No number is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...common.errors import InputError
from ...config.schema import CustomTransformerConfig
from ...optim.parameters import unwrapped
from ..network import parameter_shapes
from .layouts import Layout, entries, layout_of

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # masks and angles that old files contain


def to_theirs(parameters: Mapping[str, Tensor], config: CustomTransformerConfig) -> dict[str, Tensor]:
    """{their name: weight}, copies on the CPU."""
    theirs = {}
    for entry in entries(config):
        weight = torch.cat([parameters[name].detach().cpu() for name in entry.ours])  # stacked by outputs
        theirs[entry.theirs] = (weight.t() if entry.turned else weight).contiguous()
    return theirs


def to_ours(theirs: Mapping[str, Tensor], config: CustomTransformerConfig, where: str) -> dict[str, Tensor]:
    """{our name: weight}. Raises InputError with every weight that is missing, unknown or of another shape."""
    layout = layout_of(config)
    known = {entry.theirs for entry in entries(config)}
    theirs = unwrapped(theirs, lambda name: _full_name(name, layout) in known)
    given = {_full_name(name, layout): tensor for name, tensor in theirs.items() if not name.endswith(BUFFERS)}
    shapes, problems = parameter_shapes(config), []
    ours: dict[str, Tensor] = {}
    if config.traits.tied_head and (head := given.pop("lm_head.weight", None)) is not None:
        embedding = given.get(f"{layout.prefix}wte.weight")
        if embedding is None or not torch.equal(head, embedding):
            problems.append("lm_head.weight is not the token embedding, which is the head here")
    for entry in entries(config):
        weight = given.pop(entry.theirs, None)
        rows = [shapes[name][0] for name in entry.ours]
        expected = (sum(rows), *shapes[entry.ours[0]][1:])
        expected = expected[::-1] if entry.turned else expected
        if weight is None:
            problems.append(f"{entry.theirs} is missing")
        elif tuple(weight.shape) != expected:
            problems.append(f"{entry.theirs} has shape {tuple(weight.shape)}, expected {expected}")
        else:
            weight = weight.t() if entry.turned else weight
            ours |= dict(zip(entry.ours, (part.contiguous() for part in weight.split(rows)), strict=True))
    problems += [f"{name} is unknown here" for name in given]
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(
            "\n  ".join([f"The weights in {where} are not those that its config.json describes:", *problems[:8]]) + more
        )
    return ours


def _full_name(name: str, layout: Layout) -> str:
    return name if name.startswith((layout.prefix, "lm_head.")) else layout.prefix + name


def use_exact_norms(model: Any) -> Any:
    """Replaces every LlamaRMSNorm of a `transformers` model by torch's RMSNorm with the same weights.

    LlamaRMSNorm rounds to float32 in every dtype, so the logits of a float64 model have only seven exact digits. This
    is for comparisons; it changes the given model and returns it.
    """
    for module in list(model.modules()):
        for name, inner in list(module.named_children()):
            if type(inner).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(inner.weight.shape[0], eps=inner.variance_epsilon)
                norm.weight = inner.weight
                setattr(module, name, norm)
    return model
