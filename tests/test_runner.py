"""The Runner in this process: what a run writes, how exactly it resumes, how it ends. Exit codes: test_run.py."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manual_backprop.checkpoint import CheckpointManager, load_checkpoint
from manual_backprop.command_line import check
from manual_backprop.config import RunConfig
from manual_backprop.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    Interrupted,
    NotFiniteError,
    RunInUseError,
    StorageError,
)
from manual_backprop.interruption import Interruption
from manual_backprop.language_model import CustomTransformerWrapper
from manual_backprop.origin import Origin
from manual_backprop.runner import Runner, run_job
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import list_runs, open_run_directory, read_run

MODEL = ("model=tiny", "model.d_model=16", "model.n_heads=2", "model.d_ffn=24", "model.max_seq_len=8")
TRAINING = ("training=smoke", "training.log_every=1", "training.sample_length=4", "training.eval_every=1000")
SMALL = (*MODEL, *TRAINING, "tokenizer=byte", "tracking=none", "device=cpu", "device.threads=1", "dataset=text")
CONTRACT = {
    *("train/loss", "learning_rate", "gradient_norm", "tokens_seen", "flops", "tokens_per_second", "peak_share"),
    "nonfinite_steps",
}
VALIDATION = {
    f"validation/{name}" for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "unigram_loss", "bigram_loss")
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"the {('cat', 'dog', 'owl')[n * n % 3]} saw {n % 7} mice." for n in range(300)))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a command is given is where its outputs are."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """A run sets threads and log handlers of its process, and this process runs other tests too."""
    package, threads = logging.getLogger("manual_backprop"), torch.get_num_threads()
    handlers, propagate = list(package.handlers), package.propagate
    yield
    torch.set_num_threads(threads)
    package.handlers[:], package.propagate = handlers, propagate


def config_of(text: Path, *overrides: str) -> RunConfig:
    chosen = {override.partition("=")[0] for override in overrides}
    defaults = [override for override in SMALL if override.partition("=")[0] not in chosen]
    return check([*defaults, f"dataset.path='{text}'", *overrides]).jobs[0].config


def train(root: Path, text: Path, *overrides: str) -> Path:
    run_job(config_of(text, *overrides), root)
    return newest(root)


def resume(root: Path, *overrides: str) -> float:
    os.chdir(root)
    return run_job(check(overrides).jobs[0].config, root, Origin(overrides=tuple(overrides)))


def newest(root: Path) -> Path:
    return list_runs(root / "outputs")[-1]


def metric(run: Path, name: str) -> list[float]:
    log = load_training_log(run)
    series = (log.validation if name.startswith("validation/") else log.training)[name]
    return list(series.values)


def assert_same_tensors(one: Path, other: Path) -> None:
    """Every bit of parameters and optimizer state of two checkpoints."""
    first, second = load_checkpoint(one).tensors, load_checkpoint(other).tensors
    assert set(first) == set(second) == {"parameters", "optimizer"}
    for group, named in first.items():
        assert set(named) == set(second[group])
        for name, tensor in named.items():
            assert tensor.dtype == second[group][name].dtype
            assert torch.equal(tensor, second[group][name]), f"{group} {name}"


# What a run writes


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with evaluations and checkpoints at 4 and 8. Read it, or copy it."""
    root = tmp_path_factory.mktemp("finished")
    run_job(
        config_of(
            text,
            *("training.max_steps=8", "training.eval_every=4", "training.save_every=4", "model.dropout=0.1"),
            *("run_name=a first run", "seed=3", "tags.note=x"),
        ),
        root,
    )
    return newest(root)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """That run in a folder of its own."""
    shutil.copytree(finished.parent.parent, tmp_path / "outputs")
    return newest(tmp_path)


