"""Profiles where a step's time and memory go, with torch.profiler: by kind of work, and for our network by pair.

It runs in separate processes, since a profiler costs time. Only its shares are used: they are applied to the measured
time of a step. Profiled steps run eagerly, also where the measured ones are replayed (kernels/replay.py). For a
compiled row the compiler gets an option to name its kernels, which compiles them once more.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from ..paired_timing import MeasuringProcess, wait_for
from .cases import OURS, Case, is_compiled
from .measurement import ADVICE, MeasuredRow, Measurement
from .rows import MAX_GRAD_NORM, WARM_UP, build, prepare, random_batch, switches

STEPS = 3
LARGEST = 8  # allocations shown
PAIR, UPDATE = "pair: ", "update"
PRODUCTS = r"::(addmm_?|mm|matmul|linear|_grouped_mm|product|add_product)\b|mkldnn|gemm"
KINDS = {  # of a pair, an operator or a compiled kernel, by a part of its name; the first match counts
    "optimizer": rf"^{UPDATE}$|adam",
    "loss": r"log_softmax|nll_loss|cross_entropy",
    "attention": r"scaled_dot_product|attention|softmax|::(bmm|baddbmm|masked_fill|tril)",
    "norm": r"norm",
    "activation": r"gelu|relu|silu|swiglu|tanh|sigmoid|::pow|feed_forward|activation",
    "embedding": r"embedding|index_add|index_put|positions|rotary",
    "products": rf"{PRODUCTS}|linear",
}


@dataclass(frozen=True)
class Allocation:
    """An allocation of `size` [bytes] by the operator `asker`, `times` times in a step."""

    size: int
    asker: str
    times: float


@dataclass(frozen=True)
class Profile:
    """Shares of a step's time by kind of work and by pair (only for our network; the rest is `outside`), and the
    largest allocations."""

    kinds: dict[str, float]
    pairs: dict[str, float]
    allocations: list[Allocation]


def breakdown(measured: Measurement) -> dict[str, Any]:
    """Profiles the subject and the fastest peer, prints the result, and returns it for the JSON."""
    content = {}
    for row in (measured.subject, measured.fastest_peer):
        if row is not None:
            with MeasuringProcess(work, row.name, measured.case, advice=ADVICE) as process:
                profile: Profile = process.answer()
            print(f"\n{page(row, profile)}", flush=True)
            content[row.name] = asdict(profile)
    return content


def page(row: MeasuredRow, profile: Profile) -> str:
    lines = [f"{row.name}: where {1e3 * row.median:.4g} ms go"]
    for shares in (profile.kinds, profile.pairs):
        lines += [
            f"  {name:<34}{1e3 * share * row.median:>10.3f} ms{share:>8.1%}"
            for name, share in sorted(shares.items(), key=lambda item: -item[1])
        ]
        lines += [""] if shares else []
    lines.append("  largest allocations of a step")
    lines += [f"  {one.size / 1e6:>10.2f} MB x {one.times:<5.3g} {one.asker}" for one in profile.allocations]
    return "\n".join(lines)


def work(end: Connection, name: str, case: Case) -> None:
    """A process that profiles some steps of a row, sends its Profile and ends."""
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "5"}  # read when torch is imported
    prepare(name, case)
    import torch._inductor.config as inductor
    from torch.profiler import ProfilerActivity, profile, record_function

    if is_compiled(name):
        inductor.cpp.enable_kernel_profile = True
    if name in OURS:
        _name_pairs(record_function)
    trainer = build(name, case)
    batch = random_batch(case, trainer.device)

    def steps(count: int) -> None:
        for _ in range(count):
            trainer.loss_and_gradients(batch)
            with record_function(UPDATE):
                trainer.update(MAX_GRAD_NORM)
        wait_for(trainer.device)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])]
    with switches(name, case):
        steps(1 + WARM_UP)
        with profile(activities=activities, profile_memory=True) as profiled:
            steps(STEPS)
    end.send(_summary(profiled, trainer.device.type))


def _name_pairs(mark: Callable[[str], Any]) -> None:
    """Makes each pair that the network calls record its name in the profiler, from now on in this process."""
    from ... import kernels, ops

    for module in (ops, kernels):
        there = dict(vars(module))
        for name, function in there.items():  # including functions that are both halves of a pair
            if name.endswith(("_forward", "_backward")) or f"{name}_forward" in there:
                setattr(module, name, _marked(function, name, mark))


def _marked(function: Callable[..., Any], name: str, mark: Callable[[str], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mark(PAIR + name):
            return function(*args, **kwargs)

    return call


def _summary(profiled: Any, device: str) -> Profile:
    from torch.autograd import DeviceType

    events = [event for event in profiled.events() if event.device_type == DeviceType.CPU]
    kinds: dict[str, float] = {}
    pairs: dict[str, float] = {}
    for event in events:
        time = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        place = _place(event)
        kind = kind_of(event.name, place)
        kinds[kind] = kinds.get(kind, 0.0) + time
        pair = place.removeprefix(PAIR) if place.startswith(PAIR) else UPDATE if place == UPDATE else "outside"
        pairs[pair] = pairs.get(pair, 0.0) + time
    found = _allocations(profiled, events, device)
    return Profile(_shares(kinds), _shares(pairs) if len(pairs) > 2 else {}, found)


def _shares(times: Mapping[str, float]) -> dict[str, float]:
    whole = sum(times.values())
    return {name: time / whole for name, time in times.items()}


def _place(event: Any) -> str:
    """The outermost pair that contains an event, or the update; else empty."""
    place = ""
    while event is not None:
        if event.name.startswith(PAIR) or event.name == UPDATE:
            place = event.name
        event = event.cpu_parent
    return place


def kind_of(name: str, place: str = "") -> str:
    """The kind of work of an operator or a compiled kernel. `place`: the pair in which it runs.

    A product counts as a product wherever it runs, except the batched products of attention, which count as attention.
    """
    if place != UPDATE and re.search(PRODUCTS, name):
        return "products"
    searched = place.removeprefix(PAIR) or name
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, searched, re.IGNORECASE)), "other")


def _allocations(profiled: Any, events: Iterable[Any], device: str) -> list[Allocation]:
    """The largest allocations, each with the innermost running operator, and its pair."""
    from torch.autograd import DeviceType

    where = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    results = profiled.profiler.kineto_results
    blocks = [
        (event.nbytes(), (event.start_ns() - results.trace_start_ns()) / 1000)  # [us], as the events' time_range
        for event in results.events()
        if event.name() == "[memory]" and event.nbytes() > 0 and event.device_type() == where
    ]
    sizes = sorted({size for size, _ in blocks}, reverse=True)[:LARGEST]
    counted: dict[tuple[int, str], int] = {}
    for size, time in blocks:
        if size in sizes:
            around = [event for event in events if event.time_range.start <= time <= event.time_range.end]
            inner = min(around, key=lambda event: event.time_range.elapsed_us(), default=None)
            asker = "?" if inner is None else _words(inner)
            counted[size, asker] = counted.get((size, asker), 0) + 1
    ordered = sorted(counted.items(), key=lambda item: (-item[0][0], -item[1]))[:LARGEST]
    return [Allocation(size, asker, count / STEPS) for (size, asker), count in ordered]


def _words(event: Any) -> str:
    """An operator with its callers: `aten::empty` alone says little."""
    names: list[str] = []
    while event is not None and len(names) < 3:
        name = re.sub(r"^autograd::engine::evaluate_function: |^## Call (CompiledFxGraph) .*", r"\1", event.name)
        if name not in names:
            names.append(name)
        event = event.cpu_parent
    return " < ".join(names)
