"""The tests of the gradients are tested: every planted bug must be caught (`mutate.py`, `planted_bugs.py`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from planted_bugs import BUGS

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "manual_backprop"
# One of each kind, in a few seconds; the slow test runs all of them.
A_FEW = (
    "weight gradient assigned",
    "the cached probabilities changed",
    "backward's mask starts at row 0",
    "a position sees the next one",
    "the tied head's gradient goes astray",
    "a stale cache",
)


def mutate(*arguments: str, seconds: int) -> str:
    done = subprocess.run(
        [sys.executable, str(TESTS / "mutate.py"), *arguments], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_bug_is_planted_in_one_place_and_has_a_name_of_its_own() -> None:
    assert len(BUGS) >= 40
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    for bug in BUGS:
        source = (PACKAGE / bug.file).read_text(encoding="utf-8")
        assert source.count(bug.old) == 1, bug.name
        assert bug.old != bug.new, bug.name
        compile(source.replace(bug.old, bug.new), bug.name, "exec")  # a SyntaxError names the bug


def test_every_backward_is_mutated() -> None:
    names = mutate("--list", seconds=300)
    backwards = {
        word.partition("(")[0]
        for path in (*PACKAGE.glob("ops/*.py"), *PACKAGE.rglob("kernels/cpu/*.py"), PACKAGE / "models" / "custom.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith("def ") and (word := line.split()[1]).partition("(")[0].endswith("backward")
    }
    # a backward that only hands on what it gets has nothing that can be broken
    assert {name for name in backwards if f", {name}: " not in names} <= {"sinusoidal_positions_backward"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no such", "none"), "no mutant has 'no such' or 'none' in its name; --list says which there are"),
        (("softmax", "--write"), "--write is for all mutants: give no TEXT"),
    ],
)
def test_a_wrong_argument_is_reported(arguments: tuple[str, ...], words: str) -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS / "mutate.py"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert words in done.stderr


def test_who_caught_a_mutant_last_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the tests that most likely catch it; identified by the test's name without a folder and the mutant's name
    without a file."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # mutate sets both, for a process of its own
    monkeypatch.setattr(sys, "path", list(sys.path))
    import mutate

    monkeypatch.setattr(mutate, "CAUGHT_BY", tmp_path / "caught_by.json")
    mutant = mutate.Mutant("ops/softmax.py, softmax_backward: y -> x", "ops/softmax.py", lambda: None, "softmax")
    likely, last = "a/test_gradients.py::test_op[softmax-reference]", "b/test_replay.py::test_other"

    def first() -> str:
        mutate.last_caught_by.cache_clear()
        names = [("test_gradients.py", "test_x"), *(tuple(nodeid.split("::")) for nodeid in (last, likely))]
        items = [SimpleNamespace(nodeid="::".join(one), name=one[1], path=Path(one[0])) for one in names]
        return min(items, key=mutate.likely_first(mutant)).nodeid

    assert first() == likely
    mutate.write_caught_by({"test_replay.py::test_other": {mutant.key}})
    assert first() == last
    mutate.write_caught_by({"test_replay.py::test_other": {"softmax_backward: y -> z"}})  # the next one beside it
    assert first() == last
    mutate.last_caught_by.cache_clear()


def test_a_few_planted_bugs_are_caught() -> None:
    said = mutate(*(f"named: {name}" for name in A_FEW), seconds=600)
    assert f"{len(A_FEW)} caught" in said


@pytest.mark.slow
def test_every_mutant_is_caught() -> None:
    said = mutate(seconds=1500)
    assert " 0 wrong" in said
    assert "is out of date" not in said, said[-300:]  # it would cost minutes, every time


HARMLESS = "BUGS[:] = [Bug('harmless', 'ops/softmax.py', 'dx = y_wide * (dy_wide - weighted_mean)', 'dx = {}')]"
LEFT = """
broken = next(mutant for mutant in mutate.all_mutants() if mutant.name == 'named: probability forgotten')
mutate.plant(broken)
BUGS[:] = [Bug('harmless', broken.file, 'y_wide * (dy_wide - weighted_mean)', 'y_wide')]
"""


@pytest.mark.parametrize(
    ("plants", "said", "caught"),
    [
        pytest.param(  # which all tests are asked about
            *(HARMLESS.format("(dy_wide - weighted_mean) * y_wide"), "survives: named: harmless", 0),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            *(HARMLESS.format("("), "named: harmless: the tests ended with 70, which says nothing about the mutant", 0),
            marks=pytest.mark.slow,
        ),
        pytest.param(LEFT, "the tests fail without any mutant: ", 1, marks=pytest.mark.slow),
    ],
    ids=["changes nothing", "is no code", "is there without it"],
)
def test_a_mutant_that_prints_nothing_is_reported(plants: str, said: str, caught: int) -> None:
    """So that "caught" means something, the command must be able to fail. It runs the tests of one file."""
    script = f"""
import mutate, sys
from planted_bugs import BUGS, Bug
mutate.TESTS = ("test_gradients.py",)
{plants}
sys.argv = ["mutate", "named: harmless"]
sys.exit(mutate.main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=TESTS)
    assert done.returncode == 1, done.stderr
    assert said in done.stdout
    assert f" {caught} caught" in done.stdout
    assert ", 1 wrong" in done.stdout
