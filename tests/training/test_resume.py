"""Resuming a run, in this process: exactly as if it had not stopped, or refused. Real kills: test_kill.py."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_tools import TO_KNOW_IMPORTS, command, imported
from run_tools import assert_same_tensors, config_of, metric, newest, resume, stumbling, train
from torch import Tensor

from manual_backprop.checkpoints.checkpoint import CheckpointManager, _manifest_of, load_checkpoint
from manual_backprop.common.errors import CheckpointError, ConfigError, InputError, RunInUseError
from manual_backprop.common.interruption import Interruption
from manual_backprop.data.datasets.tokenizer_training import train_tokenizer_from_files
from manual_backprop.run import main
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import open_run_directory, read_run, update_run
from manual_backprop.training.command_line import check
from manual_backprop.training.resume import STATE, open_resumed
from manual_backprop.training.run_state import restore, tensors_of
from manual_backprop.training.runner import Runner, run_job

pytestmark = pytest.mark.usefixtures("here")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "options",
    [
        ("kernels=reference", "precision=fp32", "optimizer=adamw"),
        ("kernels=reference", "precision=bf16", "optimizer=adamw", "architecture=vaswani"),
        ("kernels=reference", "precision=bf16_mixed", "optimizer=adamw", "training.label_smoothing=0.1"),
        ("kernels=fused", "precision=bf16", "optimizer=adamw"),
        ("kernels=fused", "precision=fp16_mixed", "architecture=llama"),
        ("kernels=fused", "precision=fp32", "optimizer=sgd"),
        pytest.param(("kernels=fused", "precision=bf16_mixed", "architecture=llama"), marks=SLOW),
        pytest.param(("kernels=fused", "optimizer=sgd", "training.gradient_accumulation_steps=3"), marks=SLOW),
        pytest.param(("kernels=reference", "precision=fp32", "optimizer=sgd", "schedule=linear"), marks=SLOW),
        pytest.param(("kernels=reference", "precision=bf16", "optimizer=sgd"), marks=SLOW),
        pytest.param(("precision=fp32", "implementation=torch"), marks=SLOW),
    ],
    ids=" ".join,
)
def test_exact_resume(options: Sequence[str], text: Path, tmp_path: Path) -> None:
    """From a checkpoint in the middle the second half repeats bit by bit, in everything that was logged."""
    run = train(tmp_path, text, *options, "model.dropout=0.2", "training.max_steps=8", "training.save_every=4")
    before = shutil.copytree(run, tmp_path / "before")
    # other options on the command line than those of the run: they must not count
    resume(tmp_path, f"resume={run / 'checkpoints' / 'step-000004'}")
    assert newest(tmp_path) == run
    assert len(read_run(run)["resumes"]) == 1
    assert_same_tensors(run / "checkpoints/step-000008", before / "checkpoints/step-000008")
    for name in ("train/loss", "gradient_norm", "learning_rate", "tokens_seen", "validation/loss"):
        assert metric(run, name) == metric(before, name), name
    assert (run / "superseded.jsonl").exists()
    assert (run / "checkpoints/superseded/step-000008").is_dir()


def test_resume_takes_only_what_the_command_line_names(copy: Path, tmp_path: Path) -> None:
    """The command line need not repeat a run's settings; training.max_steps makes the run longer."""
    resume(tmp_path, "resume=last", "training.max_steps=10", "training.log_every=2", "tags.more=y")
    log = load_training_log(copy)
    assert list(log.training["train/loss"].steps) == [*range(1, 9), 10]
    saved = load_checkpoint(copy / "checkpoints/step-000010").state
    assert saved["network"]["d_model"] == 16
    assert saved["config"]["training"]["log_every"] == 2
    assert saved["config"]["model"]["dropout"] == 0.1
    assert saved["config"]["seed"] == 3
    # the same seed of config.yaml, for the next resume
    assert "max_steps: 10" in (copy / "config.yaml").read_text()


