"""Mutation test of the backward passes: `pytest -m gradients` must fail for every mutant.

    python tests/mutate.py            all mutants; exit 1 if one that is not listed as equivalent survives
    python tests/mutate.py TEXT ...   those with one of these texts in their names
    python tests/mutate.py --list     their names
    python tests/mutate.py --write    all; updates caught_by.json, which says which test runs first

Mechanical mutants come from the syntax tree of every function named `*_backward` in ops/, kernels/ and
models/custom*.py and step.py, and of the kernels' other functions that compute gradients. They change signs, operators,
missing terms, transpositions, axes, constants, comparisons, `+=` and calls. Named mutants are those of
`planted_bugs.py`. One process collects the tests. It forks for each mutant, replaces the code of the existing functions
(so that every module that imported them gets it) and runs the tests: first the one that caught this mutant the last
time, then those of the mutated op. At the end all tests that caught something run without a mutant and must pass.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import inspect
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "manual_backprop"
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other packages' plugins would be imported for every mutant

from planted_bugs import BUGS  # noqa: E402

# A mutant that takes longer hangs, and counts as caught: in seconds of processor time, which a busy machine does not
# change, and in seconds of wall-clock time.
LIMITS = {signal.ITIMER_PROF: 100, signal.ITIMER_REAL: 900}

TESTS = (
    "test_gradients.py",
    "test_networks.py",
    "test_kernels.py",
    "test_compiled_kernels.py",
    "test_replay.py",
    "test_loss_scale.py",
)  # those with this marker
KINDS = (  # of tests, as they are to be asked: each of the last three is the only one that sees some mutants
    *("test_op[", "test_op_in_pieces", "test_op_as_if", "test_network["),
    *("test_a_product_is_added", "test_backward_belongs", "test_an_ignored_row"),
)
# Tests, and the mutants that they caught at the last --write. An outdated entry only costs time: if that test passes,
# all others run, first those that caught other mutants of the same function.
CAUGHT_BY = Path(__file__).with_name("caught_by.json")
STALE = 0.1  # if a larger share of the mutants is caught by another test, an update is requested
ONLY_COMPILED = ("kernels/cpu/rowwise.py",)  # never runs as it is written, but in a test of its own

CALCULUS = ("custom.py", "custom_encoders.py", "step.py")  # of models/
# Equivalent mutants, and why. One that is caught, or no longer exists, is an error: `tests_of_equivalent` run.
EQUIVALENT: dict[str, str] = {
    "models/custom.py, _embedding_backward: self.config.position_kind == 'sinusoidal' -> "
    "self.config.position_kind != 'sinusoidal'": "the backward of fixed positions hands on what it gets",
    "kernels/cpu/normalization.py, residual_layer_norm_backward: mean.dim() > 1 -> mean.dim() >= 1": "PyTorch's kernel "
    "takes these statistics as well",
    "kernels/cpu/embedding.py, add_rows_of_tokens: len(dweight) < len(token) -> len(dweight) <= len(token)": "as much "
    "memory either way, and the same sums",
    "kernels/cpu/activations.py, gate_and_rest: x > 0 -> x >= 0": "both halves are 1/2 at 0",
}

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.Pow: ast.Mult,
}
COMPARISONS: dict[type, type] = {
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
WITH_AXIS = {"sum", "mean", "unsqueeze", "flatten", "unflatten", "index_add_", "scatter_add_", "any", "amax"}
WITH_AXES = {"transpose", "permute"}
IN_PLACE = {"add_": "sub_", "sub_": "add_", "mul_": "div_", "div_": "mul_"}
ENDINGS = ("_backward", "_gradient", "_gradient_")  # of the names of functions that make gradients
OTHERS = {
    *("backward", "linear_cross_entropy", "add_product", "scaled_product", "_add_product", "_fill", "_groups"),
    *("cross_entropy_of_rows", "gate_and_rest", "normalize", "add_rows_of_tokens"),
    *("mask", "mask_", "empty_", "keys_up_to"),
}
CURVES = {"erf_", "exp_", "neg_", "sigmoid", "sigmoid_", "square"}


@dataclass(frozen=True)
class Mutant:
    name: str  # file, function: old -> new (and which of several)
    file: str
    code: Callable[[], CodeType]  # of the whole module
    first: str  # the test that most likely notices

    @property
    def key(self) -> str:
        """The key in CAUGHT_BY: the name without the file, which may move."""
        return self.name.removeprefix(f"{self.file}, ")

    @property
    def function(self) -> str:
        """The function of a mechanical mutant; empty for a named one."""
        return self.key.partition(": ")[0]


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node.name.endswith(ENDINGS) or node.name in OTHERS):
            yield node


def nodes_of(function: ast.FunctionDef) -> list[ast.AST]:
    """The nodes of a function's body, without its signature."""
    return [node for statement in function.body for node in ast.walk(statement)]


