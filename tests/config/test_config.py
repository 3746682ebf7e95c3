"""The rules of the configuration, and what only shows across keys; without Hydra."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from manual_backprop.common.errors import ConfigError
from manual_backprop.config.rules import Number, Text, Whole, nearest, shown
from manual_backprop.config.schema import CustomTransformerConfig, RunConfig, model_sizes, shipped_folder
from manual_backprop.config.validation import keys, suggestion, validate
from manual_backprop.tracking import create_run_directory
from manual_backprop.training.requirements import missing_here

RIGHT: dict[str, Any] = {
    "model": {
        "d_model": 64,
        "n_blocks": 2,
        "n_heads": 2,
        "d_ffn": 256,
        "max_seq_len": 64,
        "dropout": 0.0,
        "vocab_size": None,
        "learning_rate": 3e-3,
    },
    "architecture": {"name": "gpt2", "activation": "gelu_tanh", "learning_rate_scale": 1.0},
    "dataset": {"name": "python_docs"},
    "tokenizer": {"name": "bpe", "vocab_size": 1024},
    "batching": {"name": "packed", "mask_documents": False},
    "precision": {"name": "fp32"},
    "device": {"name": "cpu", "threads": None},
    "implementation": {"name": "custom"},
    "kernels": {"name": "reference"},
    "optimizer": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1, "betas": [0.9, 0.99], "epsilon": 1e-8},
    "schedule": {"name": "cosine", "warmup_ratio": 0.05, "min_learning_rate": None},
    "training": {
        "batch_size": 32,
        "gradient_accumulation_steps": 1,
        "max_steps": 100,
        "num_epochs": None,
        "max_grad_norm": 1.0,
        "label_smoothing": 0.0,
        "eval_every": 50,
        "log_every": 10,
        "save_every": "epoch",
        "eval_batches": None,
        "keep_checkpoints": 2,
        "sample_prompts": ["The "],
        "sample_length": 20,
        "non_finite": "raise",
        "non_finite_limit": 10,
    },
    "tracking": {"name": "none"},
    "sweep": {"resume": None},
}


def changed(**values: Any) -> dict[str, Any]:
    """RIGHT with other values; `model__d_model=3` is model.d_model."""
    mapping = copy.deepcopy(RIGHT)
    for name, value in values.items():
        group, _, key = name.rpartition("__")
        (mapping[group] if group else mapping)[key] = value
    return mapping


def violations(mapping: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(mapping)
    return caught.value.violations


def test_a_right_mapping_becomes_a_run_config() -> None:
    config = validate(RIGHT)
    assert config.model.d_model == 64
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.optimizer.momentum is None
    assert config.dataset.path is None
    assert config.training.save_every == "epoch"
    assert config.experiment_name == "manual_backprop"
    assert config.tags == {}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tags": {"note": "first", "fold": 3}, "run_name": "x", "resume": "last", "seed": 7},
        {"dataset": {"name": "text", "path": "some/file"}, "tokenizer": {"name": "char"}},
        {"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0}},
        {"schedule": {"name": "constant", "warmup_ratio": 0}},
    ],
)
def test_to_dict_comes_back_as_the_same_run(values: dict[str, Any]) -> None:
    config = validate(changed(**values))
    assert isinstance(config, RunConfig)
    plain = config.to_dict()
    assert OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(plain))) == plain  # through YAML
    assert validate(plain) == config


def test_whole_floats_are_whole_numbers() -> None:
    config = validate(changed(training__max_steps=1e3))
    assert config.training.max_steps == 1000
    assert isinstance(config.training.max_steps, int)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    # what is changed, how the violation begins, what it must say
    ({"model__d_model": "abc"}, "model.d_model=abc", "whole number"),
    ({"model__d_model": -3}, "model.d_model=-3", "at least 1"),
    ({"model__d_model": 10**9}, "model.d_model=1000000000", "at most 1000000"),
    ({"model__d_model": True}, "model.d_model=true", "whole number"),
    ({"model__d_model": None}, "model.d_model=null", "whole number"),
    ({"model__d_model": float("inf")}, "model.d_model=inf", "whole number"),
    ({"model__d_model": 64.5}, "model.d_model=64.5", "whole number"),
    ({"model__n_heads": 3}, "model.d_model=64", "63 or 66"),
    ({"model__dropout": 1}, "model.dropout=1", "less than 1"),
    ({"model__vocab_size": 1000}, "model.vocab_size=1000", "at least the 1024 tokens"),
    ({"model__vocab_size": 256, "tokenizer": {"name": "byte"}}, "model.vocab_size=256", "257"),
    ({"model__learning_rate": 0}, "model.learning_rate=0", "greater than 0"),
    ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate=nan", "number"),
    ({"optimizer__betas": [0.9]}, "optimizer.betas=[0.9]", "two numbers"),
    ({"optimizer__betas": [0.9, 1]}, "optimizer.betas=[0.9,1]", "less than 1"),
    ({"optimizer__momentum": 0.9}, "optimizer.momentum=0.9", "optimizer=sgd"),
    ({"optimizer__name": "adam"}, "optimizer.name=adam", "adamw"),
    ({"architecture__activation": "tanh"}, "architecture.activation=tanh", "gelu_tanh"),
    ({"architecture__norm_epsilon": 0}, "architecture.norm_epsilon=0", "at least 1e-12 and less than 1, or null"),
    ({"architecture__norm_epsilon": float("nan")}, "architecture.norm_epsilon=nan", "must be a number"),
    ({"architecture__rotary_base": 500000}, "architecture.rotary_base=500000", "only architecture=llama"),
    ({"architecture__rope_theta": 5e5}, "architecture.rope_theta=500000.0", "architecture.rotary_base?"),
    ({"precision": {"name": "fp16"}}, "precision.name=fp16", "did you mean fp16_mixed?"),
    ({"dataset": {"name": "text"}}, "dataset.path", "a file or a folder"),
    ({"dataset": {"name": "text", "path": None}}, "dataset.path=null", "dataset.path=PATH"),
    (
        {"batching": {"name": "padded"}, "dataset__max_length": 65},
        "dataset.max_length=65",
        "at most model.max_seq_len=64",
    ),
    ({"dataset": {"name": "text", "path": "a", "test": "./b/../a"}}, "dataset.test=./b/../a", "another file or folder"),
    ({"dataset__path": "x"}, "dataset.path=x", "dataset=text"),
    ({"tokenizer__vocab_size": 256}, "tokenizer.vocab_size=256", "at least 257"),
    ({"tokenizer": {"name": "bpe"}}, "tokenizer.vocab_size", "missing"),
    ({"tokenizer": {"name": "byte", "vocab_size": 300}}, "tokenizer.vocab_size=300", "tokenizer=bpe"),
    ({"training__max_steps": None}, "training.max_steps=null", "num_epochs"),
    ({"training__num_epochs": 2}, "training.num_epochs=2", "leave one out"),
    ({"training__eval_every": "never"}, "training.eval_every=never", "the word epoch"),
    ({"training__eval_every": 0}, "training.eval_every=0", "at least 1"),
    ({"training__max_grad_norm": 0}, "training.max_grad_norm=0", "or null"),
    ({"training__sample_prompts": "hello"}, "training.sample_prompts=hello", "list"),
    ({"training__non_finite": "ignore"}, "training.non_finite=ignore", "raise, skip"),
    ({"schedule__warmup_ratio": 100}, "schedule.warmup_ratio=100", "did you mean schedule.warmup_steps=100?"),
    (
        {"schedule__warmup_ratio": 0.9, "training__max_steps": 2},
        "schedule.warmup_ratio=0.9",
        "all of training.max_steps=2",
    ),
    ({"schedule__min_learning_rate": 0.1}, "schedule.min_learning_rate=0.1", "optimizer.learning_rate=0.003"),
    (
        {"schedule": {"name": "constant", "warmup_ratio": 0, "min_learning_rate": 1e-4}},
        "schedule.min_learning_rate=0.0001",
        "cosine",
    ),
    ({"seed": -1}, "seed=-1", "at least 0"),
    ({"seed": 2**40}, "seed=1099511627776", "at most"),
    ({"run_name": "a/b"}, "run_name=a/b", "without /"),
    ({"run_name": "a\nb"}, "run_name=a\\nb", "printable"),
    ({"run_name": ""}, "run_name=", "null"),
    ({"run_name": 1.5}, "run_name=1.5", "quotes"),
    ({"experiment_name": None}, "experiment_name=null", "given"),
    ({"tags": {"a@b": 1}}, "tags={a@b:1}", "letters"),
    *(
        ({"tags": {name: 1}}, "tags={" + name, "a tag name must not begin or end")
        for name in ("data//v2", "/abs", "..", "../up", "a/", "a/../b", "./a", ".", "..a", "a/.")
    ),
    ({"tags": {"k" * 251: 1}}, "tags={k", "250 characters at most"),
    ({"tags": {"a": "half \ud83d"}}, "tags={a:", "a character that is not valid in text"),
    ({"tags": 3}, "tags=3", "tags.note=first"),
    ({"plan": "yes"}, "plan=yes", "true or false"),
    ({"model": None}, "model", "missing"),
    ({"model": "tiny"}, "model=tiny", "conf/model"),
    ({"modle": 3}, "modle=3", "did you mean model?"),
    ({"model__n_layers": 3}, "model.n_layers=3", "did you mean model.n_blocks?"),
    ({"training__lerning_rate": 3}, "training.lerning_rate=3", "no such key"),
]


@pytest.mark.parametrize(("values", "begins", "says"), WRONG, ids=[begins for _, begins, _ in WRONG])
def test_a_wrong_value_is_one_violation_that_says_how_to_go_on(values: dict[str, Any], begins: str, says: str) -> None:
    found = violations(changed(**values))
    assert len(found) == 1, found
    assert found[0].startswith(begins)
    assert says in found[0]


def test_everything_that_is_wrong_is_in_one_report() -> None:
    found = violations(
        changed(
            model__n_heads=3,
            model__dropout=2,
            optimizer__lr=1,
            training__num_epochs=1,
            seed="x",
            device={"name": "tpu", "threads": None},
        )
    )
    assert {violation.split("=")[0] for violation in found} == {
        "model.d_model",
        "model.dropout",
        "optimizer.lr",
        "training.num_epochs",
        "seed",
        "device.name",
    }


def test_an_empty_mapping_misses_every_group() -> None:
    found = violations({})
    assert len(found) == 14
    assert all("missing" in violation for violation in found)


def test_what_this_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("some words")
    directory = create_run_directory(tmp_path / "outputs", "mine")
    run = directory.path
    directory.release()
    text = {"name": "text", "path": "text"}
    assert missing_here(validate(changed(dataset=text, resume="last"))) == []
    for resume in (str(run), run.name, run.name[-6:]):
        assert missing_here(validate(changed(resume=resume))) == []
    found = missing_here(validate(changed(dataset={**text, "path": "absent"}, resume="absent")))
    assert [violation.split("=")[0] for violation in found] == ["dataset.path", "resume"]
    assert run.name in found[1]  # what there is


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("optimizer.lerning_rate", "optimizer.learning_rate"),
        ("modle", "model"),
        ("lr", "optimizer.learning_rate"),
        ("model.lr", "model.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("batch_size", "training.batch_size"),
        ("trainig.batchsize", "training.batch_size"),
        ("n_layer", "model.n_blocks"),
        ("experiment", "experiments"),
        ("Seed", "seed"),
        ("xyzzy", None),
        ("xyzzy.plugh", None),
    ],
)
def test_the_nearest_right_name(given: str, meant: str | None) -> None:
    assert suggestion(given) == meant


def test_every_key_has_a_rule_and_a_meaning() -> None:
    assert len(keys()) > 40
    for name, key in keys().items():
        assert hasattr(key.metadata["rule"], "read"), name
        assert key.metadata["about"], name


def test_model_sizes_reads_what_yaml_reads() -> None:
    sizes = model_sizes()
    assert set(sizes) == {"tiny", "small", "medium", "gpt2"}
    for name, values in sizes.items():
        assert values == OmegaConf.to_container(OmegaConf.load(shipped_folder("conf") / "model" / f"{name}.yaml"))
        assert values["d_ffn"] == 4 * values["d_model"]  # type: ignore[operator]


def test_rules_alone() -> None:
    assert Whole(word="epoch").read("epoch") == "epoch"
    assert Whole(optional=True).read(None) is None
    assert Number(minimum=0).read(0) == 0.0
    assert Text().read(7) == "7"
    assert nearest("GPU", ["cpu", "cuda"]) == "cuda"
    assert nearest("???", ["cpu", "cuda"]) is None
    assert shown([1, None, {"a": True}]) == "[1,null,{a:true}]"
    assert shown("a\x1b[31m") == "a\\x1b[31m"
    assert len(shown("x" * 1000)) == 100


def test_network_config_names_what_no_network_can_have() -> None:
    assert CustomTransformerConfig().violations() == []
    found = CustomTransformerConfig(d_model=10, n_heads=4, dropout=1.0, precision="fp8").violations()
    assert [violation.split("=")[0] for violation in found] == ["d_model", "dropout", "precision"]
    assert "8 or 12" in found[0]
    assert CustomTransformerConfig(d_model=0).violations() == ["d_model=0: must be a whole number of at least 1"]


def test_a_task_decides_no_sizes_of_its_network() -> None:
    config = validate(changed())
    assert config.network_config(257, n_outputs=3).n_outputs == 3
    with pytest.raises(TypeError, match="multiple values for keyword argument 'd_model'"):
        config.network_config(257, d_model=8)
