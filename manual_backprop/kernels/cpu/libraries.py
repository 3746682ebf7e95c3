"""The libraries of compiled functions: where they lie, when one still fits, and how another process makes them.

Libraries lie in the user's cache folder, once compiled, and for each function a JSON file that says in which it is and
how to call it. Which ones depends on the function's text, the formats of its arguments, the version of PyTorch and the
processor.
"""

import ctypes
import getpass
import inspect
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...common.digests import file_digest, json_digest
from ...common.errors import ManualBackpropError

PACKAGE = __name__.partition(".")[0]
COMPILER = f"{__package__}.compiler"
LONGEST_WAIT = 120.0  # [s] for another process that compiles
Size = tuple[int, str]  # a factor and letters: (2, "NF") is 2 N F


class CompilerError(ManualBackpropError):
    """A function cannot be compiled here."""


# What is kept


@dataclass(frozen=True)
class Request:
    """A function of a module, for these formats of its arguments."""

    module: str
    name: str
    dtypes: tuple[str, ...]
    key: str  # of everything that the library depends on


@dataclass(frozen=True)
class Library:
    """A compiled function: kernel(pointers to arguments or to memory of its own ..., sizes ...)."""

    kernel: Any
    pointers: list[int]  # which argument, and behind the last one, which piece of memory
    memory: list[tuple[torch.dtype, Size]]  # number of elements
    sizes: list[Size]


def request(function: Callable[..., None], dtypes: tuple[torch.dtype, ...]) -> Request:
    names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
    what = [_sources(function), names, torch.__version__, *_machine(), *_mechanism()]
    return Request(function.__module__, function.__name__, names, json_digest(what))


def find(wanted: Request) -> Library | None:
    """The library as it was compiled before, on this machine; None where there is none, or not as it was written."""
    try:
        kept = json.loads((folder() / description_name(wanted)).read_bytes())
        path = folder() / kept["library"]
        if kept.pop("digest") != json_digest(kept) or file_digest(path) != path.stem:
            return None
        kernel = getattr(ctypes.CDLL(str(path)), kept["symbol"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    kernel.restype = None
    kernel.argtypes = [ctypes.c_void_p] * len(kept["pointers"]) + [ctypes.c_int64] * len(kept["sizes"])
    memory = [(getattr(torch, dtype), size) for dtype, size in kept["memory"]]
    return Library(kernel, kept["pointers"], memory, kept["sizes"])


def folder() -> Path:
    """Of the libraries, which is made where it is missing. Raises OSError."""
    place = folder_path()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def folder_path() -> Path:
    """The user's own, or beside what inductor keeps where a place for that is given."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given == _inductors_own():  # nobody gave that: it says so itself, once it works in a process
        given = None
    return Path(given or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / PACKAGE / "kernels"


def _inductors_own() -> str:
    """Where inductor, whose import takes a second, keeps its things if it is not told."""
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def description_name(wanted: Request) -> str:
    return f"{wanted.name}-{wanted.key[:32]}.json"


def _sources(function: Callable[..., None]) -> dict[str, str]:
    """The text of the function and of what it calls of this package, and the constants that these read."""
    found: dict[str, str] = {}
    waiting = [function]
    while waiting:
        one = waiting.pop()
        found[one.__qualname__] = inspect.getsource(one)
        for name in one.__code__.co_names:
            value = one.__globals__.get(name)
            if inspect.isfunction(value) and value.__module__.startswith(PACKAGE) and value.__qualname__ not in found:
                waiting.append(value)
            elif isinstance(value, int | float):
                found[name] = repr(value)
    return found


@cache
def _mechanism() -> tuple[str, ...]:
    """The text of what makes and calls a library."""
    return tuple(Path(__file__).with_name(name).read_text() for name in ("libraries.py", "compiler.py"))


@cache
def _machine() -> tuple[str, ...]:
    """What the C++ compiler writes instructions for."""
    features = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    return platform.machine(), torch.backends.cpu.get_cpu_capability(), features


# From the process that needs them


def compiler() -> str | None:
    """The C++ compiler that inductor would call."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def _writable_folder() -> Path:
    reason = "it cannot be written"
    try:
        if os.access(place := folder(), os.W_OK):
            return place
    except OSError as error:
        place, reason = folder_path(), error.strerror or str(error)
    raise CompilerError(
        f"{place} is to keep what is compiled, but {reason}: set XDG_CACHE_HOME to a folder that can be written, or "
        "give kernels.compile=never"
    )


def build(wanted: list[Request]) -> None:
    """Compiles all that is missing, in a process of its own. Raises CompilerError, OSError.

    One process: its start takes as long as a dozen functions. Of processes that miss the same, as the jobs of a sweep
    do, one compiles, and the others wait for it.
    """
    if compiler() is None:
        named = os.environ.get("CXX")
        raise CompilerError(
            f"CXX is {named!r}, which is no program here: expected the path of a C++ compiler alone"
            if named
            else "no C++ compiler was found: install g++, or name one in CXX"
        )
    libraries = _writable_folder()
    with _alone(libraries):
        missing = [one for one in wanted if find(one) is None]
        if missing:
            _build(missing, libraries)


@contextmanager
def _alone(libraries: Path) -> Iterator[None]:
    """But not for ever: who waits too long compiles as well, which harms nobody."""
    from filelock import FileLock, Timeout  # torch needs it too

    lock = FileLock(libraries / ".lock")
    with suppress(Timeout):
        lock.acquire(timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        lock.release()


def _build(wanted: list[Request], libraries: Path) -> None:
    paths = (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))
    with tempfile.TemporaryDirectory(prefix=f"{PACKAGE}-") as place, Path(place, "stderr").open("w+b") as errors:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": place,
        }
        task = {"folder": str(libraries), "requests": [asdict(one) for one in wanted]}
        Path(place, "task.json").write_text(json.dumps(task))
        # Looking for garbage, among millions of objects that stay, is a seventh of what Python does there.
        program = f"import gc; gc.disable(); from {COMPILER} import work; work()"
        worker = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for the run, which finishes its step
        )
        try:
            ended = worker.wait()
        finally:
            if worker.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        if ended < 0:
            raise CompilerError(f"the compiler was killed by signal {-ended}, perhaps for want of memory")
        if ended > 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise CompilerError(lines[-1] if lines else f"the compiler ended with {ended}")
