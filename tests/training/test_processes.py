"""Several real processes train like one: the same losses and parameters, for every task and setting."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from process_group import Job, Together, job_of
from run_tools import assert_same_tensors, config_of, metric, newest, same_process, small

from manual_backprop.checkpoints.checkpoint import load_checkpoint
from manual_backprop.common.errors import ConfigError
from manual_backprop.tracking.run_directory import list_runs, read_run
from manual_backprop.training import report
from manual_backprop.training.command_line import check
from manual_backprop.training.runner import run_job

ROWS = "training.batch_size=12"
STEPS = ("training.max_steps=20", "training.log_every=1", "precision=fp64", "training.eval_every=10")
TINY_ROWS = ("task.training_rows=90", "task.validation_rows=50", "task.test_rows=30", "training.num_epochs=null")
CASES: dict[str, tuple[str, ...]] = {
    "packed": (ROWS, "model.dropout=0.1", "training.inspect_every=7", "training.label_smoothing=0.1"),
    "padded": (
        *("training.batch_size=4", "training.gradient_accumulation_steps=3", "architecture=llama", "batching=padded"),
        *("training.recompute=block", "dataset=jsonl", "model.dropout=0.2", "training.inspect_every=10"),
    ),
    "pairs": ("task=reversal", ROWS, "model.dropout=0.1", "model.max_seq_len=24", *TINY_ROWS),
    "series": (
        *("task=forecasting", "task.history=24", "task.horizon=6", "task.season=12", "task.patch=4", ROWS),
        *("training.num_epochs=null", "model.dropout=0.1"),
    ),
    "labels": ("task=classification", "dataset=labelled", ROWS, "tokenizer=byte", "training.num_epochs=null"),
    "torch": ("implementation=torch", ROWS, "model.dropout=0.1"),
    "baseline": ("implementation=baseline", ROWS, "implementation.compile=never"),
    "sgd": ("optimizer=sgd", "kernels=reference", ROWS, "architecture=vaswani", "batching.mask_documents=true"),
}
SAME = 1e-12  # relative, in float64
NOT_THE_SAME = re.compile(r"system/|tokens_per_second|peak_share")


def write_documents(folder: Path) -> None:
    """Of very different lengths, and few, so that the last step of an epoch is ragged: some processes have no row."""
    rows = [(n * n % 3, f"the {('cat', 'dog', 'owl')[n * n % 3]} saw {n} mice") for n in range(80)]
    (folder / "labelled.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for label, text in rows))
    texts = [" ".join(f"word{n * n % 11}" for n in range(1 + 7 * k % 23)) for k in range(26)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "text.txt").write_text(
        " ".join(f"the {('cat', 'dog', 'owl')[n * n % 3]} saw {n % 7}." for n in range(300))
    )


def jobs(folder: Path, names: list[str], *more: str) -> list[Job]:
    found = []
    for name in names:
        options = (*STEPS, *CASES[name], *more)
        last = {option.partition("=")[0]: option for option in options}  # of an option that is given twice
        options = tuple(last.values())
        if any(option.startswith("task=") for option in options):
            options += (f"dataset.path='{folder / 'labelled.csv'}'",) * ("dataset=labelled" in options)
            network = ("model=tiny", "model.d_model=16", "model.n_heads=2", "model.d_ffn=24", "tracking=none")
            given = [*network, *options, "device=cpu", "device.threads=1"]
        else:
            path = folder / ("rows.jsonl" if "dataset=jsonl" in options else "text.txt")
            given = small(f"dataset.path='{path}'", *options)
        found.append(job_of(check(given).jobs[0].config))
    return found


def alone(root: Path, wanted: list[Job]) -> list[Path]:
    from manual_backprop.config.validation import validate

    with same_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_inspection", lambda *_: [])
        patch.setattr(report, "draw_training_progress", lambda *_: False)
        for job in wanted:
            run_job(validate(job), root)
    return list_runs(root / "outputs")


def assert_same_training(one: Path, other: Path) -> None:
    """Compares losses, norms, metrics and parameters to SAME, except the keys' biases, whose gradient is only
    rounding."""
    first, second = (
        [
            {name: value for name, value in json.loads(line)["metrics"].items() if not NOT_THE_SAME.search(name)}
            for line in (run / "metrics.jsonl").read_text().splitlines()[1:]
        ]
        for run in (one, other)
    )
    assert len(first) == len(second) > 20
    for wanted, got in zip(first, second, strict=True):
        assert wanted.keys() == got.keys()
        for name in wanted:
            if not name.startswith("inspect/update_ratio"):
                assert got[name] == pytest.approx(wanted[name], rel=SAME, abs=1e-14), name
    ended = [load_checkpoint(sorted((run / "checkpoints").iterdir())[-1]).tensors for run in (one, other)]
    for group, named in ended[0].items():
        for name, tensor in named.items():
            if "key.bias" not in name:
                error = torch.linalg.vector_norm((ended[1][group][name] - tensor).double())
                assert error <= 1e-9 * torch.linalg.vector_norm(tensor.double()) + 1e-18, f"{group} {name}"
    assert (one / "samples" / "step-000020.txt").read_text() == (other / "samples" / "step-000020.txt").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_documents(folder)
    return folder


@pytest.fixture(scope="module")
def by_one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a case in this process."""

    @cache
    def run(name: str) -> Path:
        return alone(tmp_path_factory.mktemp(name), jobs(folder, [name]))[0]

    return run


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, ["packed", "pairs", "series", "torch"]),
        (4, ["padded"]),
        *[pytest.param(size, list(CASES), marks=pytest.mark.nightly) for size in (2, 3, 4)],
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(value),
)
def test_several_processes_train_what_one_does(
    size: int, names: list[str], folder: Path, by_one: Callable[[str], Path], tmp_path: Path
) -> None:
    together = Together(tmp_path, size, jobs(folder, names))
    assert together.codes() == [0] * size, together.said()
    runs = list_runs(tmp_path / "outputs")
    assert len(runs) == len(names), "one run each, and not one for each process"
    for name, run in zip(names, runs, strict=True):
        assert_same_training(by_one(name), run)
        assert read_run(run)["made_with"]["processes"] == size
    assert [together.said(rank) for rank in range(1, size)] == [""] * (size - 1), "the others are silent"


