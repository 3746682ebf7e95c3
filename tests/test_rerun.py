"""`python -m manual_backprop.rerun`: the same bits in another process, every change named, other differences
reported."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command_tools import command
from run_tools import metric, newest, resume, same_process, train

from manual_backprop.common.errors import CheckFailedError, ConfigError, InputError
from manual_backprop.rerun import main
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.environment import code_digest
from manual_backprop.tracking.run_directory import list_runs, read_run
from manual_backprop.tracking.tracker import Tracked
from manual_backprop.training.reproduction import compare, rerun

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def original(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, made like by the command, with the gradient check."""
    root = tmp_path_factory.mktemp("original")
    with same_process():
        os.chdir(root)
        return train(root, text, "training.max_steps=4", "training.eval_every=2", "model.dropout=0.2", "seed=5")


@pytest.fixture
def then(original: Path, tmp_path: Path) -> Path:
    run = Path(shutil.copytree(original.parent.parent, tmp_path / "outputs")) / "runs" / original.name
    change(run / "run.json", code=code_digest())  # somebody may be writing at it while the tests run
    return run


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.slow
def test_the_same_bits_in_another_process(then: Path, tmp_path: Path) -> None:
    done = command(then.name[-6:], cwd=tmp_path, module="manual_backprop.rerun")
    assert done.returncode == 0, done.stderr
    assert f"{then.name} again; nothing has changed since" in done.stdout
    assert "The losses of 4 steps are bitwise the same." in done.stdout
    again = newest(tmp_path)
    assert again != then
    assert metric(again, "train/loss") == metric(then, "train/loss")
    assert metric(again, "validation/loss") == metric(then, "validation/loss")
    assert Tracked.read(again).tags["rerun_of"] == then.name
    assert read_run(then)["resumes"] == []


def test_what_the_command_line_changes_is_named(then: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rerun(str(then), ["seed=6", "training.max_steps=2"], tmp_path)
    printed = capsys.readouterr().out
    assert "changed since: seed: 5 then, 6 now" in printed
    assert "changed since: training.max_steps: 4 then, 2 now" in printed
    assert "The losses differ in 2 of the 2 steps that both logged, first at step 1: train/loss 5." in printed


def test_every_drift_is_named(then: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_with = read_run(then)["made_with"]
    others = {"torch": "1.0", "processor": "an abacus", "version": "0.0.9", "commit": "0" * 40 + " and changes"}
    change(then / "run.json", code="another", made_with=made_with | others)
    tags = Tracked.read(then).tags
    change(
        then / "tracking.json",
        tags=tags | {"dataset_digest": "d", "tokenizer_digest": "t"},
    )
    packages = then / "packages.txt"
    packages.write_text(packages.read_text().replace("numpy==", "numpy==0.") + "vanished==1.0\n")
    rerun("last", ["training.max_steps=1", "device.threads=2"], tmp_path)
    printed = capsys.readouterr().out
    for words in (
        "code: 0.0.9, commit 000000000000 and changes then, ",
        "torch: 1.0 then",
        "processor: an abacus then",
        "threads: 1 then, 2 now",
        "dataset: d then",
        "tokenizer: t then",
        "package numpy: 0.",
        "package vanished: 1.0 then, absent now",
        "training.max_steps: 4 then, 1 now",
    ):
        assert f"changed since: {words}" in printed, words


def test_a_run_that_went_on_with_other_settings(then: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume(tmp_path, "resume=last", "training.max_steps=6", "optimizer.learning_rate=1e-4")
    rerun("last", [], tmp_path)
    printed = capsys.readouterr().out
    assert "the run was resumed after step 4 with other optimizer.learning_rate, training.max_steps" in printed


def test_losses_that_differ_for_no_reason_are_a_bug(
    then: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of one loss: the smallest possible difference."""
    metrics = then / "metrics.jsonl"
    loss = metric(then, "train/loss")[2]
    metrics.write_text(metrics.read_text().replace(repr(loss), repr(loss * (1 + 2**-52))))
    with pytest.raises(
        CheckFailedError, match=r"differ in 1 of the 4 steps.* first at step 3: train/loss .*a bug"
    ) as bug:
        rerun(then.name, [], tmp_path)
    assert bug.value.exit_code == 1


def test_what_cannot_be_rerun(then: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run 'elephant'"):
        rerun("elephant", [], tmp_path)
    with pytest.raises(ConfigError, match="starts at the first step"):
        rerun("last", ["resume=best"], tmp_path)
    with pytest.raises(ConfigError, match="did you mean seed"):
        rerun("last", ["sede=1"], tmp_path)
    with pytest.raises(InputError, match="the first argument must name the run"):
        main(["seed=1"])
    (then / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml is not the config of a run"):
        rerun("last", [], tmp_path)
    assert list_runs(tmp_path / "outputs") == [then]


def test_nothing_in_common_is_no_success(then: Path) -> None:
    log = load_training_log(then)
    log.training.clear()
    log.validation.clear()
    assert compare(load_training_log(then), log) == (0, [])
