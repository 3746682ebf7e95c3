"""README.md, CONTRIBUTING.md and docs/ tell the truth: every command and every Python block is run, every link leads
somewhere, and a number has its command beside it.

A training is run with fewer steps, on fewer documents, and otherwise as it stands; each command is a process, forked
where torch and MLflow are imported already, and what it leaves and says is compared with what the documents promise
(documented_commands.py). What is not run here is run by `.ci/run`, and that is checked. The listings in
docs/one-step*.md are no commands: `explain` writes them, and test_explain.py compares them. The blocks of docs/course
go on from one another, and say what they print (course_blocks.py).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from command_tools import ROOT, environment, free_port, serving
from course_blocks import CHAPTERS, alike, expected, program
from documented_commands import AFTER, CHECKS, PREPARED, Outcome, checks_of, files_in, words_of
from warm_python import WarmPython

from manual_backprop import bench
from manual_backprop.__main__ import GROUPS, example_of
from manual_backprop.study.benchmark.choices import cases_of
from manual_backprop.tracking.run_directory import list_runs, read_run
from manual_backprop.training import command_line

PAGES = (
    *("README.md", "CONTRIBUTING.md"),
    *sorted(
        str(path.relative_to(ROOT))
        for pattern in ("*.md", "guide/**/*.md", "course/*.md")
        for path in (ROOT / "docs").glob(pattern)
    ),
)
SET_UP = "python3 -m venv"  # the two commands that .ci/run and a new user type
TOOLS = ("levels", "kernel_gains", "cost tracking", "cost inspection", "cost loading", "cost reduction")
BENCH = "python -m manual_backprop.bench --"
GROWTH = f"{BENCH}model small --grow"
PAGE_OF_RUNS = "python -m manual_backprop.visualize"
TROUBLES = "docs/guide/hyperparameters.md"  # each is brought about and mended by test_hyperparameters.py
ARCHITECTURE = "python docs/architecture.py"  # test_rooms.py draws the picture again
MOST_LINES = 150  # of README.md
MEASURES = (
    GROWTH,
    *(f"python -m manual_backprop.tools.{name}" for name in TOOLS),
)  # each has a test, and is smaller there
SHOWS = ("--help", "--version", "plan=true")  # what ends at once
# What a reader puts in, and what is put in here. RUN_DIRECTORY and the like are the newest run.
PLACEHOLDERS = {"FILE": "README.md", "TEXT": "README.md", "experiments=NAME": "experiments=overfit_one_batch"}
PLACEHOLDERS |= {"model=NAME": "model=tiny", "FOLDER": "docs", "PAIRS": "pairs.tsv", "TEXTS": "texts.csv"}
RUNS = ("RUN_DIRECTORY", "RUN_ID", "RUN")
SHORT = {
    "training.eval_batches": "1",
    "training.sample_length": "2",
    "device.threads": "1",
}
WHOLE = {"training=smoke": "20", "experiments=overfit_one_batch": "40"}  # what shows something only in so many steps
FIRST = [
    "-m",
    "manual_backprop.run",
    "model=tiny",
    "training.save_every=2",
    "training.log_every=1",
]  # the run that a reader has behind them
FEW_PAIRS = 300  # of dates, so that some days are for each split
FEW_DOCUMENTS = 20  # of the built-in corpus: a run evaluates the whole validation split at its end


def blocks(language: str, pages: tuple[str, ...] = PAGES) -> list[str]:
    apart = ("docs/one-step", "docs/course") if language == "python" else ("docs/one-step",)
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages if not page.startswith(apart))
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def written() -> list[str]:
    """Every command: the lines of bash blocks, and what stands in backticks."""
    lines = [line.split("  #")[0].split(" # ")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`((?:python -m |python tests/|manual-backprop |mlflow )[^`\n]+)`", text)
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


@cache
def of_troubles() -> frozenset[str]:
    return frozenset(line for block in blocks("bash", (TROUBLES,)) for line in block.splitlines())


def kind(command: str) -> str:
    """Who runs it."""
    if command in of_troubles():
        return "trouble"
    if command.startswith(SET_UP):
        return "set-up"
    if command.startswith(("python -m pytest", "ruff ", "python tests/mutate.py", ARCHITECTURE, *MEASURES)):
        return "checked in .ci/run"
    if command.startswith("mlflow ui"):
        return "server"
    if command == PAGE_OF_RUNS:
        return "page of runs"
    if command.startswith(("mlflow models serve", "curl ")):
        return "served model"
    if command.startswith(("source ", "eval ")):
        return "shell"
    if command.startswith("torchrun "):  # training/test_process_faults.py starts one
        return "torchrun"
    if not command.startswith(("python -m manual_backprop", "manual-backprop ")):
        return "nobody"
    words = shlex.split(command)
    if set(words) & set(SHOWS) or words == ["python", "-m", "manual_backprop"]:
        return "shown"
    return "bench" if command.startswith(BENCH) else "job"


def of_kind(name: str) -> list[str]:
    return [command for command in written() if kind(command) == name]


def named(command: str) -> str:
    """In a test's id: all of a command, also where pytest would write a number for what is long."""
    return command.removeprefix("python -m ")