def test_run_directory(finished: Path) -> None:
    present = {path.name for path in finished.iterdir()} - {".lock"}
    assert present == {
        *("config.yaml", "run.json", "metrics.jsonl", "run.log", "samples", "checkpoints"),
        *("tokenizer.json", "tracking.json", "loss_curves.png"),
    }
    stamp, name, hexadecimal = finished.name[:15], finished.name[16:-7], finished.name[-6:]
    time.strptime(stamp, "%Y%m%d-%H%M%S")
    assert name == "a-first-run"
    int(hexadecimal, 16)
    run = read_run(finished)
    assert run["status"] == "FINISHED"
    assert run["run_id"] == finished.name
    assert run["owner"]["pid"] == os.getpid()
    assert run["command"]
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["step-000004.txt", "step-000008.txt"]
    assert all(path.read_text(encoding="utf-8").startswith("The ") for path in (finished / "samples").iterdir())
    assert (finished / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    log = (finished / "run.log").read_text()
    assert "25," in log or "parameters" in log
    assert "step 8: validation loss" in log


def test_config_of_a_run_makes_the_same_run(finished: Path) -> None:
    from omegaconf import OmegaConf

    from manual_backprop.validation import validate

    saved = OmegaConf.to_container(OmegaConf.load(finished / "config.yaml"))
    assert saved["model"]["d_model"] == 16
    assert saved["training"]["max_steps"] == 8
    assert validate(saved).to_dict() == saved


def test_metrics_of_a_run(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert "version" in lines[0]
    steps = [line for line in lines[1:] if "train/loss" in line["metrics"]]
    evaluations = [line for line in lines[1:] if "validation/loss" in line["metrics"]]
    assert len(steps) + len(evaluations) == len(lines) - 1
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in evaluations] == [4, 8]
    assert all(set(line["metrics"]) == CONTRACT for line in steps)
    assert all(set(line["metrics"]) == VALIDATION for line in evaluations)
    values = [line["metrics"] for line in steps]
    assert [value["tokens_seen"] for value in values] == [step * 4 * 2 * 8 for step in range(1, 9)]
    assert {value["nonfinite_steps"] for value in values} == {0}
    # 2 blocks of 4 D^2 + 2 D F, V = 257: the alphabet of DESIGN.md, 4
    flops = 6 * (2 * (4 * 16 * 16 + 2 * 16 * 24) + 257 * 16) + 12 * 2 * 16 * 8
    assert values[-1]["flops"] == 8 * 64 * flops
    assert all(value["tokens_per_second"] > 0 and 0 < value["peak_share"] < 1 for value in values)
    assert all(value["gradient_norm"] > 0 for value in values)
    # 5 % of 8 steps is no warm-up; the last step is at a tenth of the highest rate
    assert values[-1]["learning_rate"] == pytest.approx(3e-4)
    assert values[0]["learning_rate"] < 3e-3
    last = evaluations[-1]["metrics"]
    assert last["validation/perplexity"] == pytest.approx(math.exp(last["validation/loss"]))
    # a byte is a token, but for the end tokens
    assert last["validation/bits_per_byte"] == pytest.approx(last["validation/loss"] / math.log(2), rel=0.01)
    assert 0 < last["validation/bigram_loss"] < last["validation/unigram_loss"] < math.log(257)


def test_last_evaluation_is_over_the_whole_split(finished: Path, text: Path, tmp_path: Path) -> None:
    """And agrees with what the checkpoint's model says of the text itself."""
    from manual_backprop.data.batches import validation_batches
    from manual_backprop.data.corpus import prepare_corpus
    from manual_backprop.evaluation import Evaluator

    config = config_of(text)
    corpus = prepare_corpus(config.dataset, config.tokenizer, finished.parent.parent / "datasets")
    model = CustomTransformerWrapper.from_checkpoint(finished)
    evaluation = Evaluator(model).evaluate(validation_batches(corpus.validation, 8, 64))
    assert evaluation.tokens == len(corpus.validation) - 1
    assert metric(finished, "validation/loss")[-1] == pytest.approx(evaluation.loss, rel=1e-6)
    assert (
        read_metric_of_checkpoint(finished / "checkpoints" / "step-000008") == metric(finished, "validation/loss")[-1]
    )


def read_metric_of_checkpoint(path: Path) -> float | None:
    return load_checkpoint(path).metric


def test_checkpoints_of_a_run(finished: Path) -> None:
    checkpoints = CheckpointManager(finished / "checkpoints")
    assert [path.name for path in checkpoints.list()] == ["step-000004", "step-000008"]
    checkpoint = checkpoints.load()
    assert sorted(path.name for path in checkpoint.path.iterdir()) == [
        *("manifest.json", "optimizer.safetensors", "parameters.safetensors", "state.json", "tokenizer.json"),
    ]
    assert {"network", "config", "metrics_length", "threads", "dataset_digest", "seed"} <= set(checkpoint.state)
    names = {name for key in checkpoint.tensors["optimizer"] for name in [key.partition("/")[2]] if name}
    assert names == set(checkpoint.tensors["parameters"])
    assert checkpoint.tensors["optimizer"]["counts"].tolist() == [8, 0, 0, 0]


def test_wrapper_loads_a_run(finished: Path) -> None:
    model = CustomTransformerWrapper.from_checkpoint(finished)
    assert model.step == 8
    assert model.generate(torch.tensor([[84, 104, 101]]), max_length=4, seed=0).shape == (1, 7)


# The same numbers, whatever way they are computed


@pytest.mark.parametrize("architecture", ["gpt2", "vaswani"])
def test_custom_and_torch_learn_the_same(architecture: str, text: Path, tmp_path: Path) -> None:
    options = ("training.max_steps=6", "precision=fp64", "model.dropout=0.1", f"architecture={architecture}")
    options += ("training.label_smoothing=0.1", "training.eval_every=3")
    by_hand = train(tmp_path, text, *options)
    by_autograd = train(tmp_path, text, *options, "implementation=torch")
    for name in ("train/loss", "gradient_norm", "validation/loss"):
        assert metric(by_hand, name) == pytest.approx(metric(by_autograd, name), rel=1e-9), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulation_is_a_larger_batch(optimizer: str, text: Path, tmp_path: Path) -> None:
    """The same windows, the same dropout masks, the same update."""
    options = ("training.max_steps=5", "precision=fp64", "model.dropout=0.2", f"optimizer={optimizer}")
    shapes = ((8, 1), (1, 8), (2, 4))
    runs = [
        train(tmp_path, text, *options, f"training.batch_size={b}", f"training.gradient_accumulation_steps={a}")
        for b, a in shapes
    ]
    for other in runs[1:]:
        assert metric(other, "train/loss") == pytest.approx(metric(runs[0], "train/loss"), rel=1e-10)
        assert metric(other, "gradient_norm") == pytest.approx(metric(runs[0], "gradient_norm"), rel=1e-9)


def test_same_seed_same_run(finished: Path, text: Path, tmp_path: Path) -> None:
    options = ("training.max_steps=8", "training.eval_every=4", "training.save_every=4", "model.dropout=0.1")
    again, other = train(tmp_path, text, *options, "seed=3"), train(tmp_path, text, *options, "seed=4")
    assert metric(again, "train/loss") == metric(finished, "train/loss")
    assert metric(other, "train/loss") != metric(finished, "train/loss")
    assert_same_tensors(again / "checkpoints/step-000008", finished / "checkpoints/step-000008")
    for name in ("step-000004.txt", "step-000008.txt"):
        assert (again / "samples" / name).read_text() == (finished / "samples" / name).read_text()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("precision", "schedule", "architecture"),
    [
        ("fp64", "cosine", "gpt2"),
        ("fp32", "linear", "vaswani"),
        ("bf16", "constant", "vaswani"),
        ("bf16_mixed", "linear", "gpt2"),
    ],
)
def test_options_run(
    optimizer: str, precision: str, schedule: str, architecture: str, text: Path, tmp_path: Path
) -> None:
    options = (f"optimizer={optimizer}", f"precision={precision}", f"schedule={schedule}")
    run = train(tmp_path, text, *options, f"architecture={architecture}", "training.max_steps=2")
    losses = metric(run, "train/loss")
    assert len(losses) == 2
    assert all(math.log(257) / 2 < loss < 2 * math.log(257) for loss in losses)
    assert read_run(run)["status"] == "FINISHED"


