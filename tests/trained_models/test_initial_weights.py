"""init_from: a run starts from the weights of another model, whose sizes and tokenizer it takes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import config_of, resume, train

from manual_backprop import CustomTransformerConfig, CustomTransformerWrapper
from manual_backprop.checkpoints.checkpoint import load_checkpoint
from manual_backprop.common.errors import ConfigError
from manual_backprop.common.interruption import Interruption
from manual_backprop.convert import main as convert
from manual_backprop.training.command_line import check
from manual_backprop.training.runner import Runner
from manual_backprop.training.value_sources import value_sources

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def models(copy: Path, tmp_path: Path) -> dict[str, str]:
    """One model in all the ways to name it."""
    convert(["to-hf", "last@8", "exported"])
    convert(["from-hf", "exported", "imported"])
    checkpoint = copy / "checkpoints" / "step-000008"
    return {"run": "last@8", "checkpoint": str(checkpoint), "exported": "exported", "imported": "imported"}


def job(text: Path, *overrides: str) -> Any:
    return check([f"dataset.path='{text}'", "dataset=text", "device=cpu", "device.threads=1", *overrides]).jobs[0]


@pytest.mark.parametrize("kind", ["run", "checkpoint", "exported", "imported"])
def test_sizes_tokenizer_and_weights_are_the_models(
    models: dict[str, str], kind: str, text: Path, copy: Path, tmp_path: Path
) -> None:
    found = job(text, f"init_from='{models[kind]}'", "model.dropout=0.2")
    config, source = found.config, load_checkpoint(copy / "checkpoints" / "step-000008")
    network = config.network_config(1)
    sizes = ("d_model", "n_blocks", "n_heads", "d_ffn", "max_seq_len", "vocab_size", "architecture", "activation")
    assert {name: getattr(network, name) for name in sizes} == {name: source.state["network"][name] for name in sizes}
    assert (config.model.dropout, config.tokenizer.name) == (0.2, "file")
    origins = value_sources(config, found.overrides, found.runtime)
    assert (origins["model.d_model"], origins["model.dropout"]) == ("init_from", "command line")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
    assert all(torch.equal(runner.model.network.parameters[n], p) for n, p in source.tensors["parameters"].items())


def test_a_shorter_sequence_takes_the_beginning_of_the_table(
    models: dict[str, str], text: Path, tmp_path: Path
) -> None:
    config = job(text, "init_from=imported", "model.max_seq_len=5").config
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
    table = load_checkpoint(tmp_path / "imported" / "step-000000").tensors["parameters"]["position_embedding.weight"]
    assert torch.equal(runner.model.network.parameters["position_embedding.weight"], table[:5])


def test_everything_that_does_not_fit_is_named_with_what_would(models: dict[str, str], text: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        job(
            text,
            "init_from=imported",
            "model.d_model=32",
            "model.max_seq_len=64",
            "architecture=llama",
            "tokenizer=bpe",
        )
    problems = caught.value.violations
    assert problems[:5] == [
        "init_from=imported: model.d_model=32: must be 16, as in its weights",
        "init_from=imported: model.max_seq_len=64: must be at most 8, as in its weights",
        "init_from=imported: architecture=llama: must be gpt2, as in its weights",
        "init_from=imported: architecture.activation=swiglu: must be gelu_tanh, as in its weights",
        problems[4],
    ]
    assert problems[4].startswith(
        "init_from=imported: tokenizer=bpe: has 1024 tokens, but its weights are for 257; leave out"
    )
    assert "model.d_model=16 model.n_blocks=2" in problems[4]
    assert len(problems) == 5


def test_epsilon_and_base_are_the_models(text: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 24, "max_seq_len": 8}
    theirs = CustomTransformerConfig(**sizes, architecture="llama", norm_epsilon=1e-5, rotary_base=500000.0)
    CustomTransformerWrapper(theirs).save_checkpoint("mine")
    for named in ((), ("architecture=llama",), ("architecture=llama", "architecture.rotary_base=500000")):
        network = job(text, "init_from=mine", "tokenizer=byte", *named).config.network_config(300)
        assert (network.architecture, network.epsilon, network.base) == ("llama", 1e-5, 500000)
    with pytest.raises(ConfigError, match=r"architecture.rotary_base=10000(.0)?: must be 500000.0, as in its weights"):
        job(text, "init_from=mine", "tokenizer=byte", "architecture=llama", "architecture.rotary_base=10000")
    with pytest.raises(ConfigError, match=r"architecture.norm_epsilon=0.001: must be 1e-05, as in its weights"):
        job(text, "init_from=mine", "tokenizer=byte", "architecture.norm_epsilon=1e-3")
    config = job(text, "init_from=mine", "tokenizer=byte").config
    config = replace(config, architecture=replace(config.architecture, norm_epsilon=None, rotary_base=None))
    with Interruption() as interruption, pytest.raises(ConfigError) as caught:  # who builds a config without check
        Runner(config, tmp_path / "outputs", interruption)
    assert [problem.partition(": ")[2].partition(",")[0] for problem in caught.value.violations] == [
        "architecture.norm_epsilon=1e-06: must be 1e-05",
        "architecture.rotary_base=10000.0: must be 500000.0",
    ]


def test_what_is_not_there(text: Path) -> None:
    with pytest.raises(ConfigError, match="init_from=wings: there is no run 'wings'"):
        job(text, "init_from=wings")
    with pytest.raises(ConfigError, match="init_from=3"):
        job(text, "init_from=3")


def test_another_tokenizer_is_refused_before_the_run(models: dict[str, str], text: Path, tmp_path: Path) -> None:
    config = job(text, "init_from=last", "tokenizer=char").config
    with Interruption() as interruption, pytest.raises(ConfigError, match="trained with another tokenizer; leave"):
        Runner(config, tmp_path / "outputs", interruption)


def test_a_run_that_goes_on_does_not_load_it_again(copy: Path, text: Path, tmp_path: Path) -> None:
    convert(["to-hf", "last@8", "exported"])
    same = ("init_from=exported", "tokenizer=byte", "training.save_every=2", "model.dropout=0")
    config_of(text, *same)  # named sizes that fit are no fault
    shutil.copy(copy / "tokenizer.json", tmp_path / "exported" / "tokenizer.json")  # byte's own file
    run = train(tmp_path, text, *same, "training.max_steps=2")
    shutil.rmtree(tmp_path / "exported")
    resume(tmp_path, f"resume={run.name}", "training.max_steps=4")
    assert (run / "checkpoints" / "step-000004").is_dir()
    with pytest.raises(ConfigError, match=r"init_from=last: must stay .*exported.*start a new run"):
        check([f"resume={run.name}", "init_from=last", "training.max_steps=6"])
