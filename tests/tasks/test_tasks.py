"""The seam between a run and what it learns: a run trains a task that has no text, and knows it by the seam alone."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from run_tools import config_of, metric, newest, resume, train

import manual_backprop
from manual_backprop.checkpoints.checkpoint import _manifest_of, load_checkpoint
from manual_backprop.common.batch import Batch
from manual_backprop.common.errors import ConfigError
from manual_backprop.common.interruption import Interruption
from manual_backprop.config.schema import CustomTransformerConfig, RunConfig, TaskConfig
from manual_backprop.config.validation import validate
from manual_backprop.data.tokens.order import Order
from manual_backprop.models.implementations import IMPLEMENTATIONS
from manual_backprop.models.wrappers.language_model import CustomTransformerWrapper, LanguageModel, build_model
from manual_backprop.tasks import TASKS, Evaluated, Task
from manual_backprop.tracking.run_directory import read_run
from manual_backprop.training.command_line import check
from manual_backprop.training.runner import Runner

pytestmark = pytest.mark.usefixtures("here")
V, ROWS = 11, 4


def rows_of(first: int, count: int, length: int) -> Batch:
    """Each row counts up from its own number, modulo V."""
    numbers = (torch.arange(first, first + count)[:, None] + torch.arange(length + 1)) % V
    return Batch(numbers[:, :-1].contiguous(), numbers[:, 1:].contiguous())


class CountingOrder(Order):
    def __init__(self, length: int):
        self.length, self.tokens_per_step = length, ROWS * length

    def steps(self, epochs: float) -> float:
        return 3 * epochs

    def tokens_before(self, step: int) -> int:
        return step * self.tokens_per_step

    def batches(self, step: int, device: torch.device | str = "cpu") -> tuple[int, Iterator[Batch]]:
        return self.tokens_per_step, iter([rows_of(step * ROWS, ROWS, self.length)])


class Counting(Task):
    """Counting modulo V. Its best checkpoint is the one with the fewest wrong numbers."""

    best_metric = "validation/error"
    files = ("answers.txt",)

    def __init__(self, config: RunConfig):
        self.config, self.digests = config, {"dataset_digest": f"counting modulo {V}"}

    @classmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        return cls(config)

    @property
    def network_config(self) -> CustomTransformerConfig:
        return self.config.network_config(V)

    def build_model(self) -> LanguageModel:
        return build_model(self.config.implementation.name, self.network_config)

    def order(self, repeat: int | None = None) -> Order:
        return CountingOrder(self.config.model.max_seq_len)

    def check(self) -> None: ...

    def evaluate(self, model: LanguageModel, limit: int | None = None) -> Evaluated:
        batch = self.example(model.network.device)
        error = 1 - float((model.network.predict(batch.tokens).argmax(-1) == batch.targets).double().mean())
        metrics = {"validation/loss": 9.0, "validation/error": error}
        return Evaluated(metrics, f"{error:.0%} wrong", (("wrong numbers", f"{error:.0%}"),))

    def predictions(self, model: LanguageModel) -> list[str]:
        return [self.text(self.example(model.network.device), 3)]

    def example(self, device: torch.device) -> Batch:
        return rows_of(5, 1, self.config.model.max_seq_len)

    def text(self, batch: Batch, positions: int) -> str:
        return " ".join(map(str, batch.tokens[0, :positions].tolist()))

    about = f"numbers modulo {V}"
    baselines = "guessing: 91% wrong"
    notes = ("there is no text",)
    profile: Mapping[str, int] = {"numbers": V}
    data_tags: Mapping[str, str] = {"kind": "synthetic"}

    def save(self, directory: Path) -> None:
        (directory / "answers.txt").write_text("0 1 2")

    def refuse_other_examples(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        if state["dataset_digest"] != self.digests["dataset_digest"]:
            raise ConfigError([f"{checkpoint} counted otherwise"])


@pytest.mark.slow
def test_a_run_of_a_task_without_text(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, measured, saved, pictured, resumed and summarized by the seam; no corpus is prepared for it."""
    monkeypatch.setitem(TASKS, "language_model", Counting)
    options = ("training.max_steps=60", "training.eval_every=30", "training.save_every=30", "training.inspect_every=30")
    run = train(tmp_path, text, *options, "optimizer.learning_rate=1e-2")
    assert not (tmp_path / "outputs/datasets").exists()
    errors = metric(run, "validation/error")
    assert errors[-1] < 0.5
    assert metric(run, "train/loss")[-1] < 1 < metric(run, "train/loss")[0]
    saved = load_checkpoint(run / "checkpoints/step-000060")
    assert saved.metric == errors[-1] != 9
    assert (saved.path / "answers.txt").read_text() == "0 1 2"
    assert saved.state["dataset_digest"] == "counting modulo 11"
    assert "tokenizer_digest" not in saved.state
    assert (run / "samples/step-000060.txt").read_text() == "5 6 7\n"
    assert (run / "inspection/attention.png").is_file()
    log, printed = (run / "run.log").read_text(), capsys.readouterr().out
    for words in ("numbers modulo 11", "guessing: 91% wrong", "there is no text", "step 60: "):
        assert words in log
    assert "wrong numbers" in printed
    assert resume(tmp_path, f"resume={run}", "training.max_steps=70") == metric(run, "validation/error")[-1]
    assert read_run(newest(tmp_path))["status"] == "FINISHED"
    monkeypatch.setattr("test_tasks.V", 12)
    with pytest.raises(ConfigError, match="step-000070 counted otherwise"):
        resume(tmp_path, f"resume={run}", "training.max_steps=80")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_model_stands_behind_the_wrapper(implementation: str, text: Path, tmp_path: Path) -> None:
    """Its step is the Runner's, so that whoever goes on with it has the next dropout masks."""
    config = config_of(text, f"implementation={implementation}", "kernels.compile=never")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
    assert isinstance(runner.model, LanguageModel)
    assert type(runner.model.network) is IMPLEMENTATIONS[implementation]
    assert isinstance(runner.model, CustomTransformerWrapper) == (implementation == "custom")
    before = runner.model.network.export_parameters()
    loss, rate, norm = runner.train_step()
    assert runner.step == runner.model.step == 1
    assert rate == runner.learning_rate(1)
    assert loss.isfinite()
    assert norm > 0
    after = runner.model.network.export_parameters()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_names_of_tasks_are_those_of_the_config() -> None:
    assert list(TASKS) == TaskConfig.__dataclass_fields__["name"].metadata["rule"].choices


