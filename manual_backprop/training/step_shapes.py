"""One training step, tensor by tensor: name, shape, size, and whether it is finite. No tensor is kept."""

import math
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from torch import Tensor

from manual_backprop.common.batch import AnyBatch
from manual_backprop.models.network import Network
from manual_backprop.tasks import open_task
from manual_backprop.training.model_summary import Subject


@dataclass(frozen=True)
class Seen:
    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int  # [bytes]
    finite: bool


class Watcher:
    """A recorder that keeps facts about tensors, and no tensor."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def wants(self, name: str) -> bool:
        return True

    def __call__(self, name: str, tensor: Tensor) -> None:
        values = tensor.detach()
        size = values.numel() * values.element_size()
        dtype = str(values.dtype).removeprefix("torch.")
        self.seen.append(Seen(name, tuple(values.shape), dtype, size, bool(values.isfinite().all())))


def one_step(network: Network, batch: AnyBatch, count: int) -> tuple[float, list[Seen]]:
    """The loss of a batch with `count` targets, and the tensors of the step: those that the network records, then the
    gradient of each parameter."""
    watcher = Watcher()
    network.zero_gradients()
    network.recorder = watcher
    loss = network.loss_and_gradients(batch, denominator=count, step=1).item()
    for name, gradient in network.gradients.items():
        scope, _, last = name.rpartition(".")
        watcher(f"{scope}.d{last}", gradient)
    return loss, watcher.seen


def show_step(console: Console, subject: Subject) -> None:
    one_pass = replace(subject.config.training, gradient_accumulation_steps=1)
    task = open_task(replace(subject.config, training=one_pass), subject.cache)
    network = task.build_model().network if subject.network is None else subject.network
    count, batches = task.order().batches(0, network.device)
    batch = next(batches)
    targets = batch.targets
    loss, seen = one_step(network, batch, count)
    table = Table(title="one step", title_justify="left", box=None)
    for column in ("name", "shape", "format", "bytes", "finite"):
        table.add_column(column, justify="right" if column == "bytes" else "left", no_wrap=True)
    for one in seen:
        shape = " x ".join(map(str, one.shape)) or "1"
        table.add_row(one.name, shape, one.dtype, f"{one.size:,}", "yes" if one.finite else "[bold red]NO[/]")
    console.print()
    console.print(table)
    wrong = sum(not one.finite for one in seen)
    console.print(
        f"{len(seen)} tensors, {sum(one.size for one in seen) / 1e6:,.1f} MB; "
        + (f"{wrong} of them are not finite" if wrong else "all of them finite")
    )
    if len(seen) == len(network.gradients):
        console.print(f"{type(network).__name__} records no activations; implementation=custom and =torch do.")
    config = network.config
    if config.predicts_numbers:
        nothing = float(targets.square().nansum() / (~targets.isnan()).sum())
        console.print(f"loss {loss:.4f}; {nothing:.4f} where every answer is 0")
        return
    ignorant, what = math.log(config.n_outputs or config.vocab_size), "label" if config.n_outputs else "token"
    console.print(f"loss {loss:.4f}; ln V = {ignorant:.4f}, where every {what} is equally likely")
