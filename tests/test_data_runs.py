"""Runs on each shape of batches: what they report, and that a resume in the middle of an epoch sees what is next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from run_tools import assert_same_tensors, metric, resume, same_process, train

from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import read_run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of documents of 1 to 20 words; one in 150 is no text."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [" ".join(["the", "cat", "saw", "a", "mouse"][: n % 5 + 1] * (n % 4 + 1)) for n in range(149)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + '{"text": 7}\n')
    return path


SHAPES = [
    pytest.param(("batching=padded",), id="padded"),
    pytest.param(("batching=packed", "batching.mask_documents=true"), id="masked"),
    pytest.param(("batching=packed", "dataset.max_length=6"), id="cut"),
]
ROWS = ("dataset=jsonl", "dataset.on_bad_row=skip", "training.batch_size=3", "training.gradient_accumulation_steps=2")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_resume_in_the_middle_of_an_epoch(shape: tuple[str, ...], rows: Path, tmp_path: Path) -> None:
    """Of more than an epoch: bitwise what the run would have come to."""
    with same_process():
        run = train(
            tmp_path,
            rows,
            *ROWS,
            *shape,
            "training.max_steps=26",
            "training.save_every=10",
            "training.keep_checkpoints=3",
        )
        before = shutil.copytree(run, tmp_path / "before")
        resume(tmp_path, f"resume={run / 'checkpoints' / 'step-000010'}")
    assert_same_tensors(run / "checkpoints/step-000026", before / "checkpoints/step-000026")
    for name in ("train/loss", "tokens_seen", "validation/loss"):
        assert metric(run, name) == metric(before, name)


def test_a_padded_run_says_what_it_did(rows: Path, tmp_path: Path) -> None:
    with same_process():
        run = train(tmp_path, rows, *ROWS, "batching=padded", "training.max_steps=null", "training.num_epochs=1")
    said = (run / "run.log").read_text()
    assert "113 of 130 documents have more than 8 tokens and are cut there" in said
    assert "1 bad rows of 150 were left out, the first: " in said
    assert "line 150: 'text' should be text and is the number 7" in said
    seen = metric(run, "tokens_seen")
    assert len(seen) == 22  # steps of 6 of the 130 documents, and one of 4
    assert seen[-1] < 22 * 6 * 8
    assert seen == sorted(set(seen))
    assert read_run(run)["status"] == "FINISHED"
    assert load_training_log(run).config["batching"] == {"name": "padded"}
