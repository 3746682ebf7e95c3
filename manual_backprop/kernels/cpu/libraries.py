"""The libraries of compiled functions: where they lie, when one still fits, and how another process makes them.

Libraries lie in the user's cache folder, once compiled, and for each function a JSON file that says in which it is and
how to call it. Which ones depends on the function's text, the formats of its arguments, the version of PyTorch and the
processor.
"""

from __future__ import annotations

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
from ...common.durable_files import write_atomically
from ...common.errors import ManualBackpropError, StorageError, first_line
from ...common.machine.home import private_folder

PACKAGE = __name__.partition(".")[0]
COMPILER = f"{__package__}.compiler"
PASSING = ("no space left", "memory", "quota", "temporar")  # words of a failure that may pass by itself
MOST_SAID = 300  # characters of what a compiler says
LONGEST_WAIT = 120.0  # [s] for another process that compiles
Size = tuple[int, str]  # a factor and letters: (2, "NF") is 2 N F


class CompilerError(ManualBackpropError):
    """A function cannot be compiled here."""


class RefusedError(CompilerError):
    """The compiler said no, as it will the next time."""


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
    for place in places():
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return load(wanted, place)
    return None


def load(wanted: Request, place: Path) -> Library:
    """The library from this folder. Raises OSError, ValueError, KeyError, TypeError, AttributeError."""
    kept = json.loads((place / description_name(wanted)).read_bytes())
    path = place / kept["library"]
    if kept.pop("digest") != json_digest(kept) or file_digest(path) != path.stem:
        raise ValueError(f"{path} or its description is not as it was written")
    kernel = getattr(ctypes.CDLL(str(path)), kept["symbol"])
    kernel.restype = None
    kernel.argtypes = [ctypes.c_void_p] * len(kept["pointers"]) + [ctypes.c_int64] * len(kept["sizes"])
    memory = [(getattr(torch, dtype), size) for dtype, size in kept["memory"]]
    return Library(kernel, kept["pointers"], memory, kept["sizes"])


def places() -> list[Path]:
    """Where libraries lie: in the user's cache, or where that cannot be written or run, in the temporary folder."""
    found = [folder_path()]
    with suppress(OSError):
        found.append(private_folder() / "kernels")
    return found


def folder() -> Path:
    """The first of these in which a library can be kept and run, made where it is missing. Raises CompilerError."""
    reasons = []
    for place in places():
        if (reason := _unusable(place)) is None:
            return place
        reasons.append(f"{place}, but {reason}")
    raise CompilerError(
        f"it would be kept in {'; or in '.join(reasons)}: set XDG_CACHE_HOME to a folder that can be written and from "
        "which programs run, or give kernels.compile=never"
    )


def why_elsewhere() -> str | None:
    """Where what is compiled is kept, and why, if not in the user's cache. Raises CompilerError."""
    usual, place = folder_path(), folder()
    return None if place == usual else f"compiled kernels are kept in {place}: {usual} is usual, but {_unusable(usual)}"


def _unusable(place: Path) -> str | None:
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            return "nothing can be written there"
        if os.statvfs(place).f_flag & getattr(os, "ST_NOEXEC", 0):
            return "nothing runs from there (its file system is mounted noexec)"
    except OSError as error:
        return error.strerror or str(error)
    return None


def folder_path() -> Path:
    """The user's own, or beside what inductor keeps where a place for that is given."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given == _inductors_own():  # nobody gave that: it says so itself, once it works in a process
        given = None
    return Path(given or os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / PACKAGE / "kernels"


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
    return tuple(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("libraries.py", "compiler.py"))


@cache
def _machine() -> tuple[str, ...]:
    """What the C++ compiler writes instructions for."""
    features = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    return platform.machine(), torch.backends.cpu.get_cpu_capability(), features


# From the process that needs them


def compiler() -> str | None:
    """The C++ compiler that inductor would call."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def build(wanted: list[Request]) -> None:
    """Compiles all that is missing, in a process of its own. Raises CompilerError, OSError.

    One process: its start takes as long as a dozen functions. Of processes that miss the same, as the jobs of a sweep
    do, one compiles, and the others wait for it. What the compiler refused is not tried again.
    """
    if compiler() is None:
        named = os.environ.get("CXX")
        raise CompilerError(
            f"CXX is {named!r}, which is no program here: expected the path of a C++ compiler alone"
            if named
            else "no C++ compiler was found: install g++, or name one in CXX"
        )
    libraries = folder()
    with _alone(libraries):
        missing = [one for one in wanted if find(one) is None]
        if missing:
            raise_if_refused(missing)  # to another process, meanwhile
            try:
                _build(missing, libraries)
                _try(missing, libraries)
            except RefusedError as error:
                with suppress(StorageError):
                    write_atomically(_refusal(missing), json.dumps({"reason": str(error)}).encode())
                raise


def _try(built: list[Request], libraries: Path) -> None:
    for one in built:
        try:
            load(one, libraries)
        except Exception as error:  # whatever the loader raises
            raise RefusedError(f"the library of {one.name} cannot be loaded: {first_line(error)}") from error


def raise_if_refused(missing: list[Request]) -> None:
    """Raises CompilerError where these functions were refused before, and nothing has changed since."""
    if compiler() is None:
        return
    known = _refusal(missing)
    with suppress(OSError, ValueError, KeyError):
        before = json.loads(known.read_bytes())["reason"]
        raise CompilerError(f"{before} (as before; once that is mended, remove {known})")


def _refusal(missing: list[Request]) -> Path:
    """The file that says why these are refused, named by all that this depends on."""
    program = os.path.realpath(compiler() or "")
    kind = os.stat(program)
    what = [sorted(one.key for one in missing), program, kind.st_mtime_ns, kind.st_size, sys.prefix]
    return folder() / f"failed-{json_digest(what)[:32]}.json"


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
            "LC_ALL": "C",  # in which the compiler says "error:"
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
            reason = lines[-1][:MOST_SAID] if lines else f"the compiler ended with {ended}"
            passes = any(words in reason.lower() for words in PASSING)
            raise (CompilerError if passes else RefusedError)(reason)
