"""(a) Correctness on this device, with its kernels, in every precision, against float64 on the CPU.

The error of a pair or a network may be at most twice that of PyTorch's autograd in the same precision on the same
device, in the median of a few draws (`study/gradient_check/low_precision.py`). In fp64 the error itself has a bar.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .... import kernels, ops
from ....common.batch import AnyBatch
from ....config.schema import ARCHITECTURES, PRECISIONS, CustomTransformerConfig
from ....kernels.cuda.graph import Graphs
from ....models.implementations import build_network
from ....models.training_step import TrainingStep
from ...gradient_check import ENOUGH_TO_ROUND, ROWS, Finding, draw_batch, worst
from ...gradient_check.low_precision import SIZES, check_network_precision, check_op_precision, draw_errors
from ...gradient_check.measure import AUTOGRAD_BAR, EXACT, errors_of
from .processes import Failed, each
from .tables import Part, Setting, Table

SEEDS = range(3)
STEPS = 8  # of a training with a graph: the first steps run eagerly, one is captured, the others replay it
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Heads of width 16, which fused attention takes, and sequences of more than one of its tiles, the last one not full.
FOR_FUSED_ATTENTION = {"d_model": 64, "max_seq_len": 160}
GROUPED = "grouped"  # in a network's name: grouped-query attention
UPDATES_BAR = 1e-5  # relative error of parameters after some updates in float32, against the reference in float64


class Item(NamedTuple):
    kind: str  # pair, network, update or graph
    name: str
    precision: str


def items(small: bool) -> list[Item]:
    """Everything to check, the most important first; if `small`, one or two items of each kind."""
    networks = [f"{architecture} decoder" for architecture in ARCHITECTURES]
    others = [f"gpt2 {network}" for network in ("encoder_decoder", "encoder")]
    if small:
        return [
            Item("pair", "residual_layer_norm", "fp32"),
            Item("network", "gpt2 decoder", "bf16_mixed"),
            Item("network", "gpt2 encoder", "fp64"),
            Item("update", "AdamW", "bf16_mixed"),
            Item("graph", "gpt2, dropout", "fp32"),
        ]
    networks.append(f"llama {GROUPED} decoder")
    graphs = [f"{architecture}{dropout}" for architecture in ARCHITECTURES for dropout in ("", ", dropout")]
    found = [Item("network", name, "bf16_mixed") for name in networks]
    found += [Item("graph", name, "bf16_mixed") for name in graphs]
    found += [Item("pair", name, precision) for precision in ("bf16", "fp32") for name in ROWS]
    found += [Item("update", name, p) for name in ("AdamW", "SGD") for p in ("bf16_mixed", "fp32", "bf16")]
    rest = [precision for precision in PRECISIONS if precision != "bf16_mixed"]
    found += [Item("network", name, precision) for precision in rest for name in networks]
    found += [Item("graph", name, "fp32") for name in graphs]
    found += [Item("network", name, precision) for precision in PRECISIONS for name in others]
    return found + [Item("pair", name, precision) for precision in ("fp64", "fp16") for name in ROWS]


def correctness(setting: Setting) -> Part:
    """A table with the worst error of each item, until the time is over."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic in the processes below
    wanted = items(setting.small)
    table = Table("Errors", ("what", "precision", "largest error in", "error", "bar", "passed"))
    graphs = 0
    for item, found in each(check, wanted, setting):
        what = f"{item.kind} {item.name}"
        if isinstance(found, Failed):
            if not found.late:
                table.failures.append(f"{what} in {item.precision}: {found.message}")
            continue
        findings, uses_graph = found
        largest = worst(findings)
        table.rows.append((what, item.precision, largest.quantity, largest.error, largest.bar, largest.ok))
        graphs += uses_graph
        if not largest.ok:
            table.failures.append(
                f"{what} in {item.precision}: error of {largest.quantity} {largest.error:.3g}, bar {largest.bar:g}"
            )
    tried = len(table.rows) + len(table.failures)
    table.remarks = [
        f"{len(table.rows)} of {len(wanted)} measured, {len(table.failures)} wrong"
        + ("" if tried >= len(wanted) else "; the time was over before the others"),
        "errors: in fp64 against float64 on the CPU; in other precisions relative to autograd's error on this device; "
        "of updates against the reference optimizer in float64; of graphs, the number of tensors whose bits differ",
        f"{graphs} items were checked with a captured graph",
    ]
    yield table


def check(item: Item, setting: Setting) -> tuple[list[Finding], bool]:
    """The findings, and whether a graph was captured. Runs in a process of its own."""
    device = torch.device(setting.device)
    if item.kind == "graph":
        return check_graph(item, device)
    return {"pair": check_pair, "network": check_network, "update": check_update}[item.kind](item, device), False


