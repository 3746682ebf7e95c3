"""Every option of every group of `conf/`, and every experiment, composes and is valid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from manual_backprop.config.composition import Composer, composer
from manual_backprop.config.help_page import first_comment
from manual_backprop.config.schema import HUB, shipped_folder
from manual_backprop.config.task_rules import DATASETS
from manual_backprop.config.validation import groups, keys
from manual_backprop.training.command_line import Checked, check_with

CONF = shipped_folder("conf")
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
EXPERIMENTS = sorted(path.stem for path in shipped_folder("experiments").glob("*.yaml"))


@pytest.fixture(scope="module")
def hydra() -> Iterator[Composer]:
    with composer() as opened:
        yield opened


def compose(hydra: Composer, arguments: list[str], tmp_path: Path) -> Checked:
    path = tmp_path / "text.txt"
    path.write_text("words")
    if "dataset=pretokenized" in arguments or "tokenizer=pretokenized" in arguments:
        arguments = ["dataset=pretokenized", "tokenizer=pretokenized"]
    files = ("text", "jsonl", "parquet", "saved", "pretokenized", "pairs", "series", "labelled")
    read = {
        "task=translation": "pairs",
        "task=classification": "labelled",
    }  # what these tasks choose, which has no path
    for task, dataset in read.items():
        if task in arguments and not any(argument.startswith("dataset=") for argument in arguments):
            arguments = [*arguments, f"dataset={dataset}"]
    for option in (*(f"dataset={name}" for name in files), "tokenizer=file"):
        if option in arguments or (option == "dataset=text" and "experiments=shakespeare_char" in arguments):
            arguments = [*arguments, f"{option.partition('=')[0]}.path='{path}'"]
    if "dataset=hub" in arguments:
        arguments = [*arguments, "dataset.name=owner/stories"]
    return check_with(hydra, arguments)


OF_A_GPU = (("device", "cuda"), ("precision", "tf32"))


def test_the_defaults(hydra: Composer, tmp_path: Path) -> None:
    checked = compose(hydra, [], tmp_path)
    assert checked.multirun is False
    (job,) = checked.jobs
    assert {group: job.runtime.choices[group] for group in (*groups(), "experiments")} == {
        "task": "language_model",
        "model": "small",
        "architecture": "gpt2",
        "dataset": "python_docs",
        "tokenizer": "bpe",
        "batching": "packed",
        "precision": "fp32",
        "device": "auto",
        "implementation": "custom",
        "kernels": "fused",
        "optimizer": "adamw",
        "schedule": "cosine",
        "training": "default",
        "tracking": "mlflow",
        "sweep": "default",
        "experiments": "none",
    }
    assert job.config.optimizer.learning_rate == job.config.model.learning_rate
    assert job.config.tokenizer.vocab_size == 1024
    assert job.config.training.max_grad_norm == 1.0


def test_every_group_of_the_schema_is_a_folder() -> None:
    assert {group for group, _ in OPTIONS} == set(groups())


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair not in OF_A_GPU])
def test_every_option_composes(hydra: Composer, tmp_path: Path, group: str, option: str) -> None:
    needed = ["task=sort"] if (group, option) == ("tokenizer", "none") else []
    if group == "dataset":
        needed = [f"task={next(task for task, datasets in DATASETS.items() if option in datasets)}"]
    (job,) = compose(hydra, [f"{group}={option}", *needed], tmp_path).jobs
    assert job.runtime.choices[group] == option
    part = getattr(job.config, group)
    if "name" in {key.name for key in fields(part)}:
        assert part.name == option
    written = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
    assert isinstance(written, dict)
    # What a file lists is exactly what its option has: no key is forgotten, none is idle.
    assert set(written) - {"defaults"} == set(job.config.to_dict()[group])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_changes_what_it_says(hydra: Composer, tmp_path: Path, name: str) -> None:
    """The first job of one that is a sweep; every job: test_experiments.py."""
    job = compose(hydra, [f"experiments={name}"], tmp_path).jobs[0]
    content = OmegaConf.to_container(OmegaConf.load(shipped_folder("experiments") / f"{name}.yaml"))
    composed = job.config.to_dict()
    assert isinstance(content, dict) or name == "none"
    for key, value in (content or {}).items():  # type: ignore[union-attr]
        if key in groups():
            assert {inner: composed[key][inner] for inner in value} == value
        elif key not in ("defaults", "hydra"):
            assert composed[key] == value


@pytest.mark.parametrize("model", ["tiny", "small", "medium", "gpt2"])
@pytest.mark.parametrize("architecture", ["gpt2", "vaswani", "llama"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_groups_go_together(hydra: Composer, tmp_path: Path, model: str, architecture: str, optimizer: str) -> None:
    chosen = [f"model={model}", f"architecture={architecture}", f"optimizer={optimizer}", "training=smoke"]
    (job,) = compose(hydra, chosen, tmp_path).jobs
    rate = job.config.model.learning_rate if optimizer == "adamw" else 0.3
    assert job.config.optimizer.learning_rate == rate


def test_gpt2_has_the_published_sizes(hydra: Composer, tmp_path: Path) -> None:
    sizes = compose(hydra, ["model=gpt2"], tmp_path).jobs[0].config.model
    assert (sizes.d_model, sizes.n_blocks, sizes.n_heads, sizes.d_ffn) == (768, 12, 12, 3072)
    assert (sizes.max_seq_len, sizes.vocab_size) == (1024, 50257)


@pytest.mark.parametrize("path", [*CONF.glob("*/*.yaml"), *shipped_folder("experiments").glob("*.yaml")], ids=str)
def test_every_file_says_what_it_is(path: Path) -> None:
    about = first_comment(path)
    assert 5 < len(about) <= 90, about


def test_no_file_names_an_object_to_build() -> None:
    def keys_of(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield str(key)
                yield from keys_of(inner)

    paths = [*CONF.rglob("*.yaml"), *shipped_folder("experiments").glob("*.yaml")]
    assert len(paths) > len(OPTIONS) > 0
    for path in paths:
        assert "_target_" not in set(keys_of(OmegaConf.to_container(OmegaConf.load(path), resolve=False)))


def test_top_level_keys_are_those_of_the_schema() -> None:
    content = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
    assert isinstance(content, dict)
    assert set(content) - {"defaults", "hydra"} == {key for key in keys() if "." not in key}


def test_what_comes_from_the_hub_is_pinned_to_a_commit() -> None:
    """But for `hub`, whose repository is the reader's."""
    for name in sorted(set(HUB) - {"hub"}):
        assert re.fullmatch("[0-9a-f]{40}", OmegaConf.load(CONF / "dataset" / f"{name}.yaml").revision), name