def arguments_of(command: str, place: Path) -> list[str]:
    """The command as a list to be run in `place`, with a reader's own words put in."""
    for word, value in PLACEHOLDERS.items():
        command = re.sub(rf"\b{re.escape(word)}\b", value, command)
    for word in RUNS:
        if re.search(rf"\b{word}\b", command):
            command = re.sub(rf"\b{word}\b", str(list_runs(place / "outputs")[-1]), command)
    return words_of(command)


def shortened(words: list[str]) -> list[str]:
    """A training of a few steps; all else as it is."""
    module, given = words[1], words[2:]
    if module == "manual_backprop.tools.cost":
        return [*words, *{"preparing": ("--megabytes", "2"), "parallel": ("--rounds", "1", "--jobs", "2")}[given[0]]]
    if module == "manual_backprop.tools.tokenization" and given[0] == "analyze":
        return [*words, "--subset", str(FEW_DOCUMENTS)]
    if module == "manual_backprop.verify" and given:
        return [*words, *(["model=tiny"] if not any(word.startswith("model=") for word in given) else [])]
    if module != "manual_backprop.run":
        return words
    if any(word.startswith("sweep.resume=") for word in given):
        return words
    if any(word.startswith("resume=") for word in given):
        kept = [word for word in words if not word.startswith("training.max_steps=")]
        return [*kept, f"training.max_steps={4 if len(kept) < len(words) else 6}"]  # of a run that made 2
    named = {word.partition("=")[0] for word in given}
    short = SHORT | {"training.max_steps": next((WHOLE[word] for word in given if word in WHOLE), "2")}
    short |= {"training.inspect_every": "1"} if "training.inspect_every" in named else {}
    changed = [word for word in words if word.partition("=")[0] not in short]
    changed += [f"{key}={value}" for key, value in short.items()]
    changed += ["hydra.sweeper.n_trials=2"] if "hydra/sweeper=search" in given else []
    of_rows = {"experiments=reversal", "experiments=co2", "experiments=docstrings", "task=classification"}
    makes_rows = "task" in named or of_rows & {*given}
    if {"experiments=dates", "experiments=postfix"} & {*given}:
        return [*changed, f"dataset.subset_size={FEW_PAIRS}"]
    if "dataset" not in named and not makes_rows and "experiments=shakespeare_char" not in given:
        changed.append(f"dataset.subset_size={FEW_DOCUMENTS}")
    return changed + (["model=tiny"] if not named & {"model", "experiments"} else [])


class Reader:
    """Who gives the commands, each in the same folder as it was after those that it needs: in any order, and alone.

    The folder always has the same path, since what runs leave names it: it is put back from copies of it.
    """

    def __init__(self, warm: WarmPython, root: Path):
        self.warm, self.place, self.states = warm, root / "place", root / "states"
        self.place.mkdir()
        shutil.copy2(ROOT / "README.md", self.place)
        (self.place / "docs").mkdir()
        shutil.copy2(ROOT / "docs" / "one-step.md", self.place / "docs")
        pairs = "".join(f"{number} and {number + 1}\t{number + 1} {number}\n" for number in range(60))
        (self.place / "pairs.tsv").write_text(pairs)
        texts = "".join(f"number {number},{('even', 'odd')[number % 2]}\n" for number in range(60))
        (self.place / "texts.csv").write_text(f"text,label\n{texts}")
        done = warm.run(shortened(FIRST), self.place, 300)
        assert done.returncode == 0, done.stderr
        self.kept: dict[str, Path] = {}  # the folder after a command; None of them: "", after the first run
        self._keep("")

    def stand_after(self, command: str) -> None:
        """The folder is as it was after this command; that is given where that has not been done yet."""
        if command not in self.kept:
            self.carry_out(command)
        shutil.rmtree(self.place)
        shutil.copytree(self.kept[command], self.place, symlinks=True)

    def carry_out(self, command: str) -> None:
        """Gives the command, and asks what is promised of it."""
        if command in self.kept:
            return
        self.stand_after(AFTER.get(command, ""))
        if command in PREPARED:
            PREPARED[command](self.place)
        words, before = shortened(arguments_of(command, self.place)), files_in(self.place)
        outcome = Outcome(words, self.warm.run(words, self.place, 600), self.place, before)
        assert outcome.done.returncode == 0, outcome.done.stdout[-2000:] + outcome.done.stderr[-2000:]
        for check in checks_of(command):
            check(outcome)
        if command in AFTER.values():
            self._keep(command)

    def _keep(self, command: str) -> None:
        self.kept[command] = Path(shutil.copytree(self.place, self.states / str(len(self.kept)), symlinks=True))


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmPython]:
    with WarmPython(environment()) as python:
        yield python