def config_of(item: Item, device: torch.device) -> CustomTransformerConfig:
    """The small network that an item's name and precision describe, with the kernels of the device."""
    architecture, _, rest = item.name.partition(" ")
    network = rest.removeprefix(f"{GROUPED} ") if item.kind == "network" else "decoder"
    settings: dict[str, Any] = {"n_outputs": 5} if network == "encoder" else {}
    settings |= {"n_kv_heads": 2} if GROUPED in rest else {}
    settings |= FOR_FUSED_ATTENTION if device.type == "cuda" else {}
    dropout = 0.1 if "dropout" in rest else 0.0
    name = architecture.rstrip(",") if item.kind != "update" else "gpt2"
    small = replace(ENOUGH_TO_ROUND, architecture=name, network=network, dropout=dropout, **settings)
    compile_ = "never" if device.type == "cpu" else "auto"  # compiling takes longer than all the rest
    return replace(small, precision=item.precision, device=str(device), kernels="fused", compile=compile_)


def check_pair(item: Item, device: torch.device) -> list[Finding]:
    """The errors of a pair's outputs and gradients, with the kernels of the device."""
    precision = {"fp16": "fp16_mixed"}.get(item.precision, item.precision)
    pairs = kernels.Table(config_of(item._replace(name="gpt2", precision=precision), device), device)
    with pairs.calculation(None, pairs.compiles("never" if device.type == "cpu" else "auto")):
        sizes = SIZES | {"D": FOR_FUSED_ATTENTION["d_model"]}
        return check_op_precision(ROWS[item.name], FORMATS[item.precision], SEEDS, pairs, device, sizes)


def check_network(item: Item, device: torch.device) -> list[Finding]:
    """The errors of a network's loss and gradients."""
    config = config_of(item, device)
    if item.precision != "fp64":
        # An encoder has one target a row. With few rows the gradients of each are so large that float16 overflows.
        return check_network_precision(config, "proof", SEEDS, B=32 if config.network == "encoder" else 4)
    errors = draw_errors(config, "proof", B=4, T=config.max_seq_len, peer="torch")
    return [Finding(item.name, name, by_hand, AUTOGRAD_BAR) for name, (by_hand, _) in errors.items()]


@torch.no_grad()
def check_update(item: Item, device: torch.device) -> list[Finding]:
    """The errors of the parameters after four clipped steps of this device's optimizer with random gradients; one of
    the steps has a NaN and must be skipped."""
    config = config_of(item, device)
    own = build_network("custom", config)
    exact = build_network("custom", replace(config, precision="fp64", device="cpu", kernels="reference"))
    exact.load_parameters(own.parameters)
    optimizers = [
        network.adamw(0.1, (0.9, 0.99), 1e-8) if item.name == "AdamW" else network.sgd(0.1, 0.9)
        for network in (own, exact)
    ]
    generator = torch.Generator().manual_seed(0)
    bar = UPDATES_BAR if own.parameters["token_embedding.weight"].dtype == torch.float32 else 2.0**-8
    for step in range(4):
        for name, gradient in exact.gradients.items():
            drawn = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            own.gradients[name].copy_(drawn)
            gradient.copy_(own.gradients[name])
        for network, optimizer in zip((own, exact), optimizers, strict=True):
            if step == 2:
                network.gradients["token_embedding.weight"][0] = torch.nan
            optimizer.step(torch.zeros((), device=network.device), 1e-2, 1.0)
    want = exact.export_parameters()
    errors = errors_of({name: value.double() for name, value in own.export_parameters().items()}, want)
    return [Finding(item.name, name, error, bar) for name, error in errors.items()]


def check_graph(item: Item, device: torch.device) -> tuple[list[Finding], bool]:
    """The same steps with a graph and without: every loss, norm and parameter must be bitwise equal."""
    config = config_of(item, device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with warn_only, flash attention's backward would add in varying order
    try:
        (want, _), (got, graphs) = (steps_of(config, graph) for graph in (False, True))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    different = [name for name in want if not torch.equal(want[name], got[name])]
    what = "bits of loss, norm and parameters" + (f", first of {different[0]}" if different else "")
    findings = [Finding(item.name, what, float(len(different)), EXACT)]
    used = graphs is not None and bool(graphs.recorded)
    if graphs is not None and device.type == "cuda":
        why = f": {graphs.refusal}" if graphs.refusal else ""
        findings.append(Finding(item.name, f"steps without a graph{why}", float(not used), EXACT))
    return findings, used


def steps_of(config: CustomTransformerConfig, graph: bool) -> tuple[dict[str, Tensor], Graphs | None]:
    """Losses, norms and the final parameters of STEPS training steps, and the graphs that they used."""
    network = build_network("custom", config)
    step = TrainingStep(network, network.adamw(0.1, (0.9, 0.99), 1e-8), 1.0, graph=graph)
    found: dict[str, Tensor] = {}
    for number in range(1, STEPS + 1):
        batches = list(batches_of(config, number))
        loss, norm = step(
            batches, sum(int((batch.targets != ops.IGNORED).sum()) for batch in batches), 1e-3 * number, number
        )
        found |= {f"loss {number}": loss.cpu(), f"norm {number}": norm.cpu()}
    return found | network.export_parameters(), step.graphs


def batches_of(config: CustomTransformerConfig, number: int) -> Iterator[AnyBatch]:
    """The two micro-batches of step `number`, of 4 rows each."""
    for part in range(2):
        yield replace(draw_batch(config, 4, config.max_seq_len, 10 * number + part), first_row=4 * part)
