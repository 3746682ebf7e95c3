"""What runs write and compute, in this process. How they resume: test_resume.py; how they end: test_run_ends.py."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import assert_same_tensors, config_of, metric, resume, train

from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint
from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.common.interruption import Interruption
from manual_backprop.common.processes import Processes, acting_as
from manual_backprop.models.wrappers.language_model import CustomTransformerWrapper
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import read_run
from manual_backprop.training import runner as runner_module
from manual_backprop.training.runner import Runner

pytestmark = pytest.mark.usefixtures("here")

CONTRACT = {
    *("train/loss", "learning_rate", "gradient_norm", "tokens_seen", "flops", "tokens_per_second", "peak_share"),
    *("nonfinite_steps", "epoch"),
}
VALIDATION = {
    f"validation/{name}" for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "unigram_loss", "bigram_loss")
}


# What a run writes


def test_run_directory(finished: Path) -> None:
    present = {path.name for path in finished.iterdir()} - {".lock", "source.diff"}
    assert present == {
        *("config.yaml", "run.json", "metrics.jsonl", "run.log", "samples", "checkpoints"),
        *("tokenizer.json", "tracking.json", "training_progress.png", "packages.txt", "gradient_check.txt"),
    }
    stamp, name, hexadecimal = finished.name[:15], finished.name[16:-7], finished.name[-6:]
    time.strptime(stamp, "%Y%m%d-%H%M%S")
    assert name == "a-first-run"
    int(hexadecimal, 16)
    run = read_run(finished)
    assert run["status"] == "FINISHED"
    assert run["run_id"] == finished.name
    assert run["owner"]["pid"] == os.getpid()
    assert run["command"] == shlex.join(sys.argv)
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["step-000004.txt", "step-000008.txt"]
    assert all(path.read_text(encoding="utf-8").startswith("The ") for path in (finished / "samples").iterdir())
    assert (finished / "training_progress.png").read_bytes().startswith(b"\x89PNG")
    log = (finished / "run.log").read_text()
    assert f"{CustomTransformerWrapper.from_checkpoint(finished).count_parameters():,} parameters" in log
    assert "step 8: validation loss" in log


def test_config_of_a_run_makes_the_same_run(finished: Path) -> None:
    from omegaconf import OmegaConf

    from manual_backprop.config.validation import validate

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
    assert all({name for name in line["metrics"] if not name.startswith("system/")} == CONTRACT for line in steps)
    assert all(set(line["metrics"]) == VALIDATION for line in evaluations)
    values = [line["metrics"] for line in steps]
    assert [value["tokens_seen"] for value in values] == [step * 4 * 2 * 8 for step in range(1, 9)]
    assert {value["nonfinite_steps"] for value in values} == {0}
    # 2 blocks of 4 D^2 + 2 D F, V = 257: the letters of docs/glossary.md
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


def test_peak_rate_is_measured_before_mlflow_starts(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's process has a core for seconds while it starts: a rate measured then was half of what it should be."""
    order = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any) -> Any:
            order.append(name)
            return function(*given)

        return wrapper

    for name in ("matrix_product_rate", "open_tracker"):
        monkeypatch.setattr(runner_module, name, noted(name, getattr(runner_module, name)))
    train(tmp_path, text, "training.max_steps=1")
    assert order == ["matrix_product_rate", "open_tracker"]


def test_peak_rate_is_that_of_all_processes(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and tokens are those of all processes, so the share would be above 1 with the rate of one."""

    class Three(Processes):
        size = 3

        def gathered(self, value: float) -> list[float]:
            return [value, 2.0, 3.0]

    monkeypatch.setattr(runner_module, "matrix_product_rate", lambda dtype, device: 1.0)
    with Interruption() as interruption, acting_as(Three()):
        assert Runner(config_of(text), tmp_path / "outputs", interruption).facts.peak_rate == 6


def test_last_evaluation_is_over_the_whole_split(finished: Path, text: Path, tmp_path: Path) -> None:
    """And agrees with what the checkpoint's model says of the text itself."""
    from manual_backprop.data.tokens.batches import validation_batches
    from manual_backprop.data.tokens.corpus import prepare_corpus
    from manual_backprop.tasks.evaluation import Evaluator

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
    assert {
        "network",
        "config",
        "metrics_length",
        "improvement",
        "made_with",
        "dataset_digest",
        "tokenizer_digest",
    } == set(checkpoint.state)
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


def test_saves_by_the_clock_change_nothing(text: Path, tmp_path: Path) -> None:
    """A save after every step, since a thousandth of a second has passed; none but the last without it."""
    options = ("training.max_steps=6", "training.save_every=1000", "model.dropout=0.1", "training.eval_every=3")
    seldom = train(tmp_path, text, *options, "training.log_every=2")
    often = train(
        tmp_path, text, *options, "training.save_every_minutes=1e-5", "training.keep_checkpoints=9",
        "training.log_every=2",
    )  # fmt: skip
    assert [path.name for path in CheckpointManager(seldom / "checkpoints").list()] == ["step-000006"]
    assert len(CheckpointManager(often / "checkpoints").list()) == 6
    assert_same_tensors(seldom / "checkpoints/step-000006", often / "checkpoints/step-000006")
    for name in ("train/loss", "gradient_norm", "validation/loss"):
        assert metric(seldom, name) == metric(often, name)
    resume(tmp_path, f"resume={often / 'checkpoints/step-000003'}", "training.save_every_minutes=null")
    assert_same_tensors(seldom / "checkpoints/step-000006", often / "checkpoints/step-000006")
    assert metric(seldom, "train/loss") == metric(often, "train/loss")


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
    from manual_backprop.data.tokens.batches import Windows
    from manual_backprop.data.tokens.corpus import prepare_corpus

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
        InputError, match=r"validation split has \d+ tokens, but one window needs 9 .*more text"
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
    assert {"config.yaml", "tokenizer.json", "samples", "training_progress.png", "checkpoints"} <= files

    resume(tmp_path, "resume=last", "training.max_steps=6")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 4, 5, 6]
    assert found.info.status == "FINISHED"
