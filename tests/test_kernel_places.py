"""Where compiled kernels are kept, what keeps them from being made, and that a failure is remembered."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_tools import environment

from manual_backprop.common.machine import home
from manual_backprop.kernels.cpu import activations, compiled, libraries

FP32 = dict.fromkeys(("activation", "parameter"), torch.float32)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    compiled._failed.clear()
    yield
    compiled._failed.clear()


def test_where_nothing_runs_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a mount with noexec; what lies in the other place is found. Of both that are so, the reason tells."""
    usual, before = tmp_path / "cache" / "manual_backprop" / "kernels", os.statvfs
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert libraries.folder() == usual
    assert libraries.why_elsewhere() is None
    noexec = {usual}
    flags = SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda place: flags if place in noexec else before(place))
    other = home.private_folder() / "kernels"
    assert libraries.folder() == other
    assert libraries.why_elsewhere() == (
        f"compiled kernels are kept in {other}: {usual} is usual, but nothing runs from there (its file system is "
        "mounted noexec)"
    )
    noexec.add(other)
    with pytest.raises(libraries.CompilerError, match=r"noexec.*noexec.*set XDG_CACHE_HOME"):
        libraries.folder()


def test_what_a_compiler_refused_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is another one, or the file that says so is removed. Want of space passes by itself."""
    calls, compiler = tmp_path / "calls", tmp_path / "c++"
    (tmp_path / "refusing.py").write_text(
        f"def work(): open({str(calls)!r}, 'a').write('x'); raise SystemExit(open({str(compiler)!r}).read())"
    )
    monkeypatch.setattr(libraries, "COMPILER", "refusing")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    said = []
    for text, times in (("no mood", 3), ("No space left on device", 2), ("no mood", 1)):
        compiler.write_text(text)
        compiler.chmod(0o700)
        for _ in range(times):
            with pytest.raises(libraries.CompilerError) as caught:
                libraries.build([activations.bias_relu.request(FP32)])
            said.append((str(caught.value).partition(" (as before; ")[0], len(calls.read_text())))
    assert said == [
        *[("no mood", 1)] * 3, ("No space left on device", 2), ("No space left on device", 3), ("no mood", 4)
    ]  # fmt: skip
    with pytest.raises(libraries.CompilerError, match="remove ") as caught:
        compiled._compile([activations.bias_relu.request(FP32)])
    Path(str(caught.value).partition("remove ")[2].rstrip(")")).unlink()
    with pytest.raises(libraries.CompilerError, match=r"^no mood$"):
        compiled._compile([activations.bias_relu.request(FP32)])


def test_a_path_with_a_space_stays_one_word_of_the_compiler_s_call() -> None:
    from manual_backprop.kernels.cpu.compiler import _call_of_compiler

    parts = {
        "compiler": "/my tools/g++", "definitions": [" A", "B=1"], "include_dirs": ["/my env/include"],
        "cflags": ["O3", "ffast-math "], "passthrough_args": ["-fopenmp -Wl,-x", ""], "ldflags": ["shared"],
        "libraries": ["torch"], "libraries_dirs": ["/my env/lib"],
    }  # fmt: skip
    options = SimpleNamespace(**{f"get_{name}": lambda value=value: value for name, value in parts.items()})
    assert _call_of_compiler(options, Path("k.cpp"), Path("k.so")) == [
        *("/my tools/g++", "k.cpp", "-D", "A", "-D", "B=1", "-O3", "-ffast-math", "-I/my env/include", "-fopenmp"),
        *("-Wl,-x", "-o", "k.so", "-shared", "-ltorch", "-L/my env/lib"),
    ]


@pytest.mark.nightly
def test_an_environment_in_a_path_with_spaces_compiles(tmp_path: Path) -> None:
    """So do a cache and a temporary folder."""
    packages = tmp_path / "my env" / "site packages"
    packages.parent.mkdir()
    packages.symlink_to(Path(torch.__file__).parents[1])
    (tmp_path / "t m p").mkdir()
    script = (
        "import torch\n"
        "from manual_backprop.kernels.cpu import activations, compiled\n"
        "with compiled.compiled_functions(()):\n"
        "    activations.bias_relu(torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(5))\n"
        "assert activations.bias_relu.libraries, compiled._failed\n"
        "assert ' ' in torch.__file__\n"
    )
    given = environment(XDG_CACHE_HOME=str(tmp_path / "c a"), TMPDIR=str(tmp_path / "t m p"))
    given["PYTHONPATH"] = os.pathsep.join((str(packages), given["PYTHONPATH"]))
    done = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
