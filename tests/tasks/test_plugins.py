"""A task, an objective and an activation from a folder outside of the package: named on the command line, and by that
alone; trained, resumed and evaluated."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_tools import metric, newest

from manual_backprop import evaluate, run, summary
from manual_backprop.checkpoints.checkpoint import load_checkpoint
from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.config import network, plugins, schema, task_rules, validation
from manual_backprop.models import autograd
from manual_backprop.models.extensions import register_activation
from manual_backprop.models.implementations import build_network
from manual_backprop.ops import activations, loss
from manual_backprop.study.gradient_check.network_case import draw_batch
from manual_backprop.tasks import TASKS, SequenceTask, register_task

COUNTING = ("task=counting", "task.modulus=9", "architecture.activation=squared_relu", "model=tiny", "model.d_model=16")
COUNTING += ("model.n_heads=2", "model.max_seq_len=8", "training=smoke", "training.save_every=30", "tracking=none")
COUNTING += ("training.log_every=1",)
COUNTING += ("training.max_steps=30", "training.eval_every=30", "device=cpu", "device.threads=1")
COUNTING += ("kernels.compile=never",)


@pytest.fixture
def plugin(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The plugin's file; afterwards nothing is registered that was not before."""
    lists = (network.ACTIVATIONS, network.HEAD_LOSSES, schema.TASK_NAMES)
    tables: tuple[Any, ...] = (
        plugins._loaded,
        schema.DEFAULT_NETWORK,
        task_rules.DATASETS,
        TASKS,
        network.REGRESSION_LOSSES,
    )
    tables += (autograd.ACTIVATIONS, autograd.OBJECTIVES, activations.ELEMENTWISE, loss.OBJECTIVES)
    before, task = [copy.copy(one) for one in (*lists, *tables)], schema.RunConfig.__annotations__["task"]
    monkeypatch.setattr(sys, "argv", ["run"])
    folder = tmp_path / "mine"
    folder.mkdir()
    yield Path(shutil.copy(Path(__file__).with_name("counting_plugin.py"), folder / "my_counting.py"))
    for now, then in zip((*lists, *tables), before, strict=True):
        now.clear()
        now.extend(then) if isinstance(now, list) else now.update(then)
    schema.RunConfig.__annotations__["task"] = task
    validation.groups.cache_clear()
    validation.keys.cache_clear()
    sys.modules.pop("my_counting", None)


def test_a_task_an_objective_and_an_activation_of_ones_own(
    plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        run.main(list(COUNTING))
    assert "task=counting: must be one of language_model" in str(refused.value)
    assert "architecture.activation=squared_relu: must be one of" in str(refused.value)
    given = ["--plugin", str(plugin)]
    run.main([*given, *COUNTING])
    path = newest(tmp_path)
    printed = capsys.readouterr().out
    assert "numbers modulo 9" in printed
    assert "gradient check: passed" in printed, printed
    assert f"run --plugin {plugin} resume={path.name}" in printed
    assert metric(path, "validation/error")[-1] == 0
    assert metric(path, "train/loss")[-1] < 0.1 < metric(path, "train/loss")[0]
    state = load_checkpoint(path / "checkpoints/step-000030").state
    assert (state["network"]["head_loss"], state["network"]["activation"]) == ("brier", "squared_relu")
    assert state["config"]["plugins"] == ["my_counting"]
    assert state["config"]["task"] == {"name": "counting", "modulus": 9}
    run.main([*given, "resume=last", "training.max_steps=40"])
    evaluate.main([*given, "last"])
    assert "wrong  0%" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"task\.modulus=8: must stay 9"):
        run.main([*given, "resume=last", "task.modulus=8", "training.max_steps=80"])
    with pytest.raises(ConfigError, match=r"task\.modulus=1: must be a whole number of at least 2"):
        run.main([*given, *COUNTING, "task.modulus=1"])
    with pytest.raises(ConfigError, match=r"tokenizer=byte: task=counting reads no text"):
        run.main([*given, *COUNTING, "tokenizer=byte"])
    losses = {"custom": metric(path, "train/loss")}
    for implementation in ("torch", "baseline"):  # which have the mirrors
        fewer = [option for option in COUNTING if not option.startswith(("training.max_steps", "kernels"))]
        run.main([*given, *fewer, f"implementation={implementation}", "training.max_steps=4"])
        losses[implementation] = metric(newest(tmp_path), "train/loss")
    assert losses["custom"][:1] == pytest.approx(losses["torch"][:1], rel=1e-5)
    assert losses["torch"] == pytest.approx(losses["baseline"], rel=1e-4)