def other_axis(axis: int) -> int:
    return axis - 1 if axis != 0 else 1


def as_axis(node: ast.expr) -> int | None:
    """The integer that the expression is, or None."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def scaled_constant(node: ast.expr) -> ast.Constant | None:
    """The number a quarter larger (1 instead of 0), or None if the node is no number."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return ast.Constant(node.value * 1.25 or 1)
    return None


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """All mutations of one node: expressions and statements, each broken in one way."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
            yield node.left  # a term or a factor is missing
        if isinstance(node.op, ast.Add | ast.Mult):
            yield node.right
        if (scaled := scaled_constant(node.left)) is not None:
            yield ast.BinOp(scaled, node.op, node.right)
        if (scaled := scaled_constant(node.right)) is not None:
            yield ast.BinOp(node.left, node.op, scaled)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and as_axis(node) is None:
        yield node.operand
    elif isinstance(node, ast.Compare):
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield node.value
    elif isinstance(node, ast.Subscript):
        if (
            isinstance(node.value, ast.Attribute)
            and node.value.attr == "shape"
            and (axis := as_axis(node.slice)) is not None
        ):
            yield ast.Subscript(node.value, ast.Constant(other_axis(axis)), node.ctx)
        if isinstance(node.slice, ast.Tuple) and len(set(map(ast.dump, node.slice.elts))) > 1:
            # x[:, None]: an axis is put in
            yield ast.Subscript(node.value, ast.Tuple(node.slice.elts[::-1], ast.Load()), node.ctx)
    elif isinstance(node, ast.Call):
        yield from broken_calls(node)
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()  # never added
        yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
        if isinstance(node.op, ast.Add):
            everything = ast.Subscript(as_read(node.target), ast.Constant(...), ast.Store())
            yield ast.Assign([everything], node.value)  # assigned, into the buffer
            yield ast.Assign([node.target], node.value)  # assigned, to the name
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def as_read(target: ast.expr) -> ast.expr:
    read = copy.deepcopy(target)
    read.ctx = ast.Load()  # type: ignore[attr-defined]
    return read


def broken_calls(call: ast.Call) -> Iterator[ast.AST]:
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method == "transpose":
        assert isinstance(call.func, ast.Attribute)
        yield call.func.value
    if method in IN_PLACE or (method in CURVES and not call.args):
        assert isinstance(call.func, ast.Attribute)
        yield call.func.value  # left out
    if method in IN_PLACE:
        assert isinstance(call.func, ast.Attribute)
        yield ast.Call(ast.Attribute(call.func.value, IN_PLACE[method], ast.Load()), call.args, call.keywords)
        if (scaled := scaled_constant(call.args[0])) is not None:
            yield ast.Call(call.func, [scaled], call.keywords)
    places = (
        range(len(call.args)) if method in WITH_AXES else range(min(1, len(call.args))) if method in WITH_AXIS else ()
    )
    for place in places:
        axis = as_axis(call.args[place])
        if axis is not None:
            arguments = list(call.args)
            arguments[place] = ast.Constant(other_axis(axis))
            yield ast.Call(call.func, arguments, call.keywords)
    for place, keyword in enumerate(call.keywords):
        if keyword.arg != "strict" and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, int):
            value = keyword.value.value
            changed = not value if isinstance(value, bool) else other_axis(value)
            keywords = list(call.keywords)
            keywords[place] = ast.keyword(keyword.arg, ast.Constant(changed))
            yield ast.Call(call.func, call.args, keywords)


def mechanical_mutants(path: Path) -> Iterator[Mutant]:
    file = path.relative_to(PACKAGE).as_posix()
    source = path.read_text(encoding="utf-8")
    counted: Counter[str] = Counter()
    for number, function in enumerate(functions_of(ast.parse(source))):
        for place, node in enumerate(nodes_of(function)):
            for choice, new in enumerate(replacements(node)):
                ast.fix_missing_locations(ast.copy_location(new, node))
                change = f"{' '.join(ast.unparse(node).split())} -> {' '.join(ast.unparse(new).split())}"
                name = f"{file}, {function.name}: {change}"
                counted[name] += 1
                if counted[name] > 1:
                    name += f" ({counted[name]})"

                def code(number: int = number, place: int = place, choice: int = choice) -> CodeType:
                    return mutated(source, path, number, place, choice)

                yield Mutant(name, file, code, function.name.removesuffix("_backward"))


def mutated(source: str, path: Path, number: int, place: int, choice: int) -> CodeType:
    tree = ast.parse(source)
    function = list(functions_of(tree))[number]
    node = nodes_of(function)[place]
    new = list(replacements(node))[choice]
    for parent in ast.walk(function):
        for field, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, field, new)
            elif isinstance(value, list) and any(item is node for item in value):
                setattr(parent, field, [new if item is node else item for item in value])
    ast.fix_missing_locations(ast.copy_location(new, node))
    return compile(ast.fix_missing_locations(tree), str(path), "exec")


def named_mutants() -> Iterator[Mutant]:
    for bug in BUGS:
        source = (PACKAGE / bug.file).read_text(encoding="utf-8")
        if source.count(bug.old) != 1:
            raise SystemExit(
                f"The planted bug '{bug.name}' has lost its place: "
                f"its old text is {source.count(bug.old)} times in {bug.file}."
            )

        def code(source: str = source, file: str = bug.file, old: str = bug.old, new: str = bug.new) -> CodeType:
            return compile(source.replace(old, new), str(PACKAGE / file), "exec")

        yield Mutant(f"named: {bug.name}", bug.file, code, Path(bug.file).stem)


def all_mutants() -> list[Mutant]:
    paths = [*sorted((PACKAGE / "ops").glob("*.py")), *(PACKAGE / "models" / name for name in CALCULUS)]
    # but for those of a GPU, which no test of these runs
    paths += sorted(path for path in (PACKAGE / "kernels").rglob("*.py") if "cuda" not in path.parts)
    return [*(mutant for path in paths for mutant in mechanical_mutants(path)), *named_mutants()]


def plant(mutant: Mutant) -> None:
    """Replaces the code of the module's functions by the mutant's, in place. At least one function must change."""
    module = importlib.import_module("manual_backprop." + mutant.file.removesuffix(".py").replace("/", "."))
    codes = dict(codes_in(mutant.code()))
    changed = 0
    for owner in (
        module,
        *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__),
    ):
        for member in vars(owner).values():
            function = inspect.unwrap(member.__func__ if isinstance(member, staticmethod) else member)
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                new = codes.get(function.__qualname__)
                if new is not None and fingerprint(new) != fingerprint(function.__code__):
                    function.__code__ = new
                    changed += 1
    if not changed:
        raise RuntimeError("the mutant changes no function")


def codes_in(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant.co_qualname, constant
            yield from codes_in(constant)


def fingerprint(code: CodeType) -> tuple:
    """The code of a function without its line numbers."""
    constants = tuple(fingerprint(c) if isinstance(c, CodeType) else (type(c), repr(c)) for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, constants


def likely_first(mutant: Mutant) -> Callable[[Any], tuple[bool, int, int]]:
    """The sort key of tests: those that most likely catch the mutant come first."""
    fused, caught_by = mutant.file.startswith("kernels/"), last_caught_by().get(mutant.key, Counter())
    beside = last_caught_by().get(mutant.function, Counter())

    def rank(item: Any) -> int:
        if mutant.first.startswith("_") or mutant.first in ("backward", "custom"):
            return 0 if item.name.startswith("test_network[") else 1
        if item.path.name == "test_compiled_kernels.py":
            return 0 if mutant.file in ONLY_COMPILED else len(KINDS) + 1
        if fused != ("fused" in item.name or item.path.name == "test_kernels.py"):
            return len(KINDS) + 2
        if item.name.startswith(f"test_op[{mutant.first}-"):
            return 0
        return next((place for place, kind in enumerate(KINDS, 1) if item.name.startswith(kind)), len(KINDS) + 1)

    def order(item: Any) -> tuple[bool, int, int]:
        test = short_name(item.nodeid)
        return test not in caught_by, -beside[test], rank(item)

    return order


def tests_of_equivalent(mutant: Mutant, items: list[Any]) -> list[Any]:
    """The tests that caught another mutant of the same function. If there are none: those that reach it."""
    beside = last_caught_by().get(mutant.function, ())
    found = [item for item in items if short_name(item.nodeid) in beside]
    return found or [item for item in items if is_reached(mutant, item)]


def is_reached(mutant: Mutant, item: Any) -> bool:
    """Whether a test is one of KINDS and runs the mutated code: a test of a pair runs no network, for example."""
    if mutant.file.startswith("models/"):
        return item.name.startswith(tuple(kind for kind in KINDS if not kind.startswith("test_op")))
    fused = "fused" in item.name or item.path.name == "test_kernels.py"
    return item.name.startswith(KINDS) and fused == mutant.file.startswith("kernels/")


@cache
def last_caught_by() -> dict[str, Counter[str]]:
    """How many mutants each test caught, by the key of a mutant and by its function."""
    tests = json.loads(CAUGHT_BY.read_text(encoding="utf-8")) if CAUGHT_BY.exists() else {}
    found: dict[str, Counter[str]] = {}
    for test, keys in tests.items():
        for key in keys:
            for known_as in (key, key.partition(": ")[0]):
                found.setdefault(known_as, Counter())[test] += 1
    return found


def write_caught_by(caught_by: dict[str, set[str]]) -> None:
    tests = {test: sorted(keys) for test, keys in sorted(caught_by.items())}
    CAUGHT_BY.write_text(json.dumps(tests, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def short_name(nodeid: str) -> str:
    """The id of a test without its folder, which may move."""
    file, _, rest = nodeid.partition("::")
    return f"{Path(file).name}::{rest}"


class Judge:
    """A pytest plugin that runs the loop of tests once for each mutant, each time in a fork."""

    def __init__(self, mutants: list[Mutant], workers: int):
        self.mutants, self.workers = mutants, workers
        self.wrong: list[str] = []  # sentences
        self.caught_by: dict[str, set[str]] = {}  # by the test: the keys of what it caught
        self.judged = self.caught = self.slow = 0  # slow: caught, but not by a test that had caught it before

    def pytest_runtestloop(self, session: Any) -> bool:
        gc.collect()
        gc.freeze()  # the forks need not look for garbage in what is here
        noticing = set()
        for mutant, verdict in run_all(self.mutants, self.workers, session):
            self._judge(mutant, verdict)
            noticing.add(verdict.how)
            if mutant is not None and verdict.caught and "::" in verdict.how:  # and not because it hangs
                test = short_name(verdict.how)
                self.caught_by.setdefault(test, set()).add(mutant.key)
                self.slow += test not in last_caught_by().get(mutant.key, ())
            if self.judged % 50 == 0:
                show(f"{self.judged} of {len(self.mutants)}")
        # what was noticed must be the mutants' doing
        session.items[:] = [item for item in session.items if item.nodeid in noticing]
        for mutant, verdict in run_all([None], 1, session):
            self._judge(mutant, verdict)
        return True

    def _judge(self, mutant: Mutant | None, verdict: Verdict) -> None:
        if wrong := self._wrong(mutant, verdict):
            self.wrong.append(wrong)
            show(wrong)
        self.judged += 1
        self.caught += mutant is not None and mutant.name not in EQUIVALENT and bool(verdict.caught)

    @staticmethod
    def _wrong(mutant: Mutant | None, verdict: Verdict) -> str | None:
        name = "without any mutant" if mutant is None else mutant.name
        if verdict.caught is None:
            return f"{name}: {verdict.how}"
        if mutant is None:
            return f"the tests fail {name}: {verdict.how}" if verdict.caught else None
        equivalent = mutant.name in EQUIVALENT
        if equivalent and verdict.caught:
            return f"listed as equivalent, but caught by {verdict.how}: {mutant.name}"
        return None if equivalent or verdict.caught else f"survives: {mutant.name}"


def show(line: str) -> None:
    print(line, flush=True)


def run_tests(session: Any, mutant: Mutant | None, output: int) -> int:
    """Runs the tests in a forked process. Returns 1 if a test fails; its name is then the last word of the output."""
    from _pytest.main import pytest_runtestloop

    os.dup2(output, 1)
    os.dup2(output, 2)
    if mutant is not None:
        plant(mutant)
        session.items.sort(key=likely_first(mutant))
        if mutant.name in EQUIVALENT:
            session.items[:] = tests_of_equivalent(mutant, session.items)
    failures = FirstFailure()
    session.config.pluginmanager.register(failures)
    with contextlib.suppress(session.Failed):  # the first failure ends the loop
        pytest_runtestloop(session)
    if session.testsfailed:
        print(f"\n{failures.test}")
    return int(session.testsfailed > 0)


class FirstFailure:
    """A pytest plugin that remembers which test failed."""

    test = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid


@dataclass
class Verdict:
    caught: bool | None  # None: there is none
    how: str
    seconds: float


def run_all(mutants: Sequence[Mutant | None], workers: int, session: Any) -> Iterator[tuple[Mutant | None, Verdict]]:
    """Runs each mutant in a fork, `workers` at a time; yields in the order in which they end."""
    waiting = list(reversed(mutants))
    running: dict[int, tuple[Mutant | None, float, tempfile._TemporaryFileWrapper]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            mutant, output = waiting.pop(), tempfile.NamedTemporaryFile()  # noqa: SIM115
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                for timer, seconds in LIMITS.items():
                    signal.setitimer(timer, seconds)
                code = 70
                try:
                    code = run_tests(session, mutant, output.fileno())
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)
                finally:
                    os._exit(code)
            running[child] = mutant, time.monotonic(), output
        child, status = os.waitpid(-1, 0)
        mutant, start, output = running.pop(child)
        output.seek(0)
        said = output.read().decode(errors="replace")
        output.close()
        yield mutant, verdict_of(status, said, time.monotonic() - start)


def verdict_of(status: int, said: str, seconds: float) -> Verdict:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hangs = number in (signal.SIGALRM, signal.SIGPROF)
        return Verdict(True, "hangs" if hangs else f"ends with signal {number}", seconds)
    code = os.WEXITSTATUS(status)
    if code == 0:
        return Verdict(False, "survives", seconds)
    if code == 1:
        return Verdict(True, said.splitlines()[-1], seconds)
    return Verdict(None, f"the tests ended with {code}, which says nothing about the mutant:\n{said[-3000:]}", seconds)


def judge(mutants: list[Mutant], workers: int) -> Judge:
    """Runs the tests for the mutants."""
    import pytest
    import torch

    import manual_backprop.models.custom_encoders  # noqa: F401

    # What autograd and assert_close import when they are first used: half a second in every fork.
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.fx.experimental.symbolic_shapes")
    torch.testing.assert_close(torch.ones(1), torch.ones(1))
    torch.set_num_threads(1)  # a fork may not inherit running threads
    last_caught_by()  # read once, and not by every fork
    plugin = Judge(mutants, workers)
    tests = [str(file) for name in TESTS for file in (REPOSITORY / "tests").rglob(name)]
    options = ["-m", "gradients", "-o", "addopts=--strict-markers", "-x", "-qq", "-s", "--no-header", "--tb=line"]
    ended = pytest.main([*options, "-p", "no:cacheprovider", f"--rootdir={REPOSITORY}", *tests], plugins=[plugin])
    if ended or plugin.judged <= len(mutants):  # the tests without any mutant count, too
        plugin.wrong.append(f"pytest ended with {int(ended)}, {plugin.judged} of {len(mutants) + 1} were judged")
    return plugin


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation test of the backward passes.")
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="only the mutants with one of these texts in their names"
    )
    parser.add_argument("--list", action="store_true", help="say which mutants there are, and stop")
    parser.add_argument("--write", action="store_true", help=f"judge all, and write {CAUGHT_BY.name}")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    chosen = parser.parse_args()

    if chosen.write and chosen.texts:
        parser.error("--write is for all mutants: give no TEXT")

    everything = all_mutants()
    mutants = [m for m in everything if not chosen.texts or any(text in m.name for text in chosen.texts)]
    if not mutants:
        parser.error(f"no mutant has {' or '.join(map(repr, chosen.texts))} in its name; --list says which there are")
    if chosen.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return 0
    start = time.monotonic()
    os.chdir(REPOSITORY)
    wrong = [
        f"listed as equivalent, but there is no such mutant: {name}"
        for name in EQUIVALENT.keys() - {m.name for m in everything}
    ]
    judged = judge(mutants, max(chosen.workers, 1))
    wrong += judged.wrong
    if chosen.write and not wrong:
        write_caught_by(judged.caught_by)
    listed = sum(mutant.name in EQUIVALENT for mutant in mutants)
    named = sum(mutant.name.startswith("named: ") for mutant in mutants)
    print(*wrong, sep="\n")
    print(
        f"{len(mutants)} mutants ({named} of them named), {judged.caught} caught, "
        f"{listed} listed as equivalent, {len(wrong)} wrong; {time.monotonic() - start:.0f} s"
    )
    if not chosen.texts and judged.slow > len(mutants) * STALE:
        print(f"{CAUGHT_BY.name} is out of date: {judged.slow} were caught by another test than it says; give --write")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