@pytest.fixture(scope="module")
def reader(warm: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(warm, tmp_path_factory.mktemp("reader"))


@pytest.fixture
def place(reader: Reader) -> Path:
    """Where a reader stands: a checkout's README, and one run behind them."""
    reader.stand_after("")
    return reader.place


def mlflow_id(place: Path) -> str:
    """Of the first run in `place`."""
    return read_run(list_runs(place / "outputs")[0])["mlflow"]["run_id"]


def test_every_command_is_run_by_somebody() -> None:
    assert of_kind("nobody") == []
    assert of_kind("job")
    assert of_kind("shown")


def test_every_command_has_a_check_of_its_own_and_every_check_a_command() -> None:
    commands = [*of_kind("job"), *of_kind("shown")]
    assert [command for command in commands if not list(checks_of(command))] == []
    for pattern in CHECKS:
        assert any(re.match(pattern, command) for command in commands), f"no document has such a command: {pattern}"
    assert {*AFTER, *AFTER.values(), *PREPARED} <= set(commands)


def test_the_example_of_a_command_is_one_of_the_documents() -> None:
    """Where it is run, and what it does is compared with what is promised."""
    listed = [example_of(name, arguments) for group in GROUPS.values() for name, (_, arguments) in group.items()]
    assert [example for example in listed if example not in written()] == []


# A part of each Python block: what it prints.
BLOCKS: dict[str, tuple[str, ...]] = {
    "analyze_dataset(": (
        r"python_docs: recommended\n +vocab_size +\d+ .*\n +max_seq_len +\d+ ",
        r"\n\[(?:\s*\d+){20}\] \[[\s\d.]+\] \[memmap\(\[[\s\S]+\)\]\n$",
    ),
    "bytes(model.generate(": (
        r"^\{'loss': 0\.\d+, 'grad_norm': [\d.e-]+, 'status': 'success'\}\n",
        r"\nb'to be or not to be, that is the '\n",  # what it was trained on
        r"\ntorch\.Size\(\[64, 64\]\) \{'model_type': 'custom_transformer', .*'parameters': 118592\}\n$",
    ),
    "EncoderDecoderWrapper(": (
        r"^\{'loss': 0\.0\d+, 'grad_norm': [\d.e-]+, 'status': 'success'\} tensor\(0\.0\d+\)\n",
        r"\n\[\[3, 2, 1, 12, 10\], \[5, 4, 12, 10, 10\], \[6, 2, 0, 7, 12\]\]\n\d+\n$",
    ),
    "Recorder(": tuple(
        rf"(?:^|\n)blocks\.1\.attention\.{name} \(4, 4, 16, 16\)\n" for name in ("probabilities", "dprobabilities")
    ),
    "find_crossover_points(": (r"^above 5\.0e11 FLOPs small leads tiny\nLoss over compute\n$",),
    "CheckpointManager(": (r"^\[10, 20\] step-000020\nTrue\n$",),
    "mlflow.pyfunc.load_model(": (r"^\[['\"].+['\"]\]\n$",),
}


def check_block(block: str, said: str) -> None:
    (patterns,) = [patterns for part, patterns in BLOCKS.items() if part in block]
    for pattern in patterns:
        assert re.search(pattern, said), said


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=[pytest.mark.slow] if "analyze_dataset(" in block else [])
        for block in blocks("python")
        if "RUN_ID" not in block
    ],
)
def test_python_blocks_run(block: str, tmp_path: Path, warm: WarmPython) -> None:
    done = warm.run(["-c", block], tmp_path, 120)
    assert done.returncode == 0, done.stderr
    check_block(block, done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in blocks("python") if "RUN_ID" in block])