def test_nothing_is_imported_because_a_file_names_it(plugin: Path, tmp_path: Path) -> None:
    """A run that says which plugin it needs, an experiment that names one: what is missing is asked for."""
    run.main(["--plugin", str(plugin), *COUNTING, "training.max_steps=3"])
    plugins._loaded.clear()
    marker = tmp_path / "imported"
    plugin.write_text(f"open({str(marker)!r}, 'w')")
    sys.modules.pop("my_counting")
    asks = r"plugins=\[my_counting\]: .* add --plugin my_counting"
    for command in (
        lambda: run.main(["resume=last", "training.max_steps=9"]),
        lambda: evaluate.main(["last"]),
        lambda: summary.main(["last"]),
        lambda: run.main(["plugins=[my_counting]"]),
    ):
        with pytest.raises((ConfigError, InputError), match=asks):
            command()
    assert not marker.exists()


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_their_gradients_are_autograd_s(kind: str, kernels: str, plugin: Path) -> None:
    """Of every kind of network, by hand and by the mirrors; bfloat16 too has its loss in float32."""
    plugins.load_plugins([str(plugin)])
    sizes = {"vocab_size": 11, "d_model": 8, "n_blocks": 1, "n_heads": 2, "d_ffn": 12, "max_seq_len": 7}
    own = {"head_loss": "brier", "activation": "squared_relu", "kernels": kernels, "compile": "never"}
    own |= {"n_outputs": 5} if kind == "encoder" else {}
    config = network.CustomTransformerConfig(**sizes, **own, network=kind, precision="fp64")  # type: ignore[arg-type]
    batch = draw_batch(config, 3, 6)
    hand, mirror = (build_network(implementation, config) for implementation in ("custom", "torch"))
    hand.load_parameters(mirror.export_parameters())
    losses = []
    for one in (hand, mirror):
        one.zero_gradients()
        losses.append(one.loss_and_gradients(batch, denominator=7, step=None).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, wanted in mirror.gradients.items():
        assert (hand.gradients[name] - wanted).norm() <= 1e-12 * max(1, wanted.norm()), name
    small = build_network("custom", replace(config, precision="bf16"))
    small.load_parameters(mirror.export_parameters())
    loss = small.loss_and_gradients(batch, denominator=7, step=None)
    assert loss.item() == pytest.approx(losses[0], rel=0.05)


def test_what_cannot_be_loaded_or_registered(plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "needs.py").write_text("import a_library_that_nobody_has")
    for given, said in (
        ("gone.py", "there is no such file"),
        ("gone.task", "there is no such module"),
        ("needs", "needs a_library_that_nobody_has, which is not installed"),
    ):
        with pytest.raises(InputError, match=f"--plugin {given}: {said}"):
            evaluate.main(["--plugin", given, "last"])
    with pytest.raises(ConfigError, match="task copy: the name is taken"):
        register_task("copy", SequenceTask)
    with pytest.raises(ConfigError, match=r"task mine: task\.symbols is a key already"):
        register_task("mine", SequenceTask, settings={"symbols": (schema.Whole(), 3, "")})
    with pytest.raises(ConfigError, match="a name has letters, digits and _"):
        register_activation("no-name", *activations.ELEMENTWISE["relu"], autograd.ACTIVATIONS["relu"])