def test_the_bits_are_those_of_as_many_processes(folder: Path, tmp_path: Path) -> None:
    """Two runs have the same bits, sharded or not, in the usual precisions for training."""
    mixed = ("precision=bf16_mixed", "training.max_steps=6")
    fp32 = ("precision=fp32", "training.max_steps=6")
    wanted = [
        *jobs(folder, ["packed", "packed"], *mixed),
        *jobs(folder, ["packed"], *mixed, "optimizer.sharded=false"),
        *jobs(folder, ["padded"], *fp32),
        *jobs(folder, ["padded"], *fp32, "optimizer.sharded=false"),
    ]
    together = Together(tmp_path, 2, wanted)
    assert together.codes() == [0, 0], together.said()
    ended = [run / "checkpoints" / "step-000006" for run in list_runs(tmp_path / "outputs")]
    for one, other in ((0, 1), (0, 2), (3, 4)):
        assert_same_tensors(ended[one], ended[other])


def test_a_checkpoint_of_two_goes_on_with_any_number(folder: Path, tmp_path: Path) -> None:
    (whole,) = jobs(folder, ["packed"])
    half = [*jobs(folder, ["packed"], "training.save_every=10")]
    first = Together(tmp_path / "first", 2, [whole, half[0]])
    assert first.codes() == [0, 0], first.said()
    runs = list_runs(tmp_path / "first" / "outputs")
    shutil.rmtree(runs[1] / "checkpoints" / "step-000020")
    for size in (1, 2, 4):
        root = tmp_path / str(size)
        shutil.copytree(tmp_path / "first", root)
        run = root / "outputs" / "runs" / runs[1].name
        resumed = half[0] | {"resume": str(run / "checkpoints" / "step-000010")}
        if size == 1:
            alone(root, [resumed])
            assert_same_training(runs[0], run)
            continue
        together = Together(root, size, [resumed])
        assert together.codes() == [0] * size, together.said()
        if size == 2:
            assert_same_tensors(runs[0] / "checkpoints" / "step-000020", run / "checkpoints" / "step-000020")
            assert metric(runs[0], "train/loss") == metric(run, "train/loss")
        else:
            assert_same_training(runs[0], run)
            assert "processes: 2 then, 4 now" in together.said()
    assert newest(tmp_path / "4").name == runs[1].name


def test_what_cannot_be_shared_is_refused(folder: Path) -> None:
    text = folder / "text.txt"
    with pytest.raises(ConfigError, match=r"device.processes=5: must divide the rows.*training.batch_size=12"):
        config_of(text, ROWS, "device.processes=5")
    with pytest.raises(ConfigError, match=r"optimizer.sharded=true: implementation=torch trains with PyTorch's own"):
        config_of(text, "implementation=torch", "optimizer.sharded=true")
    with pytest.raises(ConfigError, match=r"optimizer.sharded=maybe: must be auto, true or false"):
        config_of(text, "optimizer.sharded=maybe")
