"""The experiments on datasets of the hub, two steps each, by the command itself, on a small hub of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from loopback_hub import LoopbackHub
from run_tools import assert_same_tensors

from manual_backprop.tracking import FINISHED, flatten, load_training_log
from manual_backprop.tracking.run_directory import list_runs, read_run

SHORT = ("training.max_steps=2", "training.num_epochs=null", "model.max_seq_len=16", "training.sample_length=2")
SHORT += ("device=cpu", "device.threads=1", "tracking=none", "dataset.revision=null")
COLUMNS = {"roneneldan/TinyStories": "text", "nampdn-ai/tiny-textbooks": "textbook"}
SPLITS = {"roneneldan/TinyStories": "validation", "nampdn-ai/tiny-textbooks": "test"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories that the experiments name, each with a few kilobytes."""
    root = tmp_path_factory.mktemp("hub")
    texts = [f"Once upon a time, {('a cat', 'a dog', 'an owl')[n % 3]} saw {n} mice. The end." for n in range(400)]
    for name, column in COLUMNS.items():
        for split, part in (("train", texts[:300]), (SPLITS[name], texts[300:])):
            path = root / "datasets" / name / f"data/{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table({column: part}), path)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, 400, special_tokens=["<|endoftext|>"], show_progress=False)
    (root / "models/openai-community/gpt2").mkdir(parents=True)
    tokenizer.save(str(root / "models/openai-community/gpt2/tokenizer.json"))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("tinystories", "tokenizer.vocab_size=300"),
        ("tiny_textbooks", "tokenizer.revision=null"),
        pytest.param("tinystories_char", "dataset.subset_size=null", marks=pytest.mark.nightly),
    ],
)
def test_two_steps(name: str, own: str, folder: Path, tmp_path: Path) -> None:
    with LoopbackHub(folder) as hub:
        command = [sys.executable, "-m", "manual_backprop.run", f"experiments={name}", *SHORT, own]
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = list_runs(tmp_path / "outputs")
    log = load_training_log(path)
    assert log.run["status"] == FINISHED
    assert log.validation["validation/loss"].steps == [2]
    assert flatten(log.config)["dataset.repository"] in COLUMNS
    said_which = "its test split is used for validation" in (path / "run.log").read_text()
    assert said_which == (name == "tiny_textbooks")


@pytest.mark.slow
def test_a_stream_is_resumed_at_the_next_unseen_token(folder: Path, tmp_path: Path) -> None:
    """Without the hub, since the stream was kept up to its bound; and bitwise as if it had never stopped."""
    stream = ("dataset=fineweb", "dataset.repository=roneneldan/TinyStories", "dataset.config=null", *SHORT)
    stream += ("dataset.subset_size=100", "tokenizer=byte", "model=tiny", "schedule=constant", "training.save_every=3")
    with LoopbackHub(folder) as hub:
        online = {**os.environ, **hub.environment(tmp_path / "home")}
        stream += (f"dataset.revision={hub.commit('datasets', 'roneneldan/TinyStories')}",)
    given = {argument.partition("=")[0]: argument for argument in stream}
    offline = online | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}

    def run(environment: dict[str, str], *arguments: str) -> None:
        command = [sys.executable, "-m", "manual_backprop.run", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    with LoopbackHub(folder) as hub:
        run(online | {"HF_ENDPOINT": hub.url}, *(given | {"training.max_steps": "training.max_steps=6"}).values())
    (path,) = list_runs(tmp_path / "outputs")
    before = shutil.copytree(path, tmp_path / "before")
    run(offline, f"resume={path / 'checkpoints/step-000003'}")
    assert [each["step"] for each in read_run(path)["resumes"]] == [3], "or these are the tensors of before"
    assert_same_tensors(path / "checkpoints/step-000006", before / "checkpoints/step-000006")
