"""The kernels in C++ (cpp/) as one library, compiled once for a machine by the compiler that is there.

It is kept in the user's cache folder, under a name that says for which sources, version of PyTorch, processor and
compiler it was made, and what it holds: one that was damaged counts as none. Where it cannot be made or loaded, the
reason is kept beside it, and is not found out again by every run.
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

PACKAGE = __name__.partition(".")[0]
SOURCES = Path(__file__).with_name("cpp")
LONGEST_WAIT = 120.0  # [s] for another process that compiles
CAPABILITIES = (
    "AVX512",
    "AVX2",
)  # vectors that PyTorch's headers are told of; elsewhere they take those of the compiler


class CompilerError(ManualBackpropError):
    """The library cannot be made or loaded here."""


class CompilerKilled(CompilerError):
    """By a signal: it may end well another time."""


def find() -> ctypes.CDLL | None:
    """The library as it was compiled before, on this machine; None where there is none, or not as it was written.

    Raises CompilerError where it is there and cannot be loaded, or could not be made before.
    """
    for path in sorted(folder_path().glob(f"{_name()}-*.so")):
        with suppress(OSError):
            if file_digest(path) == path.stem.rpartition("-")[2]:
                return _load(path)
    with suppress(OSError):
        failure = _failure().read_text()
        raise CompilerError(f"{failure} (found out before; delete {_failure()} to try again)")
    return None


def build() -> ctypes.CDLL:
    """Compiles it where it is missing. Raises CompilerError, OSError.

    Of processes that miss it, as the jobs of a sweep do, one compiles, and the others wait for it.
    """
    if compiler() is None:
        named = os.environ.get("CXX")
        raise CompilerError(
            f"CXX is {named!r}, which is no program here: expected the path of a C++ compiler alone"
            if named
            else "no C++ compiler was found: install g++, or name one in CXX"
        )
    place = _writable_folder()
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
                write_atomically(_failure(), str(error).encode())
            raise


def folder_path() -> Path:
    """Where the library is kept."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / PACKAGE / "kernels"
    except RuntimeError:  # no HOME, and a user whom nobody knows
        return Path(tempfile.gettempdir()) / f"{PACKAGE}-{os.getuid()}" / "kernels"


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
    """Of all that the library depends on."""
    sources = {path.name: path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")}
    features = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    machine = platform.machine(), torch.backends.cpu.get_cpu_capability(), features
    text = Path(__file__).read_text()
    return "kernels-" + json_digest([sources, text, torch.__version__, str(torch.__file__), machine])[:32]


def _failure() -> Path:
    """Why it could not be made by the compiler that is there."""
    found = compiler() or ""
    seen = [found, os.stat(found).st_mtime if found else 0]
    return folder_path() / f"{_name()}-{json_digest(seen)[:8]}.failed"


def _writable_folder() -> Path:
    place, reason = folder_path(), "it cannot be written"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    except OSError as error:
        reason = error.strerror or str(error)
    raise CompilerError(
        f"{place} is to keep what is compiled, but {reason}: set XDG_CACHE_HOME to a folder that can be written, or "
        "give kernels.compile=never"
    )


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """But not for ever: who waits too long compiles as well, which harms nobody."""
    from filelock import FileLock, Timeout  # torch needs it too

    lock = FileLock(place / ".lock")
    with suppress(Timeout):
        lock.acquire(timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        lock.release()


def _compile(place: Path) -> Path:
    """Into a folder beside the libraries, and from there to its name."""
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
            start_new_session=True,  # Ctrl-C is for the run, which finishes its step
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
            faults = [line for line in lines if "error" in line]
            raise CompilerError(f"{compiler()}: {(faults or lines or [f'ended with {ended}'])[0].strip()}")
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
        # no sum and product become one where they are not written so: the same numbers in forward and in backward
        *("-O3", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-w"),
        "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native",
        *(definitions if capability in CAPABILITIES else ["-DCPU_CAPABILITY=DEFAULT"]),
        *(f"-I{torch_folder.joinpath(*parts)}" for parts in (["include"], ["include/torch/csrc/api/include"])),
        str(SOURCES / "library.cpp"),
        *("-o", str(target), f"-L{libraries}", "-ltorch_cpu", "-lc10"),
        *map(str, sorted(libraries.glob("libgomp*"))),  # PyTorch's own threads, and no others beside them
        *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--as-needed", "-fopenmp"]),
    ]