def test_resume_last_reads_its_checkpoint_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, which composes twice, verifies, owns and loads: every byte is compared with the manifest once."""
    counted: Counter[Path] = Counter()
    real = hashlib.file_digest

    def counting(file: Any, digest: str) -> Any:
        counted[Path(file.name)] += 1
        return real(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    monkeypatch.setattr("manual_backprop.checkpoints.checkpoint.SETTLED", 0.0)
    path = copy / "checkpoints" / "step-000008"
    files = {file for file in path.iterdir() if file.name != "manifest.json"}
    assert main(["resume=last", "training.max_steps=9"]) is None
    assert {file: times for file, times in counted.items() if file.parent == path} == dict.fromkeys(files, 1)


def test_what_is_saved_is_not_copied_first(text: Path, tmp_path: Path) -> None:
    """Neither to check that it fits on the disk, nor to write it."""
    with Interruption() as interruption:
        runner = Runner(config_of(text), tmp_path / "outputs", interruption)
    buffers = [runner.model.network.flat_parameters, *runner.optimizer.moments.values()]
    places = {flat.buffer.untyped_storage().data_ptr() for flat in buffers}
    places.add(runner.optimizer.counts.untyped_storage().data_ptr())
    saved = tensors_of(runner.model, runner.optimizer)
    assert {x.untyped_storage().data_ptr() for named in saved.values() for x in named.values()} == places
    assert saved.keys() == {"parameters", "optimizer"}
    assert saved["optimizer"].keys() == runner.optimizer.state().keys()


def test_resume_with_another_learning_rate(copy: Path, tmp_path: Path) -> None:
    resume(tmp_path, "resume=last", "training.max_steps=9", "schedule=constant", "optimizer.learning_rate=1e-5")
    assert metric(copy, "learning_rate")[-1] == 1e-5


def test_resume_with_another_learning_rate_of_the_model(copy: Path, tmp_path: Path) -> None:
    """adamw takes model.learning_rate, also in a run whose config.yaml names both."""
    resume(tmp_path, "resume=last", "training.max_steps=9", "schedule=constant", "model.learning_rate=1e-5")
    assert metric(copy, "learning_rate")[-1] == 1e-5


def test_a_schedule_that_gets_longer_says_how_the_rate_rises(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = metric(copy, "learning_rate")
    ended, peak = before[-1], max(before)
    shutil.copytree(tmp_path, tmp_path / "other", symlinks=True)
    short = ("training.log_every=1", "training.eval_every=100")
    resume(tmp_path, "resume=last", "training.max_steps=12", *short)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "The learning rate rises" in line]
    risen = metric(copy, "learning_rate")[len(before)]
    assert ended < risen <= peak
    assert f"from {ended:.3g} in step {len(before)} to {risen:.3g} in step {len(before) + 1}, since" in said
    resume(tmp_path / "other", "resume=last", "training.max_steps=12", *short, *said.rpartition(": ")[2].split())
    kept = metric(newest(tmp_path / "other"), "learning_rate")[len(before) :]
    assert kept == pytest.approx([ended] * len(kept), rel=1e-5)
    assert "rises" not in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("training.max_steps=null", "training.num_epochs=0.02")])
def test_the_next_command_works_as_it_is_printed(
    options: Sequence[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train(tmp_path, text, "training.max_steps=2", *options) if not options else train(tmp_path, text, *options)
    steps = len(metric(run, "train/loss"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "resume=" in line]
    words = line.split()
    assert words[:3] == ["python", "-m", "manual_backprop.run"]
    resume(tmp_path, *words[3:])
    assert len(metric(run, "train/loss")) == 2 * steps


def test_ways_to_name_a_run(copy: Path) -> None:
    latest, best = copy / "checkpoints/step-000008", CheckpointManager(copy / "checkpoints").best()
    update_run(copy, lambda run: run.update(mlflow={"run_id": "c0ffee" * 5 + "00"}))
    ways = {"last": latest, "best": best, copy.name: latest, copy.name[-6:]: latest, "c0ffee" * 5 + "00": latest}
    ways |= {
        str(copy): latest,
        str(latest): latest,
        str(copy / "checkpoints/step-000004"): latest.with_name("step-000004"),
    }
    for which, checkpoint in ways.items():
        assert check([f"resume='{which}'", "training.max_steps=9"]).jobs[0].config.resume == str(checkpoint), which


def test_finished_run_has_nothing_to_resume(copy: Path, tmp_path: Path) -> None:
    before = read_run(copy)
    with pytest.raises(InputError, match=r"has made 8 steps already and training.max_steps is 8: give a larger"):
        resume(tmp_path, "resume=last")
    assert read_run(copy) == before


REFUSED = {
    "seed=4": "seed=4: must stay 3",
    "model.d_model=32": "model.d_model=32: must stay 16",
    "model.max_seq_len=4": "model.max_seq_len=4: must stay 8",
    "model.vocab_size=300": "model.vocab_size=300: must stay 257",
    "training.batch_size=8": "training.batch_size=8: must stay 4",
    "training.gradient_accumulation_steps=1": "training.gradient_accumulation_steps=1: must stay 2",
    "precision=bf16": "precision=bf16: must stay fp32",
    "optimizer=sgd": "optimizer=sgd: must stay adamw",
    "tokenizer=char": "tokenizer=char: must stay byte",
    "architecture=vaswani": "architecture=vaswani: must stay gpt2",
    "architecture.norm_epsilon=1e-3": "architecture.norm_epsilon=0.001: must stay null",
    "dataset=python_docs": "dataset=python_docs: must stay text",
    "dataset.max_length=3": "dataset.max_length=3: must stay null",
    "batching=padded": "batching=padded: must stay packed",
    "training.overfit_batches=1": "training.overfit_batches=1: must stay null",
}


def test_a_run_killed_after_its_last_save_is_finished(copy: Path, tmp_path: Path) -> None:
    """All its steps are done and logged; only its status is missing."""
    loss, before = metric(copy, "validation/loss"), metric(copy, "train/loss")
    update_run(copy, lambda run: run.update(status="KILLED"))
    assert resume(tmp_path, "resume=last") == loss[-1]
    assert read_run(copy)["status"] == "FINISHED"
    assert (metric(copy, "validation/loss"), metric(copy, "train/loss")) == (loss, before)


def assert_unchanged(run: Path, before: dict[Path, bytes]) -> None:
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_another_run_is_refused_with_every_difference_in_one_message(copy: Path, tmp_path: Path) -> None:
    """Before anything is built: by the command line, and for Python callers by the runner."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as caught:
        check(["resume=last", "training.max_steps=9", *REFUSED])
    for words in REFUSED.values():
        assert len([violation for violation in caught.value.violations if violation.startswith(words)]) == 1, words
    assert all("as in step-000008" in violation for violation in caught.value.violations[: len(REFUSED)])
    assert caught.value.exit_code == 2

    config = check(["resume=last", "training.max_steps=9"]).jobs[0].config
    config = replace(config, seed=4, model=replace(config.model, d_model=32))
    with pytest.raises(ConfigError, match=r"model.d_model=32: must stay 16.*\nseed=4: must stay 3"):
        run_job(config, tmp_path)
    assert_unchanged(copy, before)


