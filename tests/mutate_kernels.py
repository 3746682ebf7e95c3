"""Mutants of the kernels in C++: operators and constants of their lines, changed one at a time; each must be noticed.

    python tests/mutate_kernels.py [FILE ...]      all files of kernels/cpu/cpp, or some: attention.h

A mutant is the file once more in a namespace of its own, so that a few libraries hold all of them; which one is called
is a switch in its name. The tests of the kernels notice it, in a process of its own, since it may write anywhere.
Exit code 1 if one was not, unless it stands in EQUIVALENT with its reason.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

AT_ONCE = 24  # mutants in a library
PATIENCE = 60  # [s] for one: it may never end
FILES = ("activations.h", "attention.h", "gradients.h", "loss.h", "normalization.h", "optimizers.h")
CHANGES = (
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " / "),
    (r" / ", " * "),
    (r" < ", " <= "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" \+= ", " = "),
    (r" && ", " || "),
    (r" == ", " != "),
    (r"\b0\.f", "1.f"),
    (r"\b1\.f", "2.f"),
    (r"\b0\.5f", "0.25f"),
    (r"(?<=[(, ])2(?= \*)", "3"),
    (r"std::min", "std::max"),
    (r"std::max", "std::min"),
    (r"maximum", "minimum"),
    (r"\btrue\b", "false"),
    (r"\.neg\(\)", ""),
    (r"\.abs\(\)", ""),
    (r">> \d+", ">> 5"),
)
# What changes nothing that a result depends on: (file, line without blanks around it, its change)
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "activations.h",
        "const Vec is_positive = x > Vec(0.f);",
        "> -> >=",
    ): "at 0 both gates are a half",
    (
        "loss.h",
        "if (smoothing > 0) all = all + Vec::set(Vec(0.f), x, count);",
        "> -> >=",
    ): "without smoothing nothing reads the sum",
    (
        "loss.h",
        "const float smoothed = smoothing > 0 ? smoothing * (sum_of(all) / V - largest) : 0;",
        "> -> >=",
    ): "without smoothing the sum is 0, as it was not made",
}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int  # from 1
    start: int  # column
    old: str
    new: str

    def key(self, source: str) -> tuple[str, str, str]:
        return self.file, source.splitlines()[self.line - 1].strip(), f"{self.old.strip()} -> {self.new.strip()}"

    def apply(self, source: str) -> str:
        lines = source.splitlines()
        line = lines[self.line - 1]
        lines[self.line - 1] = line[: self.start] + self.new + line[self.start + len(self.old) :]
        return "\n".join(lines)


def mutants_of(file: str, source: str) -> list[Mutant]:
    found = []
    for number, line in enumerate(source.splitlines(), 1):
        code = line.partition("//")[0]
        if line.startswith(("#", "template", "namespace")) or "using" in code or "static_assert" in code:
            continue
        for pattern, new in CHANGES:
            for match in re.finditer(pattern, code):
                if match[0] != new:
                    found.append(Mutant(file, number, match.start(), match[0], new))
    return found


def library_of(mutants: list[Mutant], folder: Path, number: int) -> Path | None:
    """A library of their kernels, `kernel_K`; those that do not compile are left out, and count as noticed."""
    from manual_backprop.kernels.cpu import library

    sources = {path.name: path.read_text() for path in library.SOURCES.iterdir()}
    table = sources["library.cpp"]
    entries, attention = table[table.index("#define IN_ALL_FORMATS") : table.index("const Kernel kernels[]")], ""
    rows = re.findall(r"IN_ALL_FORMATS\((\w+), (\w+),([^)]*)\)", table)
    text = [
        f"#include {name}" for name in ("<cstring>", '"vectors.h"', "<ATen/native/CPUBlas.h>", "<memory>", "<vector>")
    ]
    text.append("struct Kernel { const char* name; void* address; };")
    text.append(entries)
    for mutant in mutants:
        source = mutant.apply(sources[mutant.file])
        body = "\n".join(line for line in source.splitlines() if not line.startswith("#"))
        if mutant.file == "attention.h":
            attention = table[table.index("#define ATTENTION_SIZES") : table.index("struct Kernel")]
        own = [row for row in rows if re.search(rf"\b{row[1]}(_of)?\(", source)]
        kernels = ", ".join(f"IN_ALL_FORMATS({a}, {b},{c})" for a, b, c in own)
        name = f"kernel_{mutants.index(mutant)}"
        text.append(
            f"namespace {name}_space {{\n{body}\nnamespace {{\n{attention if mutant.file == 'attention.h' else ''}"
        )
        text.append(f"const Kernel kernels[] = {{{kernels}}};\n}}\n}}")
        text.append(
            f'extern "C" __attribute__((visibility("default"))) void* {name}(const char* name) {{\n'
            f"for (const Kernel& one : {name}_space::kernels) if (!std::strcmp(one.name, name)) return one.address;\n"
            "return nullptr; }"
        )
    place = folder / f"mutants{number}.cpp"
    place.write_text("\n".join(text))
    target = place.with_suffix(".so")
    command = [word for word in library._command(target) if word != str(library.SOURCES / "library.cpp")]
    command[1:1] = [str(place), f"-I{library.SOURCES}"]
    done = subprocess.run([*command, "-O1"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return target
    if len(mutants) == 1:
        return None
    raise RuntimeError(done.stderr[:3000])


def libraries_of(mutants: list[Mutant], folder: Path, number: int) -> list[tuple[Mutant, Path | None, int]]:
    """Each mutant, where it is and its number there."""
    try:
        place = library_of(mutants, folder, number)
        return [(mutant, place, index) for index, mutant in enumerate(mutants)]
    except RuntimeError:  # one of them does not compile
        half = len(mutants) // 2
        first = libraries_of(mutants[:half], folder, 2 * number + 1000)
        return first + libraries_of(mutants[half:], folder, 2 * number + 1001)


def is_noticed(place: Path | None, number: int | None, file: str) -> bool:
    """By the tests of that file's kernels; `number` None: without any mutant."""
    if place is None and number is not None:
        return True
    child = os.fork()
    if child == 0:
        os.close(2)
        try:
            if number is not None:
                _call_instead(place, number)
            _test(file)
        except BaseException:  # what a test raises
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status != 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _call_instead(place: Path, number: int) -> None:
    from manual_backprop.kernels.cpu import compiled

    mutated = getattr(ctypes.CDLL(str(place)), f"kernel_{number}")
    mutated.restype = ctypes.c_void_p
    (true,) = compiled._loaded

    class Library:
        @staticmethod
        def kernel(name: bytes) -> int | None:
            return mutated(name) or true.kernel(name)

    compiled._function.cache_clear()
    compiled._loaded[:] = [Library]  # type: ignore[list-item]