def test_a_config_from_before_there_were_tasks(text: Path, copy: Path, tmp_path: Path) -> None:
    """Means the default, for reading, resuming and comparing."""
    from manual_backprop.compare import compare
    from manual_backprop.tracking import load_training_log

    mapping = config_of(text).to_dict()
    task = mapping.pop("task")
    assert validate(mapping).task == TaskConfig("language_model") == TaskConfig(**task)
    with pytest.raises(ConfigError, match="model: is missing"):
        validate({name: group for name, group in mapping.items() if name != "model"})
    log = load_training_log(copy)
    older = load_training_log(copy)
    del older.config["task"]
    assert compare([log, older])[1].settings == {}
    without_task(copy)
    assert check([f"resume={copy}", "training.max_steps=9"]).jobs[0].config.task.name == "language_model"
    resume(tmp_path, f"resume={copy}", "training.max_steps=9")
    assert set(read_run(copy)["resumes"][-1]["changed"]) == {"training.max_steps"}


def without_task(run: Path) -> None:
    """The config of a run and of its checkpoints as an older version wrote them."""
    config = run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("task:\n  name: language_model\n", ""))
    assert config.read_text() != before
    for state in run.glob("checkpoints/*/state.json"):
        content = json.loads(state.read_text())
        del content["state"]["config"]["task"]
        state.write_text(json.dumps(content, indent=1) + "\n")
        (state.parent / "manifest.json").unlink()
        (state.parent / "manifest.json").write_bytes(_manifest_of(state.parent))


@pytest.mark.parametrize("name", ["runner", "report", "run_state"])
def test_a_run_knows_no_task_by_name(name: str) -> None:
    """Nothing of texts, tokenizers or counting models; and nobody but the Runner's own module knows a Runner."""
    tree = ast.parse((Path(manual_backprop.__file__).parent / "training" / f"{name}.py").read_text())
    imported = {(node.module or "").rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not imported & {"corpus", "evaluation", "tokenizer", "runner"}
    assert not names & {"corpus", "tokenizer", "unigram_loss", "bigram_loss", "sample_prompts"}
