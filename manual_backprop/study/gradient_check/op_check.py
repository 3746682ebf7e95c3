"""Checks one case of one op: its values and gradients against autograd, and the contract of a pair.

The contract of a pair: a backward adds into the given buffers and changes nothing else. Its cache belongs to one
forward: other forwards in between do not change it, and a second backward with it gives the same.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops import Dropout
from .measure import AUTOGRAD_BAR, EXACT, Finding, differing, error_of, errors_of, floor_of
from .op_case import Case, Draw, on_tensors
from .op_table import ROWS, Row, cases_of


def check_ops(pairs: ModuleType = ops) -> list[Finding]:
    """The findings of every case of every row."""
    return [
        finding
        for row in ROWS.values()
        for case in cases_of(row, Draw(torch.Generator().manual_seed(0)))
        for finding in check_op(row, case, pairs)
    ]


def call(row: Row, case: Case, pairs: ModuleType) -> tuple[dict[str, Tensor], Any]:
    """Calls the forward of a pair: its outputs by name, and its cache."""
    output, cache = getattr(pairs, f"{row.name}_forward")(**case.inputs, **case.parameters, **case.settings)
    return row.named(output), cache


def upstream_of(row: Row, case: Case, outputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Any]:
    """A random gradient for every output, in the memory layout of the inputs. (A gradient of ones would hide bugs in
    softmax and layer norm.)"""
    upstream: dict[str, Any] = {}
    for name, output in outputs.items():
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        if case.name == "non-contiguous" and noise.dim() > 1:
            noise = noise.transpose(0, -1).contiguous().transpose(0, -1)
        upstream[f"d{name}"] = None if name in case.unused else case.upstream.get(f"d{name}", noise)
    return upstream


def autograd(row: Row, case: Case, upstream: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the mirror, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in (case.inputs | case.parameters).items()}
    outputs = row.named(row.mirror(**leaves, **case.settings))
    used = {name: output for name, output in outputs.items() if upstream[f"d{name}"] is not None}
    seeds = [torch.as_tensor(upstream[f"d{name}"], dtype=y.dtype, device=y.device) for name, y in used.items()]
    gradients = torch.autograd.grad(list(used.values()), list(leaves.values()), seeds, materialize_grads=True)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in outputs.items()}, named


def other_case(case: Case, generator: torch.Generator) -> Case:
    """Different values in the same shapes, as if another layer, or the next step, called the pair."""

    def other_tensor(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return value + torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        return value.roll(1, -1) if value.dim() else value + 1

    def other(value: Any) -> Any:
        if isinstance(value, Dropout):
            return value._replace(key=value.key ^ 0x5DEECE66D1234567)
        return on_tensors(other_tensor, value)

    return case.mapped(other)


def tensors_in(*groups: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors by name; those of a tuple also have their index."""
    found: dict[str, Tensor] = {}
    for group in groups:
        for name, value in group.items():
            parts = value if isinstance(value, tuple) else (value,)
            found |= {f"{name} {n}" if n else name: part for n, part in enumerate(parts) if isinstance(part, Tensor)}
    return found


def check_op(row: Row, case: Case, pairs: ModuleType = ops) -> list[Finding]:
    """All findings of one case; `measure.py` defines the error of a gradient."""
    generator = torch.Generator().manual_seed(1)
    backward = getattr(pairs, f"{row.name}_backward")
    outputs, cache = call(row, case, pairs)
    upstream = upstream_of(row, case, outputs, generator)
    buffers = {
        f"d{name}": torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in case.parameters.items()
    }
    filled = {name: buffer.clone() for name, buffer in buffers.items()}
    given = tensors_in(case.inputs, case.parameters, case.settings, upstream, outputs)
    before = {name: tensor.clone() for name, tensor in given.items()}

    # another call uses the pair between this forward and its backward
    between = other_case(case, generator)
    other_outputs, other_cache = call(row, between, pairs)
    backward(
        **upstream_of(row, between, other_outputs, generator),
        cache=other_cache,
        **{name: torch.zeros_like(buffer) for name, buffer in buffers.items()},
    )

    returned = backward(**upstream, cache=cache, **buffers)
    once = {name: buffer.clone() for name, buffer in buffers.items()}
    returned_once = {name: gradient.clone() for name, gradient in gradients_of(row, returned).items()}
    again = backward(**upstream, cache=cache, **buffers)

    want_outputs, want = autograd(row, case, upstream)
    subject = f"{row.name}: {case.name}"
    results = [*outputs.values(), *gradients_of(row, returned).values()]
    findings = [
        Finding(subject, name, error_of(outputs[name], want_outputs[name]), AUTOGRAD_BAR) for name in row.outputs
    ]
    # The buffers start with random numbers, so that an assignment instead of += gives a large error.
    got = {name: once[name] - filled[name] for name in once}
    got |= {f"d{name}": gradient for name, gradient in gradients_of(row, returned).items() if name in case.inputs}
    findings += [Finding(subject, name, error, AUTOGRAD_BAR) for name, error in errors_of(got, want).items()]
    floor = floor_of(want)
    twice = max((error_of(buffers[n] - filled[n], 2 * want[n], floor) for n in buffers), default=0.0)
    repeated = sum(differing(returned_once, gradients_of(row, other)) for other in (returned, again))
    findings += [
        Finding(subject, "a second backward adds the same", twice, AUTOGRAD_BAR),
        Finding(subject, "a second backward returns the same", repeated, EXACT),
        Finding(subject, "tensors changed that are not gradients", differing(before, given), EXACT),
        Finding(subject, "tensors that require grad", float(sum(t.requires_grad for t in results)), EXACT),
    ]
    return findings


def gradients_of(row: Row, returned: Any) -> dict[str, Tensor]:
    """The gradients that a backward returned, by input: it returns one tensor for all of them, or a named tuple."""
    if not row.returns:
        assert returned is None, f"{row.name}_backward returns {returned}"
        return {}
    if isinstance(returned, Tensor):
        return dict.fromkeys(row.returns, returned)
    return {name: getattr(returned, f"d{name}") for name in row.returns}