def test_python_blocks_about_a_run(block: str, place: Path, warm: WarmPython) -> None:
    done = warm.run(["-c", block.replace("RUN_ID", mlflow_id(place))], place, 120)
    assert done.returncode == 0, done.stderr
    check_block(block, done.stdout)


EXAMPLES = """
import doctest, sys
from manual_backprop.study.api_page import SET_UP, examples

scope = {}
exec(SET_UP.replace(">>> ", ""), scope)
runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
for one in examples():
    test = doctest.DocTestParser().get_doctest(one.docstring, scope, one.name, one.module, one.node.lineno)
    assert test.examples, one.name
    runner.run(test)
print(runner.tries, file=sys.stderr)
sys.exit(runner.failures > 0)
"""


def test_the_examples_of_the_api_run(tmp_path: Path, warm: WarmPython) -> None:
    """Those of docs/api.md, which are doctests of what the package and `ops` export."""
    done = warm.run(["-c", EXAMPLES], tmp_path, 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stderr.splitlines()[-1]) > 150


def test_the_blocks_of_the_course_print_what_stands_in_them(tmp_path: Path, warm: WarmPython) -> None:
    """All chapters in one process, from first to last, with the solutions of their exercises."""
    done = warm.run(["-c", program()], tmp_path, 120)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert len(printed) == len(CHAPTERS) >= 4
    for chapter, lines in expected().items():
        assert len(lines) >= 10
        assert len(printed[chapter]) == len(lines), f"{chapter}: run tests/course_blocks.py"
        differing = [pair for pair in zip(lines, printed[chapter], strict=True) if not alike(*pair)]
        assert not differing, f"{chapter}: run tests/course_blocks.py"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "said", "same"),
    [
        ("a 0.50", "a 0.51", True),  # the last digit
        ("a 0.50", "a 0.52", False),
        ("a 0.50", "b 0.50", False),
        ("wrong by 2e-10", "wrong by 3e-10", True),
        ("wrong by 2e-10", "wrong by 2e-09", False),
        ("684 parameters", "685 parameters", False),
        ("[-0.01, 0.01]", "[0.01, 0.01]", False),
        ("True", "False", False),
    ],
)
def test_what_a_block_prints_is_compared_with_what_stands_in_it(line: str, said: str, same: bool) -> None:
    assert alike(line, said) == same


def test_each_chapter_of_the_course_has_exercises_with_solutions_and_a_place_in_the_index() -> None:
    index = (CHAPTERS[0].parent / "index.md").read_text(encoding="utf-8")
    for number, chapter in enumerate(CHAPTERS, 1):
        text = chapter.read_text(encoding="utf-8")
        assert text.startswith(f"# {number}. ")
        assert f"\n{number}. [{text.splitlines()[0].partition('. ')[2]}]({chapter.name})" in index
        asked = re.findall(r"^\*\*(\d)\. ", text.partition("## Exercises")[2], flags=re.MULTILINE)
        assert asked == [str(n) for n in range(1, len(asked) + 1)]
        assert len(asked) >= 4
        assert len(asked) == text.count("<details><summary>Solution</summary>\n\n") == text.count("\n\n</details>\n")


# Once where a reader's own words make two commands the same.
SHOWN = {" ".join(arguments_of(command, ROOT)): command for command in of_kind("shown")}


@pytest.mark.parametrize("command", SHOWN.values(), ids=named)
def test_what_ends_at_once_is_run_as_it_is(command: str, tmp_path: Path, warm: WarmPython) -> None:
    words = arguments_of(command, tmp_path)
    outcome = Outcome(words, warm.run(words, tmp_path, 120), tmp_path, {})
    assert outcome.done.returncode == 0, outcome.done.stderr
    for check in checks_of(command):
        check(outcome)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", of_kind("job"), ids=named)
def test_jobs_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's whole command line passes its check, not shortened: fast, and before the slow test below."""
    from manual_backprop.training.command_line import check

    monkeypatch.chdir(ROOT)
    words = arguments_of(command.replace("RUN", "last"), ROOT)
    # from what earlier commands left: the slow test has that
    goes_on = (
        "resume=",
        "sweep.resume=",
        "init_from=",
        "dataset=pretokenized",
        "dataset.path=pairs.tsv",
        "dataset.path=texts.csv",
    )
    if words[1] == "manual_backprop.run" and not any(word.startswith(goes_on) for word in words):
        assert check([word for word in words[2:] if word != "-m"], multirun="-m" in words[2:]).jobs