def _test(file: str) -> None:
    import test_compiled_kernels as tests

    if file == "attention.h":
        for sizes in ((3, 37, 37, 4, 2, 10), (2, 17, 70, 2, 2, 64), (2, 130, 33, 3, 1, 16), (1, 1030, 1030, 1, 1, 8)):
            for dtype in tests.UNIT:
                for mask in tests.MASKS:
                    for dropped in (0.3, 0.0):
                        tests.test_attention(*sizes, mask, dropped, dtype)
        for dtype in tests.UNIT:
            tests.test_what_attention_does_not_see_may_hold_anything(dtype)
        return
    modules = {
        "activations.h": (tests.activations, tests.gated_feed_forward),
        "gradients.h": (tests.products,),
        "optimizers.h": (tests.optimizers,),
        "loss.h": (tests.rowwise,),
        "normalization.h": (tests.rowwise,),
    }
    for name, function in tests.FUNCTIONS.items():
        if any(getattr(module, name, None) is function for module in modules[file]):
            for precision in tests.FORMATS:
                tests.test_a_kernel_is_as_near_to_float64_as_the_function_as_it_is_written(name, precision)
    if file == "activations.h":
        for sign in (-1, 1):
            tests.test_the_slope_of_gelu_is_that_of_the_reference_far_from_zero_too("compiled", sign)
    if file == "optimizers.h":
        for name in ("adamw_step", "sgd_step"):
            tests.test_a_step_that_is_not_finite_changes_nothing(name)
    if file == "loss.h":
        for dtype in tests.UNIT:
            tests.test_cross_entropy_of_rows("compiled", dtype)
            tests.test_a_smoothed_target("compiled", dtype)


def run(files: list[str]) -> list[str]:
    """Sentences about mutants that nobody noticed."""
    import torch

    from manual_backprop.kernels.cpu import compiled, library

    torch.set_num_threads(1)
    compiled._loaded[:] = [library.find() or library.build()]
    sources = {file: (library.SOURCES / file).read_text() for file in files}
    if wrong := [file for file in files if is_noticed(None, None, file)]:
        return [f"{file}: its tests fail without any mutant" for file in wrong]
    mutants = [one for file in files for one in mutants_of(file, sources[file])]
    unnoticed, count = [], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as compilers:
        chunks = [
            chunk[start : start + AT_ONCE]
            for file in files
            for chunk in [[one for one in mutants if one.file == file]]
            for start in range(0, len(chunk), AT_ONCE)
        ]
        waiting = [compilers.submit(libraries_of, chunk, Path(folder), n) for n, chunk in enumerate(chunks)]
        for future in waiting:
            for mutant, place, number in future.result():
                count += 1
                key = mutant.key(sources[mutant.file])
                noticed = is_noticed(place, number, mutant.file)
                if noticed is (key in EQUIVALENT):
                    word = "was noticed, but stands in EQUIVALENT" if noticed else "was not noticed"
                    unnoticed.append(f"{mutant.file}:{mutant.line}: {key[2]} {word}: {key[1]}")
                    print(unnoticed[-1], flush=True)
    print(f"{count} mutants, {count - len(unnoticed) - len(EQUIVALENT)} noticed, {len(EQUIVALENT)} equivalent")
    return unnoticed


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).with_name("kernels"))]
    sys.exit(bool(run(sys.argv[1:] or list(FILES))))
