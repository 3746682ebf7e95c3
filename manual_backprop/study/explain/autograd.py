"""One step by hand, and autograd's number for every gradient in it.

`trace_step` runs the real `CustomTransformer._training_step` under the tracer, then the same forward functions once
more with autograd recording. There, every name that a statement binds becomes a node of its own, so `.grad` of it is
the gradient through this name, in this function, from this line on: exactly what the hand-written code calls `dname`.
The alphabet does the pairing: `dname` of `x_backward` belongs to `name` of `x_forward`. Nothing of the calculus is
written here a second time.

For networks small enough to print, on the CPU in float64, without dropout.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.batch import AnyBatch, EncoderBatch, PairBatch
from ...models.custom import CustomTransformer
from ...models.network import DropoutSource, Memory
from ...ops import Visible
from ...optim.parameters import Flat
from .trace import Call, Tracer, Value


@dataclass(eq=False)
class TracedStep:
    """One step by hand, every gradient beside autograd's."""

    network: CustomTransformer
    batch: AnyBatch
    root: Call
    loss: Tensor
    autograd_loss: Tensor
    autograd_gradients: dict[str, Tensor]  # of the parameters, by name
    gradients: list[tuple[str, Value]]  # (function, value) of everything that was compared, in the order of time
    alone: dict[str, str]  # `function.name` of each gradient that autograd has no number for -> why

    @property
    def worst(self) -> tuple[float, str]:
        """The largest difference between a number by hand and autograd's, and where."""
        compared = [(difference(value), f"{value.name} in {function}") for function, value in self.gradients]
        compared += [
            (float((self.network.gradients[name] - gradient).abs().max()), f"the gradient of {name}")
            for name, gradient in self.autograd_gradients.items()
        ]
        return max(compared, key=lambda entry: (math.isnan(entry[0]), entry[0]))


def difference(value: Value) -> float:
    assert value.difference is not None, f"{value.name} has a forward value, but no gradient reached that"
    return value.difference


def loss_by_autograd(network: CustomTransformer, batch: AnyBatch, denominator: int) -> Tensor:
    """The forward half of `_training_step`, its names included; the backward half is autograd's."""
    dropout, seen = DropoutSource(network.config, None), Visible.within(getattr(batch, "segments", None))
    if isinstance(batch, EncoderBatch):
        inputs = batch.inputs.clone().requires_grad_(batch.inputs.is_floating_point())  # numbers have a gradient too
        outputs, _ = network._outputs_forward(inputs, batch.lengths, dropout=dropout)
        if network.config.head_loss == "squared_error":
            loss, _ = network.ops.squared_error_forward(outputs, batch.targets, denominator)
        else:
            smoothing = network.config.label_smoothing
            loss, _ = network.ops.cross_entropy_forward(outputs, batch.targets, denominator, smoothing)
        return loss
    if isinstance(batch, PairBatch):
        visible = Visible(causal=False, key_lengths=batch.source_lengths)
        memory, _ = network._hidden_forward(batch.source, visible, dropout, stack="encoder.")
        read = Memory(memory.clone(), visible)
        x, _ = network._hidden_forward(batch.tokens, seen, dropout, stack="decoder.", memory=read)
    else:
        x, _ = network._hidden_forward(batch.tokens, seen, dropout)
    loss, _ = network._loss_forward(x, batch.targets, denominator)
    return loss


def with_leaf(network: CustomTransformer) -> tuple[CustomTransformer, Tensor]:
    """A network of the same values whose parameters are views of one leaf, as they are views of one buffer."""
    twin = type(network)(network.config)
    leaf = network.flat_parameters.buffer.detach().clone().requires_grad_()
    views = views_in(leaf, network)
    twin.flat_parameters = Flat(leaf, views, network.flat_parameters.decayed_size)
    twin.parameters = twin.matrices = views
    twin.block_parameters = {block: twin._block_views(twin.flat_parameters, block) for block in twin.block_parameters}
    twin.head = views["token_embedding.weight" if twin.config.tied_head else "head.weight"]
    return twin, leaf


def views_in(buffer: Tensor, network: CustomTransformer) -> dict[str, Tensor]:
    """The parts of a flat buffer that belong to the network's parameters, by name and in their shapes."""
    return {
        name: buffer[view.storage_offset() : view.storage_offset() + view.numel()].view(view.shape)
        for name, view in network.parameters.items()
    }


