"""Matrix products by the fastest library of full precision, written or added into existing memory.

The compiled library has products of its own (cpp/products.h) for processors where they are faster than PyTorch's.
PyTorch's dispatcher, and so its modes and counters of FLOPs, do not see them. In bf16_mixed they round the weights
while they copy them into the cache, so a network keeps no rounded copy of its matrices there (`rounds_weights`).

Elsewhere PyTorch multiplies. It has two libraries for a float32 product on a CPU, MKL and oneDNN, and calls MKL. On
processors that are not from Intel, oneDNN is twice as fast. PyTorch calls oneDNN if reduced precision is allowed.
oneDNN then reduces the precision only on processors with AMX; whether it does is measured once, with numbers that
bfloat16 would round.

Its bfloat16 product for a float32 gradient (bf16_mixed) is computed for some rows at a time and added while it is in
the cache: PyTorch would first make a float32 copy of it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ...common.machine import cpu_fields
from ...ops.numerics import wide
from ..arena import scratch
from ..replay import call_library
from ..sizes import Sizes, sizes_of
from .compiled import FORMATS, compiled, compiled_functions, kernel

REAL = (Tensor, torch.nn.Parameter)  # not tensors without memory, of a step that is only estimated

_mkldnn: Any = torch.backends.mkldnn

_lock = threading.Lock()
_inside = 0  # number of active contexts in all threads: the setting belongs to the process
_before: str = "none"  # the setting before the first of them


@contextmanager
def fastest_products() -> Iterator[None]:
    """A context in which PyTorch's float32 products on the CPU run in oneDNN, if it computes them in float32."""
    if not onednn_is_exact():
        yield
        return
    with _reduced_precision_allowed():
        yield


@contextmanager
def _reduced_precision_allowed() -> Iterator[None]:
    global _inside, _before
    matmul = _mkldnn.matmul
    with _lock:
        if _inside == 0:
            _before = matmul.fp32_precision
            matmul.fp32_precision = "bf16"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                matmul.fp32_precision = _before


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN computes in float32 even when it may reduce precision: True without AMX, False without oneDNN."""
    if not _mkldnn.is_available() or not hasattr(_mkldnn.matmul, "fp32_precision"):
        return False
    with _reduced_precision_allowed(), _disable_current_modes():  # with real tensors, also when a step is only traced
        generator = torch.Generator().manual_seed(0)
        left, right = torch.randn(2, 256, 256, generator=generator, device="cpu")
        got, want = left @ right, left.double() @ right.double()
        return bool((got - want).norm() <= 1e-5 * want.norm())  # bfloat16 is off by 2e-3


def product(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """out = left right + bias. left (M, K), right (K, N), bias (N) -> out (M, N), in the dtype of left.

    right may have a wider dtype than left, to which it is rounded. `out` may contain anything before, and shares no
    memory with them.
    """
    if _in_library("product", out, left, right, bias):
        return
    if _is_wider(right, left):
        right = right.to(left.dtype)
    if bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias.to(out.dtype), left, right, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, in one pass if the dtypes are equal. left (O, N), right (N, I) -> total (O, I).

    right may have a wider dtype than left, to which it is rounded first.
    """
    if _is_wider(right, left):
        with scratch(tuple(right.shape), left) as rounded:
            add_product(total, left, rounded.copy_(right))
        return
    if _in_library("add_product", total, left, right):
        return
    sizes = sizes_of(total)
    if total.dtype == left.dtype:
        for rows in _in_blocks(len(total), sizes):
            total[rows].addmm_(left[rows], right)
        return
    for rows in _in_pieces(total, sizes):  # total has a wider dtype
        with scratch((rows.stop - rows.start, right.shape[1]), left) as rounded:
            torch.mm(left[rows], right, out=rounded)  # once,
            add_rounded(total[rows], rounded)  # then added in the dtype of total