@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_what_does_not_fit_a_run_is_refused_before_torch_is_imported(key: str, copy: Path, tmp_path: Path) -> None:
    done = command(f"{key}={copy.name}", "model.d_model=32", cwd=tmp_path, flags=TO_KNOW_IMPORTS)
    assert "model.d_model=32: must" in done.stderr
    assert done.returncode == 2
    modules = imported(done)
    assert "manual_backprop.trained_models.initial_weights" in modules
    assert not modules & {"torch", "mlflow", "datasets", "transformers"}


def test_another_text_is_refused_before_anything_is_built(text: Path, tmp_path: Path) -> None:
    """The content of the text counts, not the config."""
    mine = tmp_path / "mine.txt"
    shutil.copy(text, mine)
    run = train(tmp_path, mine, "training.max_steps=1", "tokenizer=char")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    mine.write_text(mine.read_text() + " And more: ÄÖÜ.")
    with pytest.raises(
        ConfigError, match=r"(?s)dataset: this text.*tokenizer: it has changed.*vocab_size=\d+: must stay"
    ):
        resume(tmp_path, "resume=last", "training.max_steps=2")
    assert_unchanged(run, before)
    shutil.copy(text, mine)
    resume(tmp_path, "resume=last", "training.max_steps=2")


def test_a_tokenizer_may_lie_elsewhere(text: Path, tmp_path: Path) -> None:
    """A tokenizer with the same content is accepted, another one is refused."""
    first, other = (train_tokenizer_from_files([text], size, output=tmp_path / f"own-{size}") for size in (270, 271))
    run = train(tmp_path, text, "training.max_steps=1", "tokenizer=file", f"tokenizer.path='{first}'")
    moved = first.rename(tmp_path / "moved")
    resume(tmp_path, "resume=last", "training.max_steps=2", f"tokenizer.path='{moved}'")
    assert len(metric(run, "train/loss")) == 2
    with pytest.raises(ConfigError, match="tokenizer: it has changed; bring back"):
        resume(tmp_path, "resume=last", "training.max_steps=3", f"tokenizer.path='{other}'")