# Resuming


@pytest.mark.parametrize(
    "options",
    [
        ("precision=fp32", "optimizer=adamw"),
        ("precision=bf16", "optimizer=adamw", "architecture=vaswani"),
        ("precision=bf16_mixed", "optimizer=adamw", "training.label_smoothing=0.1"),
        ("precision=fp32", "optimizer=sgd", "schedule=linear", "training.gradient_accumulation_steps=3"),
        ("precision=bf16", "optimizer=sgd"),
        ("precision=fp32", "implementation=torch"),
    ],
    ids=" ".join,
)
def test_exact_resume(options: Sequence[str], text: Path, tmp_path: Path) -> None:
    """From the checkpoint in the middle, the second half is again what it was, bit by bit, in all that was logged."""
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


def stop_after(root: Path, steps: int, number: int) -> threading.Thread:
    """Sends this process a signal when a run has logged so many steps."""

    def watch() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            runs = list_runs(root / "outputs")
            with suppress(FileNotFoundError):
                if runs and (runs[-1] / "metrics.jsonl").read_bytes().count(b"\n") > steps:
                    os.kill(os.getpid(), number)
                    return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_is_exact(number: int, text: Path, tmp_path: Path) -> None:
    options = ("training.max_steps=300", "model.dropout=0.1", "training.save_every=1000", "training.batch_size=1")
    whole = train(tmp_path / "whole", text, *options)
    (tmp_path / "stopped").mkdir()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    watcher = stop_after(tmp_path / "stopped", 5, number)
    with pytest.raises(Interrupted, match=r"saved .*step-\d{6} after \d+ steps; go on with resume=") as caught:
        train(tmp_path / "stopped", text, *options)
    watcher.join()
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    run = newest(tmp_path / "stopped")
    assert read_run(run)["status"] == "KILLED"
    (path,) = CheckpointManager(run / "checkpoints").list()
    assert 5 <= load_checkpoint(path).step < 300

    resume(tmp_path / "stopped", "resume=last")

    assert read_run(run)["status"] == "FINISHED"
    assert metric(run, "train/loss") == metric(whole, "train/loss")
    assert_same_tensors(run / "checkpoints/step-000300", whole / "checkpoints/step-000300")


