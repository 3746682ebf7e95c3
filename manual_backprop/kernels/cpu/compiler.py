"""From a function of tensors to a shared library, in a process of its own: a training process never imports these
compilers, which would cost it seconds and tens of megabytes.

A function is traced for tensors of any size (`torch.export`), inductor writes its loops in C++, and the C++ compiler
makes one library of all that this process was asked for: nine tenths of its time for a single function are PyTorch's
header. What is kept is the one kernel that inductor finds, without the Python or C++ around it, which would take ten
times as long to compile. A function that needs several kernels is refused, and so is one that needs more memory than
some numbers a row.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...common.digests import json_digest
from ...common.durable_files import write_atomically
from ...common.errors import first_line
from .compiled import SMALLEST, Argument, CompiledFunction
from .libraries import CompilerError, Request, Size, description_name

PRIMES = (127, 131, 137, 139)  # of examples: different ones, so that a product tells its factors
OTHER_PRIMES = (149, 151, 157, 163)

Call = tuple[str, tuple[Any, ...]]  # of a kernel: its text in C++, and what it was called with


@dataclass(frozen=True)
class Kernel:
    """A loop nest in C++ and its parameters: pointers to arguments or to memory of its own, then sizes."""

    source: str
    pointers: list[int]  # which argument, and behind the last one, which piece of memory
    memory: list[tuple[str, Size]]  # format and number of elements
    sizes: list[Size]


def work() -> None:
    """What a compiling process does: task.json of its folder. The last line on stderr says why it failed."""
    from torch._inductor.cpu_vec_isa import VecISA

    try:
        task = json.loads(Path("task.json").read_bytes())
        # inductor would compile a program for each set of vector instructions, to see whether the processor has it
        with mock.patch.object(VecISA, "check_build", return_value=True):
            requests = [Request(**one | {"dtypes": tuple(one["dtypes"])}) for one in task["requests"]]
            functions = [getattr(importlib.import_module(one.module), one.name) for one in requests]
            kernels = [_kernel_of(function, one.dtypes) for function, one in zip(functions, requests, strict=True)]
            _keep(requests, kernels, Path(task["folder"]))
    except Exception as error:  # whatever the compilers raise
        lines = str(error).splitlines()
        # what a C++ compiler says, or its linker, before "collect2: error: ld returned 1 exit status"
        sys.exit(next((line for line in lines if "error:" in line or "/ld: " in line), first_line(error)))


def _keep(requests: list[Request], kernels: list[Kernel], folder: Path) -> None:
    """The library under the digest of its content, then the descriptions: whoever reads one finds that."""
    named = {f"kernel_{number}": kernel for number, kernel in enumerate(kernels)}
    library = _library({symbol: kernel.source for symbol, kernel in named.items()})
    content = library.read_bytes()
    name = hashlib.sha256(content).hexdigest() + library.suffix
    write_atomically(folder / name, content)
    for wanted, (symbol, kernel) in zip(requests, named.items(), strict=True):
        how = {"pointers": kernel.pointers, "memory": kernel.memory, "sizes": kernel.sizes}
        description = {"library": name, "symbol": symbol, **how}
        signed = description | {"digest": json_digest(description)}
        write_atomically(folder / description_name(wanted), json.dumps(signed).encode())


def _library(sources: dict[str, str]) -> Path:
    """Inductor calls every function `kernel`; in the library each has the name that it stands under here.

    What they include comes before the names are replaced, and counts once.
    """
    from torch._inductor.cpp_builder import CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    lines = [line for source in sources.values() for line in source.splitlines()]
    includes = dict.fromkeys(line for line in lines if line.startswith("#include"))
    named = [f"#define kernel {symbol}\n{source}\n#undef kernel" for symbol, source in sources.items()]
    source, library = Path("kernels.cpp"), Path("kernels.so")
    source.write_text("\n".join([*includes, *named]) + "\n", encoding="utf-8")
    words = _call_of_compiler(CppTorchOptions(vec_isa=pick_vec_isa()), source, library)
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise CompilerError(done.stderr or f"{words[0]} ended with {done.returncode}")
    return library


def _call_of_compiler(options: Any, source: Path, library: Path) -> list[str]:
    """As inductor's CppBuilder would call it, word by word: in its line of text a path with a space falls apart."""

    def words(mark: str, texts: Sequence[str]) -> list[str]:
        return shlex.split(" ".join(f"{mark}{text}" for text in texts))

    return [
        *(options.get_compiler(), str(source)),
        *(*words("-D ", options.get_definitions()), *words("-", options.get_cflags())),
        *(f"-I{folder}" for folder in options.get_include_dirs()),
        *(*words("", options.get_passthrough_args()), "-o", str(library), *words("-", options.get_ldflags())),
        *(*words("-l", options.get_libraries()), *(f"-L{folder}" for folder in options.get_libraries_dirs())),
    ]