def test_a_value_that_null_stands_for_is_no_difference(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not reported as a change; another value is refused."""
    run = train(tmp_path, text, "architecture=llama", "training.max_steps=1")
    usual = ("architecture.norm_epsilon=1e-6", "architecture.rotary_base=10000", "model.n_kv_heads=2")
    capsys.readouterr()
    resume(tmp_path, "resume=last", "training.max_steps=2", *usual)
    assert read_run(run)["resumes"][0]["changed"] == {"training.max_steps": [1, 2]}
    assert "norm_epsilon" not in capsys.readouterr().err
    resume(tmp_path, "resume=last", "training.max_steps=3", *(one.partition("=")[0] + "=null" for one in usual))
    others = ("architecture.norm_epsilon=1e-5", "architecture.rotary_base=20000", "model.n_kv_heads=1")
    with pytest.raises(ConfigError) as caught:
        check(["resume=last", "training.max_steps=4", *others])
    assert [violation.partition(":")[0] for violation in caught.value.violations] == [
        "architecture.norm_epsilon=1e-05", "architecture.rotary_base=20000.0", "model.n_kv_heads=1"
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check(["resume=last", "training.max_steps=4", "architecture=gpt2", "model.n_heads=1"])
    assert not [violation for violation in caught.value.violations if "epsilon" in violation or "n_kv" in violation]


def test_what_may_change_is_said_and_written_down(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learning rate, its schedule, the number of steps; also what regularises."""
    changes = ("optimizer.learning_rate=1e-3", "schedule=linear", "training.max_steps=9", "model.dropout=0.3")
    changes += ("optimizer.weight_decay=0.2", "training.label_smoothing=0.1", "training.max_grad_norm=null")
    resume(tmp_path, "resume=last", *changes, "tags.more=y", "run_name=other")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("From step 9 on: ")
    assert "optimizer.learning_rate=0.001 (was 0.003)" in line
    assert "schedule.name=linear (was cosine)" in line
    assert "model.dropout=0.3 (was 0.1)" in line
    (entry,) = read_run(copy)["resumes"]
    assert set(entry["changed"]) == {
        *("optimizer.learning_rate", "schedule.name", "training.max_steps", "model.dropout", "optimizer.weight_decay"),
        *("training.label_smoothing", "training.max_grad_norm"),
    }
    resume(tmp_path, "resume=last", "training.max_steps=10")
    assert set(read_run(copy)["resumes"][1]["changed"]) == {"training.max_steps"}


def test_threads_belong_to_the_state(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resume uses the number of threads of the checkpoint, whatever the machine has, or warns that bits will
    differ."""
    torch.set_num_threads(2)
    run = train(tmp_path, text, "device.threads=null", "training.max_steps=2")
    torch.set_num_threads(1)
    resume(tmp_path, "resume=last", "training.max_steps=4")
    assert torch.get_num_threads() == 2
    assert load_checkpoint(run / "checkpoints/step-000004").state["made_with"]["threads"] == 2
    assert "bits" not in capsys.readouterr().err
    resume(tmp_path, "resume=last", "training.max_steps=6", "device.threads=1")
    assert torch.get_num_threads() == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "bits will differ" in line]
    assert line.endswith("threads: 2 then, 1 now.")


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run in .* has a sound checkpoint"):
        resume(tmp_path, "resume=last")
    with pytest.raises(InputError, match="there is no run 'elephant'"):
        resume(tmp_path, "resume=elephant")
    assert not (tmp_path / "outputs/runs").exists()


def test_resume_of_a_damaged_checkpoint(copy: Path, tmp_path: Path) -> None:
    """The error names the damaged checkpoint and the one to use instead; that one works."""
    file = copy / "checkpoints/step-000008/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for which in (copy.name, "last"):
        with pytest.raises(InputError, match=r"optimizer.safetensors is damaged.*step-000004") as caught:
            resume(tmp_path, f"resume={which}", "training.max_steps=9")
    resume(tmp_path, "resume=" + str(caught.value).split("the newest sound checkpoint is ")[1])
    assert metric(copy, "tokens_seen")[-1] == 8 * 64


def test_resume_of_a_run_in_use(copy: Path, tmp_path: Path) -> None:
    owner = open_run_directory(copy, 8)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    try:
        with pytest.raises(RunInUseError, match=f"in use by process {os.getpid()}"):
            resume(tmp_path, "resume=last", "training.max_steps=9")
    finally:
        owner.release()
    assert_unchanged(copy, before)


def test_metrics_that_are_not_the_checkpoints_are_refused(copy: Path, tmp_path: Path) -> None:
    metrics = copy / "metrics.jsonl"
    content = metrics.read_bytes()
    for damaged in (content[: len(content) // 2], content.replace(b"\n", b" "), None):
        metrics.write_bytes(damaged) if damaged is not None else metrics.unlink()
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=r"metrics\.jsonl"):
            resume(tmp_path, "resume=last", "training.max_steps=9")
        assert_unchanged(copy, before)


def test_a_run_whose_config_is_gone_or_damaged(copy: Path, tmp_path: Path) -> None:
    config = copy / "config.yaml"
    for content in ("model: {d_model: 3", "- a\n- b\n", "model: {}\n", "", None):
        config.write_text(content) if content is not None else config.unlink()
        with pytest.raises(InputError, match=r"config\.yaml"):
            resume(tmp_path, "resume=last", "training.max_steps=9")


# Every part of a checkpoint matters


def reseal(checkpoint: Path) -> None:
    """Rewrites the manifest for the current files."""
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_bytes(_manifest_of(checkpoint))


@pytest.mark.parametrize("part", sorted({*STATE, "tokenizer_digest"}))
def test_no_part_of_the_state_can_be_left_out_or_another(part: str, copy: Path, tmp_path: Path) -> None:
    file = copy / "checkpoints/step-000008/state.json"
    sound = json.loads(file.read_text())
    assert set(sound["state"]) == {*STATE, "tokenizer_digest", "improvement"}  # the last is missing in older ones
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.parent != file.parent}

    without = dict(sound["state"])
    del without[part]
    value = sound["state"][part]
    other: Any = {
        "config": lambda: value | {"seed": 4},
        "network": lambda: value | {"vocab_size": 300},
        "dataset_digest": lambda: value[::-1],
        "tokenizer_digest": lambda: value[::-1],
        "metrics_length": lambda: value - 1,
        "made_with": lambda: value | {"threads": 7},
    }[part]()
    said = {"config": "seed", "network": "vocab_size", "dataset_digest": "dataset", "tokenizer_digest": "tokenizer"}
    said |= {"metrics_length": r"metrics\.jsonl"}
    for state in (without, sound["state"] | {part: other}):
        file.write_text(json.dumps(sound | {"state": state}))
        reseal(file.parent)
        if state is without or part != "made_with":
            with pytest.raises(InputError, match=f"lacks {part}" if state is without and part in STATE else said[part]):
                resume(tmp_path, "resume=last", "training.max_steps=9")
            after = {path: path.read_bytes() for path in before}
            assert after == before
        else:  # as many threads as the state says
            resume(tmp_path, "resume=last", "training.max_steps=9", "device.threads=null")
            assert torch.get_num_threads() == 7


def test_every_tensor_of_a_checkpoint_matters(copy: Path, tmp_path: Path) -> None:
    """Left out, it is refused; zeroed, the next two steps end with other bits."""
    config = check([f"resume={copy / 'checkpoints/step-000004'}"]).jobs[0].config
    resumed = open_resumed(config, tmp_path / "outputs")
    sound = resumed.checkpoint.tensors
    try:
        with Interruption() as interruption:
            runner = Runner(config, tmp_path / "outputs", interruption, resumed)
    finally:
        resumed.directory.release()

    def after_two_steps(tensors: dict[str, dict[str, Tensor]]) -> list[Tensor]:
        restore(runner.model, runner.optimizer, replace(resumed.checkpoint, tensors=tensors))
        for _ in range(2):
            runner.train_step()
        kept = tensors_of(runner.model, runner.optimizer)
        return [tensor.clone() for named in kept.values() for tensor in named.values()]

    truth = after_two_steps(sound)
    assert all(torch.equal(one, other) for one, other in zip(after_two_steps(sound), truth, strict=True))
    kinds = set()
    for group, named in sound.items():
        for name, tensor in named.items():
            rest = {other: value for other, value in named.items() if other != name}
            with pytest.raises(InputError, match=name):
                restore(runner.model, runner.optimizer, replace(resumed.checkpoint, tensors=sound | {group: rest}))
            assert tensor.any(), f"{group} {name} is 0: zeroing it shows nothing"
            zeroed = sound | {group: named | {name: torch.zeros_like(tensor)}}
            got = after_two_steps(zeroed)
            assert not all(torch.equal(one, other) for one, other in zip(got, truth, strict=True)), f"{group} {name}"
            kinds.add(name.partition("/")[0] if group == "optimizer" else group)
    assert kinds == {"parameters", "first_moment", "second_moment", "counts"}


def test_a_step_that_is_another_changes_what_follows(copy: Path, tmp_path: Path) -> None:
    """The step determines all randomness. It is also the checkpoint's name, and part of the state."""
    checkpoint = copy / "checkpoints/step-000004"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"step": 5}))
    reseal(checkpoint)
    with pytest.raises(InputError, match="holds the checkpoint of step 5"):
        resume(tmp_path, f"resume={checkpoint}")


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name",
    ["parameters.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "manifest.json", "extra.pkl"],
)
def test_a_planted_pickle_never_runs(name: str, copy: Path, tmp_path: Path) -> None:
    """Instead of each file and as an additional file, with and without an entry in the manifest."""
    checkpoint = copy / "checkpoints/step-000008"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(InputError, match=name):
        resume(tmp_path, "resume=last", "training.max_steps=9")
    if name != "manifest.json":
        reseal(checkpoint)
        harmless = name in ("tokenizer.json", "extra.pkl")  # the run has its own tokenizer; nobody asks for the other
        with pytest.raises(InputError, match=name) if not harmless else nullcontext():
            resume(tmp_path, "resume=last", "training.max_steps=9")
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_no_run_saved_is_refused(copy: Path, tmp_path: Path) -> None:
    CheckpointManager(copy / "checkpoints", keep=None).save(20, {"weights": {"w": torch.ones(3)}}, {"mine": True})
    with pytest.raises(InputError, match=r"step-000020 was not saved by a run of this version: its state lacks"):
        resume(tmp_path, "resume=last", "training.max_steps=30")
    state = load_checkpoint(copy / "checkpoints/step-000008").state
    CheckpointManager(copy / "checkpoints", keep=None).save(21, {"weights": {"w": torch.ones(3)}}, state)
    with pytest.raises(InputError, match=r"step-000021 was not saved by a run: it lacks parameters or optimizer"):
        resume(tmp_path, "resume=last", "training.max_steps=30")


# What a resume judges


def test_skipped_steps_are_judged_once(text: Path, tmp_path: Path) -> None:
    """A resume with a lower limit does not fail because of steps that were skipped before it."""
    config = config_of(text, "training.max_steps=4", "training.non_finite=skip", "training.non_finite_limit=3")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
        stumbling(runner, {2, 3}, gradient=True)
        runner.run()
    resume(tmp_path, "resume=last", "training.max_steps=6", "training.non_finite_limit=2")
    assert read_run(newest(tmp_path))["status"] == "FINISHED"


def test_resume_checks_against_the_runs_own_config(text: Path, tmp_path: Path) -> None:
    """Keys of the run's own optimizer, and its unit of length (steps or epochs)."""
    train(tmp_path, text, "optimizer=sgd", "training.max_steps=null", "training.num_epochs=0.1")
    config = check(["resume=last", "optimizer.momentum=0.8", "training.num_epochs=0.3"]).jobs[0].config
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.8)
    assert (config.training.num_epochs, config.training.max_steps) == (0.3, None)