def _in_library(name: str, out: Tensor, left: Tensor, right: Tensor, *bias: Tensor | None) -> bool:
    """Calls the library's kernel of that name, if it has one for this processor and such tensors. For others PyTorch
    finds the way, or the error. A step that is only estimated needs no call for weights that the library rounds."""
    operands, given = (out, left, right), [x for x in bias if x is not None]
    rounds = _is_wider(right, left)
    if rounds and type(right) is FakeTensor:
        return _rounds(right, left.dtype)
    if any(type(x) not in REAL or not x.is_cpu or x.requires_grad for x in (*operands, *given)):
        return False
    (M, K), N = left.shape, right.shape[1]
    if (out.shape, right.shape) != ((M, N), (K, N)) or not M * N * K or any(x.shape != (N,) for x in given):
        return False
    strides = *left.stride(), *right.stride()
    if out.stride(1) != 1 or out.stride(0) < N or 1 not in strides[:2] or 1 not in strides[2:]:
        return False
    number_by_number = left.dtype == torch.bfloat16 and strides[2] == 1 and (strides[3] % 2 or K % 2)
    if not rounds and (M == 1 or number_by_number):
        return False  # to copy `right` would cost more than it saves
    parameter, other = (right, out) if name == "product" else (out, right)
    if other.dtype != left.dtype or any(x.dtype != parameter.dtype or x.stride(0) != 1 for x in given):
        return False
    dtypes = FORMATS.get((left.dtype, parameter.dtype))
    multiply = kernel(f"{name}_{dtypes}", 3 + len(bias), 8) if dtypes else None
    if multiply is None:
        return False
    seen = torch.autograd._profiler_enabled()
    with torch.profiler.record_function(f"library::{name}") if seen else nullcontext():
        call_library(multiply, [*operands, *bias], [out.stride(0), *strides, M, N, K])
    return True


def for_products(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight for products with tensors of this dtype: as it is, if the library rounds it, or rounded once here."""
    return weight if _rounds(weight, dtype) else weight.to(dtype)


def _rounds(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in the library, which is wanted here, round such a weight to this dtype."""
    is_served = weight.is_cpu and FORMATS.get((dtype, weight.dtype)) == "bf16_mixed"
    return is_served and _multiplies_in_vectors() and kernel("product_bf16_mixed", 4, 8) is not None


def _is_wider(x: Tensor, other: Tensor) -> bool:
    return x.dtype.itemsize > other.dtype.itemsize


@cache
def _multiplies_in_vectors() -> bool:
    """Whether this processor multiplies bfloat16 numbers in vectors, and has no matrix registers."""
    flags = cpu_fields().get("flags", "").split()
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX512" and "avx512_bf16" in flags and "amx_bf16" not in flags


def has_products() -> bool:
    """Whether the compiled library has products of its own for this processor. On one that may have them it is loaded
    or compiled for this."""
    with compiled_functions(True):
        return _multiplies_in_vectors() and kernel("product_fp32", 4, 8) is not None


def rounds_weights(precision: str, device: torch.device) -> bool:
    """Whether the products read weights in the dtype of the parameters, and round them: then no rounded copy of a
    network's matrices is needed."""
    return precision == "bf16_mixed" and device.type == "cpu" and has_products()


@compiled("R C: parameter", "R C")
def add_rounded(total: Tensor, product: Tensor) -> None:
    """total (R, C) += product (R, C), which may have a narrower dtype."""
    total += product


@compiled("C: parameter", "R C")
def add_sum_of_rows(total: Tensor, x: Tensor) -> None:
    """total (C) += the sum of the rows of x (R, C): the gradient of a bias."""
    total += wide(x).sum(0).to(total.dtype)


def _in_blocks(n_rows: int, sizes: Sizes) -> list[slice]:
    """All rows in one slice or two: the rows that fill whole blocks, and the rest."""
    even = n_rows // sizes.even_rows * sizes.even_rows if n_rows > sizes.many_rows else 0
    return [rows for rows in (slice(0, even), slice(even, n_rows)) if rows.start < rows.stop]


def _in_pieces(total: Tensor, sizes: Sizes) -> list[slice]:
    """All rows of total (O, I) in slices that fill whole blocks."""
    n_rows, width = total.shape
    at_once = max(1, sizes.product // width // sizes.even_rows) * sizes.even_rows
    return [slice(start, min(start + at_once, n_rows)) for start in range(0, n_rows, at_once)]


def scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """out = scale left right for many matrices: left (M, R, S), right (M, S, C) -> out (M, R, C).

    `out` may contain anything before, also NaN. The scale is part of the product and costs no extra pass.
    """
    torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


def matrices(x: Tensor) -> Tensor:
    """(b, H, R, C) -> (b H, R, C), a view, for a batched product over all heads."""
    return x.flatten(0, 1)