def test_a_signal_before_the_first_step(text: Path, tmp_path: Path) -> None:
    """While things are built, a signal ends the program where it is; nothing claims to run afterwards."""
    config = config_of(text)
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM))
    with Interruption() as interruption:
        timer.start()
        with pytest.raises(Interrupted, match="SIGTERM: nothing was trained yet") as caught:
            [Runner(config, tmp_path / "outputs", interruption) for _ in range(100)]
    timer.join()
    assert caught.value.exit_code == 143
    assert list_runs(tmp_path / "outputs") == []


def test_a_signal_while_the_run_directory_is_made(text: Path, tmp_path: Path) -> None:
    with Interruption() as interruption:
        runner = Runner(config_of(text), tmp_path / "outputs", interruption)
        runner.corpus.tokenizer.save = lambda directory: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore
        with pytest.raises(Interrupted):
            runner.run()
    assert read_run(newest(tmp_path))["status"] == "KILLED"
    open_run_directory(newest(tmp_path), 0).release()  # nobody owns it any more


def test_resume_takes_only_what_the_command_line_names(copy: Path, tmp_path: Path) -> None:
    """A run of other sizes than the defaults needs no repetition of them; training.max_steps makes it longer."""
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


def test_resume_with_another_learning_rate(copy: Path, tmp_path: Path) -> None:
    resume(tmp_path, "resume=last", "training.max_steps=9", "schedule=constant", "optimizer.learning_rate=1e-5")
    assert metric(copy, "learning_rate")[-1] == 1e-5


def test_resume_with_another_learning_rate_of_the_model(copy: Path, tmp_path: Path) -> None:
    """adamw takes model.learning_rate, also in a run whose config.yaml names both."""
    resume(tmp_path, "resume=last", "training.max_steps=9", "schedule=constant", "model.learning_rate=1e-5")
    assert metric(copy, "learning_rate")[-1] == 1e-5


