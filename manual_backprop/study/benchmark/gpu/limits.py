"""(b) The limits of this device, without code of ours: no step can be faster than the sum of these parts."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ....models.flops import flops_per_token
from ...paired_timing import seconds_of
from ..cases import Case
from ..products import ProductsOfAStep
from .comparison import cases
from .processes import Failed, each
from .tables import Part, Setting, Table

TIMES = 10


class Item(NamedTuple):
    kind: str
    name: str = ""


def limits(setting: Setting) -> Part:
    table = Table("Limits", ("what", "milliseconds", "rate", "of"))
    items = [Item("copy"), Item("product")]
    items += [Item("products of a step", name) for name in cases(setting)]
    items += [Item("attention", name) for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION")]
    for item, found in each(measure, items, setting):
        if isinstance(found, Failed):
            expected = found.late or item.kind == "attention"  # which not every GPU has
            (table.remarks if expected else table.failures).append(f"{' '.join(item)}: {found.message}")
        else:
            table.rows += found
    table.remarks.append(f"medians of {TIMES}; attention is counted without the half that causality hides")
    yield table


def measure(item: Item, setting: Setting) -> list[tuple[str, float, float, str]]:
    device = torch.device(setting.device)
    case = cases(setting)["G1"]
    return {
        "copy": lambda: [copy(device, 1 << (20 if setting.small else 28))],
        "product": lambda: [product(device, 128 if setting.small else 8192)],
        "products of a step": lambda: [products(cases(setting)[item.name])],
        "attention": lambda: attention(item.name, case, device),
    }[item.kind]()


def copy(device: torch.device, size: int) -> tuple[str, float, float, str]:
    x = torch.ones(size, device=device)
    y = torch.empty_like(x)
    seconds = median_seconds(lambda: y.copy_(x), device)
    return f"copy of {size:,} numbers in fp32", 1e3 * seconds, 8e-12 * size / seconds, "TB/s, read and written"


def product(device: torch.device, size: int) -> tuple[str, float, float, str]:
    x, y = torch.randn(2, size, size, device=device).bfloat16()
    result = torch.empty_like(x)
    seconds = median_seconds(lambda: torch.mm(x, y, out=result), device)
    return f"product of {size} x {size} in bf16", 1e3 * seconds, 2e-12 * size**3 / seconds, "TFLOP/s"


def products(case: Case) -> tuple[str, float, float, str]:
    steps = ProductsOfAStep(case.config, case.batch_size)
    steps.step()
    seconds = statistics.median(steps.seconds(1) for _ in range(TIMES))
    flops = flops_per_token(case.config, case.config.max_seq_len) * case.tokens
    what = f"all products of a step of {case.name}, B={case.batch_size}"
    return what, 1e3 * seconds, 1e-12 * flops / seconds, "TFLOP/s"


def attention(backend: str, case: Case, device: torch.device) -> list[tuple[str, float, float, str]]:
    """Forward, and forward with backward, of the attention of one block of the case."""
    config = case.config
    shape = case.batch_size, config.n_heads, config.max_seq_len, config.d_head
    dtype = torch.bfloat16
    dcontext, *leaves = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    query, key, value = (x.requires_grad_() for x in leaves)
    flops = 2e-12 * case.batch_size * config.n_heads * config.max_seq_len**2 * config.d_head  # of two products' half
    with sdpa_kernel(getattr(SDPBackend, backend if device.type == "cuda" else "MATH")):

        def forward() -> torch.Tensor:
            return scaled_dot_product_attention(query, key, value, is_causal=True)

        ahead = median_seconds(forward, device)
        both = median_seconds(lambda: torch.autograd.grad(forward(), leaves, dcontext), device)
    name = f"{backend.partition('_')[0].lower()} attention of a block of {case.name}"
    back = max(both - ahead, 1e-9)
    return [
        (f"{name}, forward", 1e3 * ahead, flops / ahead, "TFLOP/s"),
        (f"{name}, backward", 1e3 * back, 2.5 * flops / back, "TFLOP/s"),
    ]


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some runs, after one that does not count."""
    seconds_of(run, device)
    return statistics.median(seconds_of(run, device) for _ in range(TIMES))
