"""Elementwise functions that `torch.compile` turns into one pass, and that run as they are written where it cannot.

Only what is a chain of elementwise operations is compiled, and for any size at once: a handful of small functions,
which inductor keeps in its cache on disk. Everything else is a product or already one pass of PyTorch's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec

import torch

from ..errors import first_line

log = logging.getLogger(__name__)

_wanted: ContextVar[bool] = ContextVar("compiled", default=False)
P = ParamSpec("P")


@contextmanager
def compiled_functions(wanted: bool) -> Iterator[None]:
    """Inside, functions marked with `elementwise` run compiled, if `wanted` and possible."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def elementwise(function: Callable[P, None]) -> Callable[P, None]:
    """Marks a function that writes into tensors it is given, element by element or row by row, and returns nothing."""

    @functools.cache
    def compile_function() -> Any:
        return torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        if not _wanted.get() or _failed:
            return function(*args, **kwargs)
        try:
            compile_function()(*args, **kwargs)
        except Exception as error:  # whatever the compiler raises; a fault of the function itself raises again below
            _give_up(error)
            function(*args, **kwargs)

    return call


_failed: list[str] = []  # why compilation does not work in this process


def _give_up(error: Exception) -> None:
    _failed.append(first_line(error))
    log.warning("torch.compile does not work here, so the kernels run uncompiled: %s", first_line(error))