@pytest.mark.parametrize("options", [(), ("training.max_steps=null", "training.num_epochs=0.02")])
def test_the_next_command_works_as_it_is_printed(
    options: Sequence[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train(tmp_path, text, "training.max_steps=2", *options) if not options else train(tmp_path, text, *options)
    steps = len(metric(run, "train/loss"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "resume=" in line]
    command = line.split()
    assert command[:3] == ["python", "-m", "manual_backprop.run"]
    resume(tmp_path, *command[3:])
    assert len(metric(run, "train/loss")) == 2 * steps


@pytest.mark.parametrize("which", ["last", "best", "name", "hex", "run", "checkpoint"])
def test_ways_to_name_a_run(which: str, copy: Path, tmp_path: Path) -> None:
    checkpoint = copy / "checkpoints/step-000008"
    names = {"name": copy.name, "hex": copy.name[-6:], "run": str(copy), "checkpoint": str(checkpoint)}
    resume(tmp_path, f"resume='{names.get(which, which)}'", "training.max_steps=9")
    assert list(load_training_log(copy).training["train/loss"].steps) == [*range(1, 10)]


def test_finished_run_has_nothing_to_resume(copy: Path, tmp_path: Path) -> None:
    before = read_run(copy)
    with pytest.raises(InputError, match=r"has made 8 steps already and training.max_steps is 8: give a larger"):
        resume(tmp_path, "resume=last")
    assert read_run(copy) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=4", "seed is 3 in the checkpoint and 4 here"),
        ("model.d_model=32", "d_model is 16 in the checkpoint and 32 here"),
        ("training.batch_size=8", "windows_per_step is 8 in the checkpoint and 16 here"),
        ("precision=bf16", "precision is fp32 in the checkpoint and bf16 here"),
        ("optimizer=sgd", "optimizer is adamw in the checkpoint and sgd here"),
        ("tokenizer=char", "tokenizer_digest is .* in the checkpoint"),
        ("architecture=vaswani", "architecture is gpt2 in the checkpoint and vaswani here"),
    ],
)
def test_resume_refuses_another_run(override: str, words: str, copy: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=words):
        resume(tmp_path, "resume=last", "training.max_steps=9", override)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run in .* has a sound checkpoint"):
        resume(tmp_path, "resume=last")
    with pytest.raises(InputError, match="there is no run 'elephant'"):
        resume(tmp_path, "resume=elephant")
    assert not (tmp_path / "outputs/runs").exists()


def test_resume_of_a_damaged_checkpoint(copy: Path, tmp_path: Path) -> None:
    """It is named, and so is the one to use instead; `last` means a sound one only of another run."""
    file = copy / "checkpoints/step-000008/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors is damaged.*step-000004"):
        resume(tmp_path, f"resume={copy.name}", "training.max_steps=9")


def test_resume_of_a_run_in_use(copy: Path, tmp_path: Path) -> None:
    owner = open_run_directory(copy, 8)
    try:
        with pytest.raises(RunInUseError, match=f"in use by process {os.getpid()}"):
            resume(tmp_path, "resume=last", "training.max_steps=9")
    finally:
        owner.release()


# Steps that are not finite

DIVERGING = ("optimizer.learning_rate=1e30", "schedule=constant", "schedule.warmup_ratio=0", "training.max_steps=20")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
def test_a_diverging_run_raises(precision: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"not finite in 1 of the last steps, up to step 2\. .*learning_rate"):
        train(tmp_path, text, *DIVERGING, f"precision={precision}")
    run = newest(tmp_path)
    assert read_run(run)["status"] == "FAILED"
    assert "NotFiniteError" in (run / "traceback.txt").read_text()
    assert "NotFiniteError" in (run / "run.log").read_text()
    assert CheckpointManager(run / "checkpoints").list() == []


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_diverging_run_that_skips_ends_at_its_limit(optimizer: str, text: Path, tmp_path: Path) -> None:
    options = ("training.non_finite=skip", "training.non_finite_limit=4", "training.save_every=1000")
    with pytest.raises(NotFiniteError, match=r"4 steps in a row, up to step 5, .*non_finite_limit=4"):
        train(tmp_path, text, *DIVERGING, *options, f"optimizer={optimizer}")
    assert metric(newest(tmp_path), "nonfinite_steps") == [0, 1, 2, 3]
    assert read_run(newest(tmp_path))["status"] == "FAILED"


@pytest.mark.parametrize(
    "options", [("training.eval_every=1",), ("training.max_steps=1", "training.sample_prompts=[]")]
)
def test_a_diverged_model_is_not_called_finished(options: Sequence[str], text: Path, tmp_path: Path) -> None:
    """Its last step was finite; what the update made of the parameters shows only when they are used."""
    with pytest.raises(NotFiniteError, match="validation loss after step 1 is nan"):
        train(tmp_path, text, *DIVERGING, *options)


def stumbling(runner: Runner, steps: set[int], gradient: bool) -> None:
    """In these steps the loss, or one gradient, is not finite."""
    healthy = runner.network.loss_and_gradients

    def loss_and_gradients(batch: Any, *, denominator: int, step: int) -> Tensor:
        loss = healthy(batch, denominator=denominator, step=step)
        if step in steps and gradient:
            runner.network.gradients["blocks.0.attention.value.bias"][0] = math.nan
        return loss * math.inf if step in steps and not gradient else loss

    runner.network.loss_and_gradients = loss_and_gradients  # type: ignore[method-assign]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("gradient", [False, True])