@pytest.mark.slow
@pytest.mark.parametrize("command", of_kind("job"), ids=named)
def test_jobs_do_what_is_promised(command: str, reader: Reader) -> None:
    reader.carry_out(command)


@pytest.mark.parametrize("command", of_kind("bench"), ids=named)
def test_benches_are_accepted(command: str) -> None:
    """Each case that it names is one that is there, in the precision that it names."""
    options = bench.parser().parse(shlex.split(command)[3:])
    if options.markdown:  # of what another command there measures; test_bench.py reads what it prints
        assert all(any(f"--json {file}" in other for other in of_kind("bench")) for file in options.markdown)
        return
    if options.gpu:  # test_gpu_bench.py tries it on a CPU
        assert options.output is not None
        return
    cases = cases_of(options)
    assert {case.name for case in cases} == set(re.findall(r"\bC\d\b", command))
    if asked := re.findall(r"--precision (\w+)", command):
        assert {case.config.precision for case in cases} == set(asked)


@pytest.mark.nightly
def test_a_case_is_measured(warm: WarmPython, tmp_path: Path) -> None:
    """The smallest, one turn, beside one peer that is not compiled: anything else takes minutes."""
    assert f"{BENCH}case C1" in of_kind("bench")
    few = ("--rows", "torch-eager", "--rounds", "1", "--batch-size", "1", "--threads", "1")
    done = warm.run(["-m", "manual_backprop.bench", "--case", "C1", *few], tmp_path, 600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("torch-eager") >= 2, "a table of each format"


@pytest.mark.slow
@pytest.mark.parametrize("command", of_kind("server"))
def test_the_page_to_compare_runs_is_served(command: str, place: Path) -> None:
    port = free_port()
    module, *arguments = shlex.split(command)
    address = f"http://127.0.0.1:{port}/"
    with serving(*arguments, "--port", str(port), module=module, cwd=place, address=address) as page:
        assert "MLflow" in page


@pytest.mark.slow
def test_the_page_of_runs_is_served(place: Path) -> None:
    assert of_kind("page of runs")
    port = free_port()
    module, address = PAGE_OF_RUNS.split()[2], f"http://127.0.0.1:{port}/"
    with serving("--port", str(port), module=module, cwd=place, address=address) as page:
        assert "<title>Runs</title>" in page
        with urlopen(f"{address}api/runs", timeout=60) as answer:
            rows = json.load(answer)["runs"]
    assert [row["id"] for row in rows] == [path.name for path in list_runs(place / "outputs")]


@pytest.mark.slow
def test_the_model_is_served(place: Path) -> None:
    """What `mlflow models serve` and the `curl` behind it say, at a port that is free."""
    serve, ask = of_kind("served model")
    port = str(free_port())
    module, *words = [
        port if word == "5001" else word.replace("RUN_ID", mlflow_id(place)) for word in shlex.split(serve)
    ]
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}"}
    variables["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # activated
    with serving(*words, module=module, cwd=place, address=f"http://127.0.0.1:{port}/ping", **variables):
        _, address, header, content_type, data, body = shlex.split(ask)
        assert (header, data) == ("-H", "-d")
        name, _, value = content_type.partition(": ")
        request = Request(address.replace("5001", port), body.encode(), {name: value})
        with urlopen(request, timeout=60) as answer:
            (text,) = json.load(answer)["predictions"]
    assert isinstance(text, str)


def test_the_rest_is_run_by_ci() -> None:
    """The set-up as it stands; formatting, lint, types and both halves of the tests."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines[0].startswith(SET_UP)
    assert lines[0].endswith("-m manual_backprop.run model=small")
    assert kind(lines[0].partition(" && ")[2].rpartition("bin/")[2]) == "job", "and its last part is run above"
    assert lines[1].startswith(SET_UP)
    assert lines[1].endswith("-m pytest")
    (pattern,) = re.findall(r"sed -n 's/(.+)/\\1/p' README.md", ci)
    assert re.search(pattern.replace("\\(", "(").replace("\\)", ")"), lines[1]), (
        ".ci/run reads that line from README.md"
    )
    others = [path for path in Path(__file__).parent.rglob("test_*.py") if path.name != Path(__file__).name]
    tests = "".join(path.read_text(encoding="utf-8") for path in others)
    here = {
        "python -m pytest": lines[1].endswith("-m pytest"),
        "python -m pytest -m slow": "-m 'not nightly'" in ci,
        "python -m pytest -m gradients": "pytest.mark.gradients" in tests,  # a part of the first
        "python tests/mutate.py": "mutate(seconds=" in tests,  # one of the slow ones
        ARCHITECTURE: '"architecture.py"' in tests,
        "ruff format . && ruff check . && lint-imports && mypy": all(
            word in ci for word in ("ruff format", "ruff check", "lint-imports", "mypy")
        ),
    }
    here |= {tool: all(f'"{word}"' in tests for word in tool.split()[2:]) for tool in MEASURES}  # slow ones too
    here[GROWTH] = '"--grow"' in tests
    for command in of_kind("checked in .ci/run"):
        (measure,) = [tool for tool in MEASURES if command.startswith(tool)] or [command]
        assert here[measure], command


def prose(page: str) -> str:
    """A page without its code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```|^ {4}[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link can name after a #: a heading in small letters, without punctuation, with hyphens for spaces."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_lead_somewhere() -> None:
    led = 0
    for page in PAGES:
        text = re.sub(r"`[^`\n]+`", "", prose(page))
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text):
            if not target.startswith(("http:", "https:")):
                path = (ROOT / page).parent / target if target else ROOT / page
                assert path.exists(), f"{page} links to {target}"
                assert path.suffix != ".md" or not anchor or anchor in anchors(path), f"{page}: {target}#{anchor}"
                led += 1
    assert led > 10


def test_the_map_names_every_page() -> None:
    """The map is docs/index.md. The chapters of the course have an index of their own."""
    links = re.findall(r"\]\(([^)#]+\.md)", prose("docs/index.md"))
    named = {os.path.relpath(ROOT / "docs" / link, ROOT) for link in links}
    pages = {page for page in PAGES if not page.startswith("docs/course/")} | {"docs/course/index.md"}
    assert pages - {"docs/index.md"} - named == set()


def test_the_readme_is_short_and_quotes_what_stands_in_the_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    (quoted,) = re.findall(r"\(\[softmax\.py\]\((.+)\)\):\n\n((?:    .+\n)+)", text)
    assert quoted[1] in (ROOT / quoted[0]).read_text(encoding="utf-8")


def test_each_measurement_has_its_command_beside_it() -> None:
    """In its row: all of them stand in tables."""
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| .+ with \|\n\|[-:|]+\|\n((?:\| .+ \|\n)+)", text, flags=re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > len(tables) > 3
    for row in rows:
        measured, _, beside = row.strip("| ").rpartition("|")
        assert re.search(r"\d", measured), row
        assert re.search(r"`(python |manual-backprop |tests/)", beside), row


def test_each_number_of_the_readme_has_its_command_beside_it() -> None:
    """A number with a fraction is measured, unless it is a version."""
    text = re.sub(r"^\| (Python|PyTorch) \| .*$", "", prose("README.md"), flags=re.MULTILINE)
    paragraphs = [part for part in text.split("\n\n") if re.search(r"\d\.\d", part)]
    assert paragraphs
    for paragraph in paragraphs:
        assert re.search(r"`(python|manual-backprop) ", paragraph), paragraph


def test_what_torchrun_is_to_start_is_a_run(tmp_path: Path) -> None:
    """Of the lines in the documents, and of the file for Slurm, which bash reads."""
    sbatch = ROOT / "docs" / "guide" / "train.sbatch"
    subprocess.run(["bash", "-n", sbatch], check=True)
    text = sbatch.read_text(encoding="utf-8")
    directives = re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal"} <= dict(directives).keys()
    assert text.count("#SBATCH") == len(directives)
    lines = [*of_kind("torchrun"), text.replace("\\\n", " ").partition("srun ")[2]]
    assert len(lines) > 2
    for line in lines:
        options, _, overrides = line.partition(" -m manual_backprop.run ")
        assert "--nproc-per-node=" in options
        config = command_line.check(shlex.split(overrides)).jobs[0].config
        nodes, each = (int(re.findall(rf"{name}=(\d+)", f"{options} --nnodes=1")[0]) for name in ("nnodes", "per-node"))
        rows = config.training.batch_size * config.training.gradient_accumulation_steps
        assert rows % (each * nodes) == 0, line