def trace_step(network: CustomTransformer, batch: AnyBatch, denominator: int) -> TracedStep:
    """Traces one step of `network`. Its gradients must be zero and are filled; its parameters do not change.

    Dropout is left out: step None.
    """
    with Tracer() as by_hand:
        loss = network.loss_and_gradients(batch, denominator=denominator, step=None)
    twin, leaf = with_leaf(network)
    with torch.enable_grad(), Tracer(nodes=True) as by_autograd:
        autograd_loss = loss_by_autograd(twin, batch, denominator)
    autograd_loss.backward()
    assert by_hand.root is not None
    assert by_autograd.root is not None
    assert leaf.grad is not None
    gradients = views_in(leaf.grad, network)
    traced = TracedStep(network, batch, by_hand.root, loss, autograd_loss.detach(), gradients, [], {})
    _pair(by_hand.root, by_autograd.root, by_autograd.received, traced)
    return traced


def _pair(call: Call, forward: Call, received: dict[int, Value], traced: TracedStep) -> None:
    """Finds the forward call of every backward call below `call`, and autograd's number for every gradient in it.

    `call` is a backward or the root. Calls of a backward mirror those of its forward from last to first.
    """
    open_calls = list(forward.calls)
    by_result: dict[int, Value] = {}  # id of a tensor that a backward call returned -> what it is the gradient of
    for inner in call.calls:
        if not inner.backward:
            continue
        partner = next(other for other in reversed(open_calls) if other.base == inner.base)
        open_calls.remove(partner)
        inner.pair = partner
        _pair(inner, partner, received, traced)
        # a backward returns the gradient of its forward's first tensor
        first = next((value for value in partner.parameters.values() if value.node is not None), None)
        if inner.outcome is not None and first is not None:
            inner.outcome.forward = first
            by_result[id(inner.outcome.tensor)] = first
            traced.gradients.append((inner.function, inner.outcome))
    _compare(call, forward, received, by_result, traced)


def _compare(
    call: Call, forward: Call, received: dict[int, Value], by_result: dict[int, Value], traced: TracedStep
) -> None:
    """Gives every gradient that `call` binds the value of `forward` that it belongs to."""
    names = forward.names()
    waiting = {name: forward.bound(name) for name in names}  # values whose gradient is still to come; the last is next
    for name, output in zip(call.upstream, forward.outputs if call.backward else [], strict=True):
        value = call.parameters.get(name)
        if value is None or output is None:
            continue  # dloss = 1.0, and the dtotal of a sum that nothing else reads
        outside = received[id(output)].node
        assert outside is not None, f"{call.function}: {name} is the gradient of something that no gradient reaches"
        assert outside.grad is not None, f"{call.function}: {name} is the gradient of something that the loss ignores"
        value.upstream = outside.grad.reshape(value.copy.shape)
        traced.gradients.append((call.function, value))
        own = waiting.get(name[1:], [])
        if own and own[-1].node is output:  # the output is the last value with this name
            own.pop()
    for name in call.buffers:
        if name[1:] in forward.parameters:  # not a tensor, as a decoder's memory is
            call.parameters[name].forward = forward.parameters[name[1:]]
            traced.gradients.append((call.function, call.parameters[name]))
    last: dict[str, Value] = {}
    for step in call.steps:
        for value in step.values:
            name, base = value.name, value.name[1:]
            own_name = name in names and call is not forward and call.backward  # `dropped`: no gradient of `ropped`
            if not name.startswith("d") or own_name or not value.copy.is_floating_point():
                continue
            if value.added is not None:
                value.forward = forward.parameters.get(base) or by_result.get(id(value.tensor))
            elif any(occurrence.node is not None for occurrence in forward.bound(base)):
                if name in last and step.statement.continues(name):
                    last[name].part = True
                    value.forward = last[name].forward
                elif waiting[base]:
                    value.forward = waiting[base].pop()
                else:
                    traced.alone[f"{call.function}.{name}"] = f"{base} was None there"
                last[name] = value
            else:
                value.forward = by_result.get(id(value.tensor))
                if value.forward is None:
                    traced.alone[f"{call.function}.{name}"] = _why_alone(value, call)
    for step in call.steps:
        traced.gradients += [(call.function, value) for value in step.values if value.forward and not value.part]


def _why_alone(value: Value, call: Call) -> str:
    same = next((p.name for p in call.parameters.values() if p.key[:2] == value.key[:2]), None)
    if same:
        return f"the numbers of {same}, seen in another shape or format"
    return "no name of the forward function: an intermediate of the formula"