def test_skipped_steps_update_nothing(optimizer: str, gradient: bool, text: Path, tmp_path: Path) -> None:
    """Parameters and moments keep every bit, the steps are counted, and the run goes on."""
    options = ("training.max_steps=8", "training.save_every=1", "training.keep_checkpoints=100")
    config = config_of(text, *options, "training.non_finite=skip", f"optimizer={optimizer}")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
        stumbling(runner, {3, 4, 6}, gradient)
        runner.run()
    run = newest(tmp_path)
    assert metric(run, "nonfinite_steps") == [0, 0, 1, 2, 2, 3, 3, 3]
    states = {step: load_checkpoint(run / f"checkpoints/step-{step:06d}").tensors for step in range(1, 9)}
    for step in range(2, 9):
        for group, named in states[step].items():
            changed = [name for name, value in named.items() if not torch.equal(value, states[step - 1][group][name])]
            assert bool(set(changed) - {"counts"}) == (step not in {3, 4, 6}), (step, group)
    assert states[8]["optimizer"]["counts"].tolist() == [5, 3, 0, 0]


def test_skipped_steps_are_judged_once(text: Path, tmp_path: Path) -> None:
    """A resume with a lower limit does not end at steps that were skipped, and judged, before it."""
    config = config_of(text, "training.max_steps=4", "training.non_finite=skip", "training.non_finite_limit=3")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
        stumbling(runner, {2, 3}, gradient=True)
        runner.run()
    resume(tmp_path, "resume=last", "training.max_steps=6", "training.non_finite_limit=2")
    assert read_run(newest(tmp_path))["status"] == "FINISHED"


def test_resume_checks_against_the_runs_own_config(text: Path, tmp_path: Path) -> None:
    """Keys that only its optimizer has, and the length that it counts in."""
    train(tmp_path, text, "optimizer=sgd", "training.max_steps=null", "training.num_epochs=0.1")
    config = check(["resume=last", "optimizer.momentum=0.8", "training.num_epochs=0.3"]).jobs[0].config
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.8)
    assert (config.training.num_epochs, config.training.max_steps) == (0.3, None)


def test_raise_counts_steps_between_two_logs(text: Path, tmp_path: Path) -> None:
    config = config_of(text, "training.max_steps=8", "training.log_every=4", "training.save_every=1000")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
        stumbling(runner, {2}, gradient=True)
        with pytest.raises(NotFiniteError, match="in 1 of the last steps, up to step 4"):
            runner.run()


# Words and limits of the configuration


def test_epochs(text: Path, tmp_path: Path) -> None:
    options = (
        "training.max_steps=null",
        "training.num_epochs=2.5",
        "training.eval_every=epoch",
        "training.batch_size=40",
    )
    run = train(tmp_path, text, *options, "training.save_every=epoch", "training.log_every=epoch", "model.d_ffn=8")
    log = load_training_log(run)
    config = config_of(text)
    from manual_backprop.data.batches import Windows
    from manual_backprop.data.corpus import prepare_corpus

    corpus = prepare_corpus(config.dataset, config.tokenizer, tmp_path / "outputs/datasets")
    windows = Windows(corpus.train, 8, 0).windows_per_epoch
    epoch, end = round(windows / 80), math.ceil(2.5 * windows / 80)
    assert epoch > 3
    assert list(log.training["train/loss"].steps) == list(log.validation["validation/loss"].steps)
    assert list(log.validation["validation/loss"].steps) == [epoch, 2 * epoch, end]
    assert [path.name for path in CheckpointManager(run / "checkpoints").list()][-1] == f"step-{end:06d}"


def test_larger_vocabulary(text: Path, tmp_path: Path) -> None:
    """Tokens that the tokenizer does not have may be sampled: they have no text, and nothing breaks."""
    options = ("model.vocab_size=2000", "training.sample_length=30", "training.max_steps=2")
    run = train(tmp_path, text, *options)
    assert load_checkpoint(run / "checkpoints/step-000002").tensors["parameters"]["token_embedding.weight"].shape == (
        2000,
        16,
    )