def _kernel_of(function: CompiledFunction, dtypes: tuple[str, ...]) -> Kernel:
    import sympy
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    class Traced(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[()]:
            function.function(*tensors)
            return ()

    dimensions = {letter: torch.export.Dim(letter, min=SMALLEST) for letter in _letters(function.arguments)}
    shapes = tuple(
        {
            place: dimensions[letter] if factor == 1 else factor * dimensions[letter]
            for place, (factor, letter) in enumerate(argument.dimensions)
        }
        for argument in function.arguments
    )
    found: list[Kernel] = []
    with (
        torch.no_grad(),
        _kernel_calls() as calls,
        # a cast that is written is a rounding
        config.patch({"cpp.dynamic_threads": True, "fx_graph_cache": False, "emulate_precision_casts": True}),
    ):
        tensors, _ = _examples(function.arguments, dtypes, PRIMES)
        module = torch.export.export(Traced(), tensors, dynamic_shapes=(shapes,)).module(check_guards=False)
        inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        conditions = inputs[0].fake_mode.shape_env.guards
        n_conditions = len(conditions)
        run: Any = compile_fx(module, inputs)
        for condition in conditions[n_conditions:]:
            # by an inequality it chooses between ways that are right for all: whether a sum is made of partial sums
            if not isinstance(condition.expr, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
                raise CompilerError(f"{function.__name__} is right only for {condition.expr}")
        for primes in (PRIMES, OTHER_PRIMES):
            tensors, sizes = _examples(function.arguments, dtypes, primes)
            calls.clear()
            with _NothingElse():
                run(*tensors)
            if len(calls) != 1:
                raise CompilerError(f"{function.__name__} became {len(calls)} kernels instead of one")
            found.append(_kernel(*calls[0], tensors, sizes))
    if found[0] != found[1]:
        raise CompilerError(f"{function.__name__} depends on its sizes: {found}")
    return found[0]


class _NothingElse(TorchDispatchMode):
    """Inductor's program calls its kernel, and no operation of PyTorch's beside it."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CompilerError(f"{operation} is left to PyTorch")


@contextmanager
def _kernel_calls() -> Iterator[list[Call]]:
    """What inductor's program calls: it is the one that knows the order of a kernel's pointers and sizes."""
    from torch._inductor.async_compile import AsyncCompile

    calls: list[Call] = []

    def recorded(self: AsyncCompile, types: list[str], source: str) -> Callable[..., None]:
        return lambda *arguments: calls.append((source, arguments))

    with mock.patch.object(AsyncCompile, "cpp_pybinding", recorded):
        yield calls


def _letters(arguments: tuple[Argument, ...]) -> list[str]:
    return list(dict.fromkeys(letter for argument in arguments for _, letter in argument.dimensions))


def _examples(
    arguments: tuple[Argument, ...], dtypes: tuple[str, ...], primes: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    sizes = dict(zip(_letters(arguments), primes, strict=False))
    shapes = [[factor * sizes[letter] for factor, letter in argument.dimensions] for argument in arguments]
    tensors = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return tuple(tensors), sizes


def _kernel(source: str, parameters: tuple[Any, ...], tensors: tuple[Tensor, ...], sizes: dict[str, int]) -> Kernel:
    places = {tensor.data_ptr(): place for place, tensor in enumerate(tensors)}
    pointers = [parameter for parameter in parameters if isinstance(parameter, Tensor)]
    numbers = [parameter for parameter in parameters if not isinstance(parameter, Tensor)]
    memory: list[tuple[str, Size]] = []
    for pointer in pointers:
        if places.setdefault(pointer.data_ptr(), len(places)) == len(tensors) + len(memory):
            memory.append((str(pointer.dtype).removeprefix("torch."), _size(pointer.numel(), sizes)))
    if any(len(size[1]) >= max(tensor.dim() for tensor in tensors) for _, size in memory):
        raise CompilerError(f"it would need memory as large as an argument: {memory}")
    return Kernel(source, [places[one.data_ptr()] for one in pointers], memory, [_size(one, sizes) for one in numbers])


def _size(number: int, sizes: dict[str, int]) -> Size:
    letters = [letter for letter, size in sizes.items() if number % size == 0]
    return number // math.prod(sizes[letter] for letter in letters), "".join(letters)
