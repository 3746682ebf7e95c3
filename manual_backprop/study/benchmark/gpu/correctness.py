"""(a) Right, or not: on this device, with its kernels, in every precision, against float64 on the CPU.

A pair's or a network's error is reported beside that of PyTorch's autograd in the same precision on the same device, as
in `study/gradient_check/low_precision.py`: at most twice as large, in the median of a few draws. In fp64 the error
itself is bounded.
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
STEPS = 8  # with a graph and without: some run as they are, one is captured, the others are its replays
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Heads of 16, which fused attention takes, and sequences that are more than one of its tiles, and no whole number.
FOR_FUSED_ATTENTION = {"d_model": 64, "max_seq_len": 160}
GROUPED = "grouped"  # in a network's name: several queries share a key
UPDATES_BAR = 1e-5  # relative error of parameters after some updates in float32, against the textbook's in float64


class Item(NamedTuple):
    kind: str  # pair, network, update or graph
    name: str
    precision: str


def items(small: bool) -> list[Item]:
    """In the order of importance; `small`: of each kind one or two."""
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
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # in the processes below: cuBLAS is deterministic then
    wanted = items(setting.small)
    table = Table("Errors", ("what", "precision", "worst of it", "error", "bar", "right"))
    graphs = 0
    for item, found in each(check, wanted, setting):
        what = f"{item.kind} {item.name}"
        if isinstance(found, Failed):
            if not found.late:
                table.failures.append(f"{what} in {item.precision}: {found.message}")
            continue
        findings, uses_graph = found
        one = worst(findings)
        table.rows.append((what, item.precision, one.quantity, one.error, one.bar, one.ok))
        graphs += uses_graph
        if not one.ok:
            table.failures.append(
                f"{what} in {item.precision}: {one.quantity} is off by {one.error:.3g}, bar {one.bar:g}"
            )
    tried = len(table.rows) + len(table.failures)
    table.remarks = [
        f"{len(table.rows)} of {len(wanted)} measured, {len(table.failures)} wrong"
        + ("" if tried >= len(wanted) else "; for the others there was no time"),
        "errors: of fp64 relative to float64 on the CPU, of other precisions relative to that of autograd here; "
        "of updates relative to the textbook's in float64; of graphs tensors whose bits differ",
        f"{graphs} of the steps compared were graphs",
    ]
    yield table


def check(item: Item, setting: Setting) -> tuple[list[Finding], bool]:
    """What was measured, and whether a graph was made."""
    device = torch.device(setting.device)
    if item.kind == "graph":
        return check_graph(item, device)
    return {"pair": check_pair, "network": check_network, "update": check_update}[item.kind](item, device), False


def config_of(item: Item, device: torch.device) -> CustomTransformerConfig:
    architecture, _, rest = item.name.partition(" ")
    network = rest.removeprefix(f"{GROUPED} ") if item.kind == "network" else "decoder"
    settings: dict[str, Any] = {"n_outputs": 5} if network == "encoder" else {}
    settings |= {"n_kv_heads": 2} if GROUPED in rest else {}
    settings |= FOR_FUSED_ATTENTION if device.type == "cuda" else {}
    dropout = 0.1 if "dropout" in rest else 0.0
    name = architecture.rstrip(",") if item.kind != "update" else "gpt2"
    small = replace(ENOUGH_TO_ROUND, architecture=name, network=network, dropout=dropout, **settings)
    compile_ = "never" if device.type == "cpu" else "auto"  # it would take longer than all else here
    return replace(small, precision=item.precision, device=str(device), kernels="fused", compile=compile_)


def check_pair(item: Item, device: torch.device) -> list[Finding]:
    precision = {"fp16": "fp16_mixed"}.get(item.precision, item.precision)
    pairs = kernels.Table(config_of(item._replace(name="gpt2", precision=precision), device), device)
    with pairs.calculation(None, pairs.compiles("never" if device.type == "cpu" else "auto")):
        sizes = SIZES | {"D": FOR_FUSED_ATTENTION["d_model"]}
        return check_op_precision(ROWS[item.name], FORMATS[item.precision], SEEDS, pairs, device, sizes)


def check_network(item: Item, device: torch.device) -> list[Finding]:
    config = config_of(item, device)
    if item.precision != "fp64":
        # an encoder has a target a row: of few, each has so much of the loss that float16 overflows
        return check_network_precision(config, "proof", SEEDS, B=32 if config.network == "encoder" else 4)
    errors = draw_errors(config, "proof", B=4, T=config.max_seq_len, peer="torch")
    return [Finding(item.name, name, by_hand, AUTOGRAD_BAR) for name, (by_hand, _) in errors.items()]


@torch.no_grad()
def check_update(item: Item, device: torch.device) -> list[Finding]:
    """Some steps of the same gradients, clipped, by the optimizer of this device; one of them is not finite."""
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
    """The same steps with a graph and without: every loss, norm and parameter, bit by bit."""
    config = config_of(item, device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # not `warn_only`: flash attention's backward would add in any order
    try:
        (want, _), (got, graphs) = (steps_of(config, graph) for graph in (False, True))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    different = [name for name in want if not torch.equal(want[name], got[name])]
    what = "bits of loss, norm and parameters" + (f", first of {different[0]}" if different else "")
    findings = [Finding(item.name, what, float(len(different)), EXACT)]
    used = graphs is not None and bool(graphs.captured)
    if graphs is not None and device.type == "cuda":
        why = f": {graphs.refusal}" if graphs.refusal else ""
        findings.append(Finding(item.name, f"steps without a graph{why}", float(not used), EXACT))
    return findings, used


def steps_of(config: CustomTransformerConfig, graph: bool) -> tuple[dict[str, Tensor], Graphs | None]:
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
    for place in range(2):
        yield replace(draw_batch(config, 4, config.max_seq_len, 10 * number + place), first_row=4 * place)