def test_smaller_vocabulary(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size=100: .*257"):
        train(tmp_path, text, "model.vocab_size=100")
    with pytest.raises(ConfigError, match=r"model.vocab_size=5: the tokenizer has \d+ tokens; give at least"):
        train(tmp_path, text, "model.vocab_size=5", "tokenizer=char")  # known only from the text
    assert not (tmp_path / "outputs/runs").exists()


def test_text_that_is_too_short(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Only a few words.")
    with pytest.raises(
        InputError, match=r"validation split has \d+ tokens, and one window needs 9 .*more text"
    ) as caught:
        train(tmp_path, short)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "outputs/runs").exists()


def test_char_tokenizer_and_prompts_outside_its_alphabet(text: Path, tmp_path: Path) -> None:
    options = ("tokenizer=char", "training.sample_prompts=['ZEBRA','the ']", "training.max_steps=1")
    run = train(tmp_path, text, *options)
    first, second = (run / "samples/step-000001.txt").read_text().split("\n\n----\n\n")
    assert "ZEBRA" not in first
    assert len(first) == 8 + 4
    assert second.startswith("the ")
    assert "ZEBRA" in (run / "run.log").read_text() or read_run(run)["status"] == "FINISHED"


def test_prompts_of_any_length(text: Path, tmp_path: Path) -> None:
    """Longer than a sequence; and none at all."""
    long = "the cat saw 3 mice and went away"
    run = train(tmp_path, text, f"training.sample_prompts=['{long}']", "training.max_steps=1")
    assert (run / "samples/step-000001.txt").read_text().startswith(long)
    train(tmp_path, text, "training.sample_prompts=[]", "training.max_steps=1")
    train(tmp_path, text, "training.sample_length=0", "training.max_steps=1")


def test_overfit_batches(text: Path, tmp_path: Path) -> None:
    """The same N batches again and again: with next to no learning, their losses repeat; with it, they are learned."""
    options = ("training.max_steps=6", "precision=fp64", "optimizer.learning_rate=1e-30")
    losses = metric(train(tmp_path, text, *options, "training.overfit_batches=2"), "train/loss")
    assert losses[0] == losses[2] == losses[4] != losses[1] == losses[3] == losses[5]
    assert len(set(metric(train(tmp_path, text, *options), "train/loss"))) == 6
    learned = train(
        tmp_path, text, "training.max_steps=100", "training.overfit_batches=1", "optimizer.learning_rate=1e-2"
    )
    losses = metric(learned, "train/loss")
    assert losses[-1] < 0.3 * losses[0]


def test_keep_checkpoints(text: Path, tmp_path: Path) -> None:
    options = ("training.max_steps=6", "training.save_every=1", "training.keep_checkpoints=2")
    run = train(tmp_path, text, *options)
    assert [path.name for path in CheckpointManager(run / "checkpoints").list()] == ["step-000005", "step-000006"]


# Storage


def test_outputs_that_cannot_be_written(text: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file, not a folder")
    with pytest.raises(StorageError) as caught:
        train(tmp_path, text)
    assert caught.value.exit_code == 4
    (tmp_path / "outputs").unlink()
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/runs").write_text("a file, not a folder")
    with pytest.raises(StorageError):
        train(tmp_path, text)


@pytest.mark.parametrize("name", ["samples", "loss_curves.png"])
def test_a_run_directory_that_cannot_be_written_any_more(name: str, text: Path, tmp_path: Path) -> None:
    config = config_of(text, "training.max_steps=2")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
        healthy = runner._optimizer_step

        def spoil() -> Any:
            place = newest(tmp_path) / name
            if name == "samples":
                if place.is_dir():
                    place.rmdir()
                    place.write_text("a file, not a folder")
            else:
                place.mkdir(exist_ok=True)
            return healthy()

        runner._optimizer_step = spoil  # type: ignore[method-assign]
        with pytest.raises(StorageError, match=name):
            runner.run()
    assert read_run(newest(tmp_path))["status"] == "FAILED"


# MLflow


def test_a_run_in_mlflow(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store beside outputs has the metrics, the parameters, the tags and the files of the contract."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    options = ("tracking=mlflow", "training.max_steps=4", "training.eval_every=2", "training.save_every=2")
    run = train(tmp_path, text, *options, "tags.note=first")

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "manual_backprop"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert set(found.data.metrics) >= CONTRACT | VALIDATION
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == list(enumerate(metric(run, "train/loss"), start=1))
    assert found.data.params["model.d_model"] == "16"
    assert found.data.params["optimizer.name"] == "adamw"
    tags = {"git_commit", "git_dirty", "device", "tokenizer_digest", "dataset_digest", "run_directory", "note"}
    assert tags <= set(found.data.tags)
    assert found.data.tags["run_directory"] == str(run)
    files = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "tokenizer.json", "samples", "loss_curves.png", "checkpoints"} <= files

    resume(tmp_path, "resume=last", "training.max_steps=6")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 4, 5, 6]
    assert found.info.status == "FINISHED"
