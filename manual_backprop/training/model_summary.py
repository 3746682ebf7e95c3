"""Tables of a model's parameters, arithmetic (FLOPs) and memory, and of one training step, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from manual_backprop.config.schema import CustomTransformerConfig, RunConfig
from manual_backprop.config.validation import validate
from manual_backprop.study.estimates.memory import checkpoint_bytes, estimate_memory, parameter_count
from manual_backprop.trained_models.saved_model import OUTPUTS, load

if TYPE_CHECKING:
    from torch import Tensor

    from manual_backprop.common.batch import AnyBatch
    from manual_backprop.models.network import Network
    from manual_backprop.tasks import Preview

UNKNOWN = "not known before the text is prepared"
LEVELS = {"custom": "by hand", "torch": "the same under autograd", "baseline": "torch.nn"}


@dataclass(frozen=True)
class Subject:
    """The model of a summary: its config, its network's config, what is known of its examples; the network if
    trained."""

    line: str
    config: RunConfig
    network_config: CustomTransformerConfig
    preview: Preview
    cache: Path  # of prepared examples
    network: Network | None = None


def described(overrides: Sequence[str]) -> Subject:
    """The model that a command line describes."""
    from manual_backprop.tasks import preview_task
    from manual_backprop.training.command_line import described_job

    config = described_job(overrides, "summary").config
    cache = OUTPUTS / "datasets"
    preview = preview_task(config, cache)
    network = preview.network_config
    line = (
        f"{config.implementation.name} ({network.architecture}, {network.precision}): {parameter_count(network):,} "
        "parameters, step 0, validation loss not measured (not trained)"
    )
    return Subject(line, config, network, preview, cache)


def trained(which: str) -> Subject:
    from manual_backprop.tasks import preview_task

    saved = load(which)
    config = saved.config()
    cache = saved.found.outputs / "datasets"
    preview = preview_task(config, cache)
    return Subject(saved.line, config, saved.model.config, preview, cache, saved.model.network)


# Parameters


def block_of(name: str) -> str:
    """The block of a parameter: blocks.3, or encoder.blocks.3; empty outside of blocks."""
    before, blocks, rest = name.partition("blocks.")
    return f"{before}{blocks}{rest.partition('.')[0]}" if blocks else ""


def show_parameters(console: Console, config: CustomTransformerConfig) -> None:
    """Prints a table of the parameters. The first block is shown tensor by tensor, all blocks as sums."""
    from manual_backprop.models.network import parameter_shapes

    sizes = {name: (shape, math.prod(shape)) for name, shape in parameter_shapes(config).items()}
    total = sum(count for _, count in sizes.values())
    table = Table(title="parameters", title_justify="left", box=None)
    for column in ("name", "shape", "count", "share"):
        table.add_column(column, justify="left" if column in ("name", "shape") else "right", no_wrap=True)
    for place, names in groupby(sizes, block_of):
        inside = list(names)
        block = sum(sizes[name][1] for name in inside)
        if not place or place.endswith("blocks.0"):
            for name in inside:
                shape, count = sizes[name]
                table.add_row(name, " x ".join(map(str, shape)), f"{count:,}", f"{count / total:.1%}")
        if place:
            table.add_row(place, "a block", f"{block:,}", f"{block / total:.1%}", style="bold")
    table.add_row("in all", "", f"{total:,}", "100.0%", style="bold")
    console.print(table)
    if config.tied_head:
        console.print("token_embedding.weight is also the vocabulary projection; it is counted once.")


# Arithmetic and memory


def show_cost(console: Console, subject: Subject, tflops: float | None) -> None:
    import torch

    from manual_backprop.models.flops import flops_per_token, matrix_product_rate
    from manual_backprop.training.plan import duration

    config, network = subject.config, subject.network_config
    if config.device.threads is not None:
        torch.set_num_threads(config.device.threads)
    length = subject.preview
    steps, epoch = length.max_steps, length.steps_per_epoch
    token = flops_per_token(network, network.max_seq_len)
    step = token * length.tokens_per_step
    about = "" if subject.preview.prepared else "about "
    dtype = network.get_compute_dtype()
    rate = matrix_product_rate(dtype, network.get_device()) if tflops is None else tflops * 1e12
    measured = "measured with matrix products alone; a real step is slower"
    least, source = ("at least ", measured) if tflops is None else ("", "as given")
    rows = {
        "a token": f"{token:,} FLOPs, forward and backward",
        "a step": f"{step:.3g} FLOPs: {length.step}",
        "an epoch": f"{about}{epoch:,.1f} steps: about {round(epoch * length.tokens_per_step):,} tokens"
        if epoch
        else UNKNOWN,
    }
    if steps is None:
        rows["a run"] = UNKNOWN
    else:
        rows["a run"] = f"{steps:,} steps, {step * steps:.3g} FLOPs" + (
            f", {about}{steps / epoch:,.2f} epochs" if epoch else ""
        )
        seconds = duration(steps * step / rate)
        rows["run time"] = f"{least}{seconds} at {rate / 1e12:.3g} TFLOP/s ({source})"
    console.print("\n arithmetic", style="italic")
    for name, text in rows.items():
        console.print(f" {name:<10}{text}", soft_wrap=True)


def show_memory(console: Console, subject: Subject) -> None:
    """Prints the memory at the peak of a step, for each implementation."""
    config, network = subject.config, subject.network_config
    width = {"fp64": 8, "bf16": 2}.get(network.precision, 4)
    weights = parameter_count(network) * width
    moments = checkpoint_bytes(config, network) - weights
    table = Table(title=f"memory at training.batch_size={config.training.batch_size}", title_justify="left", box=None)
    for column in ("level", "weights", "gradients", "moments", "activations and work", "in all"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for name in LEVELS:
        mapping = config.to_dict() | {"implementation": _implementation(name)}
        estimate = estimate_memory(validate(mapping), network)
        parts = (weights, weights, moments, estimate.working)
        table.add_row(f"{name}: {LEVELS[name]}", *(f"{size / 1e6:,.1f} MB" for size in (*parts, sum(parts))))
    console.print()
    console.print(table)
    console.print("Estimated from the tensors that exist at the same time, without the memory of Python and PyTorch.")


def _implementation(name: str) -> dict[str, str]:
    return {"name": name} | ({"compile": "never"} if name == "baseline" else {})


# One training step, tensor by tensor


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
    from manual_backprop.tasks import open_task

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
