"""What several test files share: a small text, a finished run on it, and a folder to run commands in."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for number in (
    signal.SIGINT,
    signal.SIGHUP,
):  # ignored where a shell's & or nohup started this, and by every child then
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others, threads that wait for one another wait long
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# Files that take long, the longest first: the last ones must be short, or the other processes wait for them.
LONG = (
    *("test_planted_bugs", "test_documents_for_people", "test_measuring_commands", "test_kill", "test_sweeps"),
    *("test_mlflow_tracking", "test_installed", "test_convert", "test_signals", "test_quality", "test_hub_experiments"),
    *("test_compiled_kernels", "test_kernels", "test_plan", "test_checkpoint", "test_experiments", "test_run"),
    *("test_run_ends", "test_runner", "test_resume", "test_diagnose", "test_data_runs", "test_rerun"),
    *("test_gradients", "test_replay"),
)
# Their tests share no expensive fixtures and are distributed one by one; the tests of other files stay together.
ONE_BY_ONE = (
    *("test_planted_bugs", "test_measuring_commands", "test_kill", "test_mlflow_tracking", "test_kernels", "test_plan"),
    *("test_compiled_kernels", "test_experiments", "test_run", "test_run_ends", "test_runner", "test_resume"),
    *("test_gradients", "test_replay"),
)
TOGETHER = {  # in one process, which imports that library: 9 s
    "transformers": (
        "test_convert",
        "test_llama",
        "test_bench",
        "test_gpu_bench",
        "test_pretrained",
        "test_data_tools",
        "test_collated_batches",
    ),
    "datasets": ("test_hub", "test_hub_tools", "test_inspect"),
}
COMPILING = pytest.StashKey[subprocess.Popen[bytes]]()


@pytest.hookimpl(optionalhook=True)  # mutate.py loads no plugins
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than there are cores, since tests also wait for processes and for MLflow. `-m gradients` has no
    such waiting and no additional worker."""
    from manual_backprop.training.sweeps.processors import cores

    return cores() + (config.option.markexpr != "gradients")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The scheduler, which distributes tests in the order in which they are collected."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFileOrTest(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            name = Path(file).stem
            library = next((library for library, files in TOGETHER.items() if name in files), None)
            return library or (nodeid if name in ONE_BY_ONE else file)

    config.option.loadscopereorder = False  # not the files with the most tests first
    return ByFileOrTest(config, log)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gradients` only files with such a mark are imported: importing the others takes longer than many
    tests."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if config.option.markexpr == "gradients" and is_test and b"mark.gradients" not in collection_path.read_bytes():
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs slow tests first, and so files that contain one; within a file the order does not change."""
    order = {name: place for place, name in enumerate(LONG)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def place(item: pytest.Item) -> tuple[bool, int]:
        alone = item.path.stem in ONE_BY_ONE
        first = item.get_closest_marker("slow") is not None if alone else item.path in slow
        return not first, order.get(item.path.stem, len(order))

    items.sort(key=place)


def pytest_sessionstart(session: pytest.Session) -> None:
    """If most tests run, starts a process that compiles the library of kernels. Tests that need it wait for it."""
    config = session.config
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr != "gradients"
    if everything and not config.option.collectonly and "PYTEST_XDIST_WORKER" not in os.environ:
        program = "from manual_backprop.kernels.cpu.library import build, find; find() or build()"
        words = [sys.executable, "-c", program]
        paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        given = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        config.stash[COMPILING] = subprocess.Popen(words, env=given, stderr=subprocess.DEVNULL)


def pytest_sessionfinish(session: pytest.Session) -> None:
    compiling = session.config.stash.get(COMPILING, None)
    if compiling is not None and compiling.poll() is None:
        compiling.send_signal(signal.SIGINT)  # it ends its compiler
        compiling.wait()


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seeds the random generators from the test's name, so that random numbers do not depend on earlier tests."""
    import random
    import zlib

    import numpy
    import torch

    seed = zlib.crc32(f"{request.path.name}::{request.node.name}".encode())  # what xdist leaves of a test's id
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: with small tensors several threads would only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run uncompiled, even if they could be compiled."""
    from contextlib import nullcontext

    monkeypatch.setattr("manual_backprop.kernels.compiled_functions", lambda wanted: nullcontext())


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from run_tools import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with evaluations and checkpoints at 4 and 8. Read it, or copy it."""
    from run_tools import same_process, train

    options = ("training.max_steps=8", "training.eval_every=4", "training.save_every=4", "model.dropout=0.1")
    with same_process():
        return train(
            tmp_path_factory.mktemp("finished"), text, *options, "run_name=a first run", "seed=3", "tags.note=x"
        )


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run in its own folder."""
    return Path(shutil.copytree(finished.parent.parent, tmp_path / "outputs")) / "runs" / finished.name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in `tmp_path`; the state of the process is restored afterwards."""
    from run_tools import same_process

    with same_process():
        monkeypatch.chdir(tmp_path)
        yield


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database. Copy it: creating one takes seconds."""
    from manual_backprop.tracking.mlflow_delivery import prepare_environment

    prepare_environment()
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, if installed."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here; Debian has it: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'manual-backprop[browser]'")
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", *quiet])
        yield opened
        opened.close()
