"""The C++ kernels (cpp/) as one library, compiled once per machine by the installed compiler.

It is cached in the user's cache folder, or, if nothing can be written or executed there, in a temporary folder of the
user. Its name contains digests of what it depends on (sources, version of PyTorch, processor and compiler) and of its
content: a damaged file counts as missing. If it cannot be compiled or loaded, the reason is written beside it, so that
not every run tries again.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from ...common.digests import file_digest, json_digest
from ...common.durable_files import write_atomically
from ...common.errors import ManualBackpropError
from ...common.startup.home import private_folder

PACKAGE = __name__.partition(".")[0]
SOURCES = Path(__file__).with_name("cpp")
PASSING = ("no space left", "memory", "quota")  # words in the message of a temporary failure
LONGEST_WAIT = 120.0  # [s] for another process that is compiling
CAPABILITIES = (
    "AVX512",
    "AVX2",
)  # vector extensions to select in PyTorch's headers; on other processors the compiler's default


class CompilerError(ManualBackpropError):
    """The library cannot be compiled or loaded here."""


class CompilerKilled(CompilerError):
    """The compiler was killed by a signal, or memory or disk was full: it may succeed another time."""


def find() -> ctypes.CDLL | None:
    """The library as it was compiled earlier on this machine; None if it is missing or damaged.

    Raises CompilerError if it cannot be loaded, or if an earlier compilation failed.
    """
    for place in places():
        for path in sorted(place.glob(f"{_name()}-*.so")):
            with suppress(OSError):
                if file_digest(path) == path.stem.rpartition("-")[2] and _runs(place):
                    return _load(path)
    for place in places():
        with suppress(OSError):
            failure = _failure(place).read_text(encoding="utf-8")
            raise CompilerError(f"{failure} (found out before; delete {_failure(place)} to try again)")
    return None


def build() -> ctypes.CDLL:
    """The library, compiled if it is missing. Raises CompilerError, OSError.

    If several processes need it, like the jobs of a sweep, one compiles and the others wait.
    """
    if compiler() is None:
        named = os.environ.get("CXX")
        raise CompilerError(
            f"CXX is {named!r}, which is not a program on this machine: expected the path of a C++ compiler alone"
            if named
            else "no C++ compiler was found: install g++, or name one in CXX"
        )
    place = folder()
    with _alone(place):
        library = find()
        if library is not None:
            return library
        try:
            return _load(_compile(place))
        except CompilerKilled:
            raise
        except CompilerError as error:
            with suppress(OSError):
                write_atomically(_failure(place), str(error).encode())
            raise


def places() -> list[Path]:
    """The folders where the library may be cached: in the user's cache, else among the temporary folders."""
    found = []
    with suppress(RuntimeError):  # no HOME, and a user without an entry in passwd
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        found.append(cache.absolute() / PACKAGE / "kernels")
    with suppress(OSError):
        found.append(private_folder() / "kernels")
    return found


def folder() -> Path:
    """The first of `places` where a library can be written and executed; created if missing. Raises CompilerError."""
    reasons = []
    for place in places():
        if (reason := _unusable(place)) is None:
            return place
        reasons.append(f"{place}, but {reason}")
    tried = "; or in ".join(reasons) or "a cache folder, but none is set"
    raise CompilerError(
        f"the library would be kept in {tried}: set XDG_CACHE_HOME to a folder that can be written and from which "
        "programs run, or give kernels.compile=never"
    )


def why_elsewhere() -> str | None:
    """A sentence that says where the library is cached and why, if not in the user's cache. Raises CompilerError."""
    place = folder()
    usual = places()[0]
    return None if place == usual else f"compiled kernels are kept in {place}: {usual} is usual, but {_unusable(usual)}"


def _unusable(place: Path) -> str | None:
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            return "nothing can be written there"
        if not _runs(place):
            return "nothing runs from there (its file system is mounted noexec)"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _runs(place: Path) -> bool:
    return not os.statvfs(place).f_flag & getattr(os, "ST_NOEXEC", 0)


def compiler() -> str | None:
    """The C++ compiler, as a path."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.kernel.restype = ctypes.c_void_p
    except (OSError, AttributeError) as error:
        raise CompilerError(
            f"{path} cannot be loaded ({error}): if its folder does not allow to execute, set XDG_CACHE_HOME to one "
            "that does, or give kernels.compile=never"
        ) from error
    return library


@cache
def _name() -> str:
    """The beginning of the library's file name: a digest of everything that it depends on."""
    sources = {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(SOURCES.iterdir())
        if path.suffix in (".h", ".cpp")
    }
    features = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    machine = platform.machine(), torch.backends.cpu.get_cpu_capability(), features
    text = Path(__file__).read_text(encoding="utf-8")
    return "kernels-" + json_digest([sources, text, torch.__version__, str(torch.__file__), machine])[:32]


def _failure(place: Path) -> Path:
    """The file with the reason why the installed compiler failed."""
    found = compiler() or ""
    seen = [found, os.stat(found).st_mtime if found else 0]
    return place / f"{_name()}-{json_digest(seen)[:8]}.failed"


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """A lock on compiling. After LONGEST_WAIT a process stops waiting and compiles too, which does no harm."""
    from filelock import FileLock, Timeout  # torch needs it too

    lock = FileLock(place / ".lock")
    with suppress(Timeout):
        lock.acquire(timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        lock.release()


def _compile(place: Path) -> Path:
    """Compiles into a temporary folder beside the libraries, then renames the result to its final name."""
    with (
        tempfile.TemporaryDirectory(prefix="compiling-", dir=place) as working,
        Path(working, "log").open("w+b") as log,
    ):
        target = Path(working, "kernels.so")
        process = subprocess.Popen(
            _command(target),
            cwd=working,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"LC_ALL": "C"},  # so that messages contain "error"
            start_new_session=True,  # Ctrl-C goes to the run only, which finishes its step
        )
        try:
            ended = process.wait()
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if ended < 0:
            raise CompilerKilled(f"the compiler was killed by signal {-ended}, perhaps for want of memory")
        if ended > 0:
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            faults = [line for line in lines if "error" in line or "/ld: " in line]
            fault = (faults or lines or [f"ended with {ended}"])[0].strip()
            passes = any(words in fault.lower() for words in PASSING)
            raise (CompilerKilled if passes else CompilerError)(f"{compiler()}: {fault}")
        finished = place / f"{_name()}-{file_digest(target)}.so"
        target.replace(finished)
        return finished


def _command(target: Path) -> list[str]:
    found = compiler()
    assert found is not None
    torch_folder, capability = Path(torch.__file__).parent, torch.backends.cpu.get_cpu_capability()
    definitions = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    libraries = torch_folder / "lib"
    return [
        found,
        # no fused multiply-add unless it is written: backward must recompute exactly the numbers of forward
        *("-O3", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-w"),
        "-finline-limit=2000",  # also functions of PyTorch's vectors that are called in a loop
        "-fno-strict-aliasing",  # pairs of bfloat16 numbers are also moved as one float
        "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native",
        *(definitions if capability in CAPABILITIES else ["-DCPU_CAPABILITY=DEFAULT"]),
        *(f"-I{torch_folder.joinpath(*parts)}" for parts in (["include"], ["include/torch/csrc/api/include"])),
        str(SOURCES / "library.cpp"),
        *("-o", str(target), f"-L{libraries}", "-ltorch_cpu", "-lc10"),
        *map(str, sorted(libraries.glob("libgomp*"))),  # share PyTorch's threads instead of starting others
        *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--as-needed", "-fopenmp"]),
    ]
