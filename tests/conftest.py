"""What several files of tests share: a small text, a finished run of it, a folder to give commands in."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

for number in (
    signal.SIGINT,
    signal.SIGHUP,
):  # ignored where a shell's & or nohup started this, and by every child then
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others, threads that wait for one another wait long
    os.environ.setdefault("OMP_NUM_THREADS", "1")


LONG = ("test_measuring_commands", "test_planted_bugs")  # with slow tests for minutes: at the end others would wait


@pytest.hookimpl(optionalhook=True)  # mutate.py loads no plugins
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Tests wait, for processes and for MLflow's patience, so that one more of them keeps the cores busy."""
    from manual_backprop.sweeps.processors import cores

    return cores() + 1


def pytest_configure(config: pytest.Config) -> None:
    """Files are handed out in the order in which they are collected, not those with the most tests first."""
    config.option.loadscopereorder = config.option.markexpr != "slow"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr == "slow":
        items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Whatever a test draws without a generator of its own depends on its name alone: not on what ran before it."""
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
    """Tensors are small here: several threads would spend their time waiting for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, also where it could be."""
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
    """That run in a folder of its own."""
    return Path(shutil.copytree(finished.parent.parent, tmp_path / "outputs")) / "runs" / finished.name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands are given in `tmp_path`, and the process is as it was afterwards."""
    from run_tools import same_process

    with same_process():
        monkeypatch.chdir(tmp_path)
        yield


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database that nobody has used. Copy it: to create one takes seconds."""
    from manual_backprop.tracking.mlflow_delivery import prepare_environment

    prepare_environment()
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file
