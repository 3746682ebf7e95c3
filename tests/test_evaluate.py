"""The command that measures a trained model: its numbers, what it logs, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from manual_backprop import Evaluator, evaluate
from manual_backprop.checkpoints.checkpoint import load_checkpoint
from manual_backprop.common import exit_codes
from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import DatasetConfig
from manual_backprop.data.tokens.batches import validation_batches
from manual_backprop.data.tokens.corpus import prepare_corpus
from manual_backprop.data.tokens.test_split import open_test_split
from manual_backprop.ops import IGNORED
from manual_backprop.tasks import LanguageModelTask
from manual_backprop.tasks.evaluation import shown_token, unigram_and_bigram_loss
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import open_run_directory, read_run
from manual_backprop.trained_models import evaluation
from manual_backprop.trained_models.saved_model import find, load

pytestmark = pytest.mark.usefixtures("here")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert evaluate.main(list(arguments)) is None
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert exit_codes.exit_code_of(lambda: evaluate.main(list(arguments))) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) <= 2
    return told


def test_the_numbers_are_the_libraries(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And those that the run has measured itself, at the same step."""
    shown = said(capsys, "last")
    assert shown.splitlines()[0] == load("last").line
    log = load_training_log(copy)
    steps = log.validation["validation/loss"].steps
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "unigram_loss", "bigram_loss"):
        logged = log.training[f"evaluation/validation_{name}"]
        assert logged.steps == [8]
        assert logged.values[0] == pytest.approx(log.validation[f"validation/{name}"].values[steps.index(8)], rel=1e-6)
    evaluation, tokens = (
        log.training["evaluation/validation_loss"].values[0],
        int(log.training["evaluation/validation_tokens"].values[0]),
    )
    assert f"validation: {tokens:,} tokens" in shown
    assert re.search(rf"model +{evaluation:.4f} ", shown)
    bigram, unigram = (log.training[f"evaluation/validation_{name}_loss"].values[0] for name in ("bigram", "unigram"))
    assert re.search(rf"bigram +{bigram:.4f} ", shown)
    assert re.search(rf"unigram +{unigram:.4f} ", shown)


def test_again_adds_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_run(copy)
    said(capsys, "last")
    metrics = (copy / "metrics.jsonl").read_bytes()
    assert "Logged to the run as evaluation/validation_* at step 8." in said(capsys, copy.name[-6:])
    assert (copy / "metrics.jsonl").read_bytes() == metrics
    assert read_run(copy) == before
    said(capsys, "last@4")  # another step is news
    assert load_training_log(copy).training["evaluation/validation_loss"].steps == [4, 8]


def test_a_part_of_the_training_split(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = load("last")
    config = saved.config()
    corpus = prepare_corpus(config.dataset, config.tokenizer, copy.parent.parent / "datasets")
    batches = validation_batches(corpus.train, config.model.max_seq_len, config.training.batch_size, limit=3)
    want = Evaluator(saved.model).evaluate(batches)
    shown = said(capsys, "last", "--split", "train", "--max-batches", "3")
    assert f"train: {want.tokens:,} tokens of {len(corpus.train) - 1:,}" in shown
    assert re.search(rf"model +{want.loss:.4f} .* {want.accuracy:.1%}", shown)
    logged = load_training_log(copy).training
    assert logged["evaluation_part/train_loss"].values == [pytest.approx(want.loss, rel=1e-6)]
    assert not any(name.startswith("evaluation/") for name in logged)


def test_a_test_split_of_its_own(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is named here; no bit of it is in what the run has read, and the second time it is prepared."""
    text = "the owl saw 4 cats. " * 40
    (tmp_path / "held-out.txt").write_text(text)
    given = ("last", "--split", "test", "--test", "held-out.txt")
    for _ in range(2):
        shown = said(capsys, *given)
        assert f"test: {len(text)} tokens " in shown  # the end token is the last target
        logged = load_training_log(copy).training
        assert logged["evaluation/test_tokens"].values == [len(text)]
    saved = load("last")
    ids = np.array([*text.encode(), 256])
    config = saved.config()
    want = Evaluator(saved.model).evaluate(
        validation_batches(ids, config.model.max_seq_len, config.training.batch_size)
    )
    assert logged["evaluation/test_loss"].values == [pytest.approx(want.loss, rel=1e-6)]
    (cached,) = (tmp_path / "outputs/datasets").glob("text-test-*/")
    assert (cached / "test.bin").stat().st_size == 2 * len(ids)
    (tmp_path / "held-out.txt").write_text("short")
    assert "The test or validation split has 6 tokens, but one window needs 9" in refused(capsys, *given)
    assert "--split test: dataset.path=absent: there is no such file" in refused(capsys, *given[:-1], "absent")
    (tmp_path / "held-out.txt").write_bytes(b"the owl \xff")
    said_of_a_bad_one = refused(capsys, *given)
    assert "correct this one, or remove it, and give the result as --test PLACE" in said_of_a_bad_one
    assert "on_bad_row" not in said_of_a_bad_one


def test_the_run_says_where_its_test_split_is(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative path, seen from where the run was started; the run's data are the same with it and without it."""
    from run_tools import train

    started = tmp_path / "started"
    started.mkdir()
    monkeypatch.chdir(started)
    Path("held out").mkdir()
    Path("held out/one.txt").write_text("the owl saw 4 cats. " * 10)
    short = ("training.max_steps=1", "training.eval_every=1")
    without, run = train(started, text, *short), train(started, text, *short, "dataset.test='held out'")
    monkeypatch.chdir(tmp_path)
    assert "test: 200 tokens" in said(capsys, str(run), "--split", "test")
    first, second = (load_checkpoint(one / "checkpoints/step-000001").state for one in (without, run))
    assert first["dataset_digest"] == second["dataset_digest"]


def test_a_dataset_with_a_test_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As datasets.save_to_disk wrote it; without a validation split, the test split is what validated."""
    import datasets
    from run_tools import train

    def rows(word: str, count: int) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"{word} number {number}" for number in range(count)]})

    splits = {"train": rows("train", 40), "validation": rows("validation", 9), "test": rows("test", 7)}
    datasets.DatasetDict(splits).save_to_disk("three")
    del splits["validation"]
    datasets.DatasetDict(splits).save_to_disk("two")
    del splits["test"]
    datasets.DatasetDict(splits).save_to_disk("one")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    runs = {
        name: train(tmp_path, Path(name), "dataset=saved", "training.max_steps=1", "training.eval_every=1")
        for name in ("one", "two", "three")
    }
    targets = 7 * len("test number 0\n") - 1
    note = "Split test of two is the validation split, the same text."
    shown = {name: said(capsys, str(runs[name]), "--split", "test") for name in ("two", "three")}
    assert all(f"test: {targets} tokens" in page for page in shown.values())
    assert note in shown["two"].replace(f"{tmp_path}/", "")
    assert "is the validation split" not in shown["three"]
    assert f"validation: {targets} tokens" in said(capsys, str(runs["two"]))
    assert f"validation: {9 * len('validation number 0.') - 1} tokens" in said(capsys, str(runs["three"]))
    told = refused(capsys, str(runs["one"]), "--split", "test")
    assert "has no split 'test', only train." in told
    assert "The model was trained on the split" in refused(
        capsys, str(runs["three"]), "--split", "test", "--test", "train"
    )
    assert f"test: {9 * len('validation number 0.') - 1} tokens" in said(
        capsys, str(runs["three"]), "--split", "test", "--test", "validation"
    )


def test_the_documentation_has_no_test_split(copy: Path, tmp_path: Path) -> None:
    config = load("last").config()
    corpus = prepare_corpus(config.dataset, config.tokenizer, copy.parent.parent / "datasets")
    with pytest.raises(InputError, match="dataset=python_docs has a train and a validation split, but no test split"):
        open_test_split(DatasetConfig("python_docs"), corpus, tmp_path)


def test_a_run_whose_process_is_gone_is_killed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where another run is looked at, and by the commands that read only run directories."""
    from manual_backprop import compare, summary
    from manual_backprop.tracking.run_directory import update_run

    for command in (lambda: evaluate.main(["last"]), lambda: summary.main(["last"]), lambda: compare.main([str(copy)])):
        update_run(copy, lambda run: run.update(status="RUNNING"))
        command()
        assert read_run(copy)["status"] == "KILLED"


def test_token_by_token(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The targets are the text, in order; the mean of their losses is that of the first windows."""
    saved = load("last")
    config, tokenizer = saved.config(), saved.tokenizer()
    corpus = prepare_corpus(config.dataset, config.tokenizer, copy.parent.parent / "datasets")
    length = config.model.max_seq_len
    shown = said(capsys, "last", "--tokens", str(2 * length + 3))
    rows = re.findall(r"^ +(\d+) +([\d.]+) +(\d+) +('.*?'|\S+)  +(.*)$", shown, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 2 * length + 4))
    targets = corpus.validation[1 : 2 * length + 4].tolist()
    assert [row[3] for row in rows] == [shown_token(tokenizer, token) for token in targets]
    for _, loss, rank, target, likeliest in rows:
        assert len(re.findall(r"\d+%", likeliest)) == 5
        assert (rank == "1") == likeliest.startswith(f"{target} ")
        assert float(loss) > 0
    batches = validation_batches(corpus.validation[: 2 * length + 4], length, 1)
    assert f"mean loss of these {len(rows)} tokens: {Evaluator(saved.model).evaluate(batches).loss:.4f}" in shown


@pytest.mark.parametrize("options", [("batching=padded",), ("batching.mask_documents=true",)], ids=" ".join)
def test_documents_are_read_as_they_are_trained(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token by token, in a table, and beside the counting models: the same targets, and the same losses of them."""
    from run_tools import train

    texts = ["the cat saw a mouse "[: 3 + 5 * n % 18] for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ("dataset=jsonl", "training.max_steps=20", "training.eval_every=20", "dataset.validation=0.2", *options)
    run = train(tmp_path, tmp_path / "rows.jsonl", *given)
    capsys.readouterr()
    saved = load("last")
    task = evaluation.open_trained_task(saved)
    assert isinstance(task, LanguageModelTask)
    corpus, split = task.corpus, task.corpus.split("validation")
    counted = sum(int((batch.targets != IGNORED).sum()) for batch in task.evaluation_batches(split, "cpu"))
    shown = said(capsys, "last", "--tokens", "100000")
    table = re.search(r"model +([\d.]+) ", shown)
    assert table is not None
    assert f"mean loss of these {counted} tokens: {table[1]}" in shown
    few = counted - 2
    assert f"mean loss of these {few} tokens: " in said(capsys, "last", "--tokens", str(few))
    shown = said(capsys, "last", "--max-batches", "1")
    assert re.search(rf"validation: [\d,]+ tokens of {counted:,}\b", shown)
    first = [batch for number, batch in enumerate(task.evaluation_batches(split, "cpu")) if number < 1]
    unigram, bigram = unigram_and_bigram_loss(corpus.train, first, corpus.tokenizer.vocab_size)
    logged = load_training_log(run).training
    assert logged["evaluation_part/validation_bigram_loss"].values == [pytest.approx(bigram, rel=1e-9)]
    assert logged["evaluation_part/validation_unigram_loss"].values == [pytest.approx(unigram, rel=1e-9)]
    # and the run itself, over the whole split
    whole = unigram_and_bigram_loss(corpus.train, task.evaluation_batches(split, "cpu"), corpus.tokenizer.vocab_size)
    log = load_training_log(run).validation
    names = ("validation/unigram_loss", "validation/bigram_loss")
    assert [log[name].values[-1] for name in names] == pytest.approx(whole, rel=1e-9)


def test_samples_and_their_words(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from manual_backprop.tasks.samples import count_words

    shown = said(capsys, "last", "--generate")
    found = re.search(r"--- sample 1 of 1: (.*)\n(The .*)\n", shown)
    assert found is not None
    assert found[1] == count_words(found[2])


def test_how_a_token_is_shown(copy: Path) -> None:
    tokenizer = load("last").tokenizer()
    shown = [shown_token(tokenizer, token) for token in (97, 10, 39, 0xC3, 256, 300)]
    assert shown == ["'a'", "'\\n'", '"\'"', "<195>", "<eos>", "<300>"]


# What is refused, and what is only said


def test_the_text_is_no_longer_there(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = copy / "checkpoints" / "step-000008"
    from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint

    saved = load_checkpoint(state)
    other = tmp_path / "other.txt"
    moved = {**saved.state, "config": saved.state["config"] | {"dataset": {"name": "text", "path": str(other)}}}
    manager = CheckpointManager(copy / "checkpoints", keep=None)
    manager.save(9, saved.tensors, moved, files=[copy / "tokenizer.json"])
    assert "What this run has learned from (dataset=text) cannot be read any more: " in refused(capsys, "last@9")
    other.write_bytes(b"\xff")
    told = refused(capsys, "last@9")
    assert f"cannot be read any more: {other}" in told
    assert "Correct it." in told
    assert "on_bad_row" not in told, "evaluate takes no keys"
    other.write_text("another text, in which other things are said. " * 20)
    told = refused(capsys, "last@9")
    assert f"{other} is not what this model was trained on: the dataset's digest is" in told


def test_a_relative_path_is_seen_from_where_the_run_was_started(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from run_tools import train

    started = tmp_path / "started"
    started.mkdir()
    shutil.copy(text, started / "mine.txt")
    monkeypatch.chdir(started)
    run = train(started, text, "dataset.path=mine.txt", "training.max_steps=1", "training.eval_every=1")
    monkeypatch.chdir(tmp_path)
    assert "validation: " in said(capsys, str(run))
    assert not (tmp_path / "outputs").exists()


def test_no_such_split(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "last", "--split", "test")
    assert "--split test: dataset=text has no test split yet; give a file or a folder" in told
    assert "--test here.txt: names the test split; add --split test" in refused(capsys, "last", "--test", "here.txt")
    assert "--split: invalid choice: 'tests'" in refused(capsys, "last", "--split", "tests")
    assert "--max-batches: must be a whole number of at least 1" in refused(capsys, "last", "--max-batches", "0")


def test_a_run_that_is_still_going_on(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = (copy / "metrics.jsonl").read_bytes()
    owner = open_run_directory(copy, step=8)
    try:
        assert "Not logged: the run is still training" in said(capsys, "last")
        assert (copy / "metrics.jsonl").read_bytes() == metrics
    finally:
        owner.release()


def test_a_checkpoint_outside_of_a_run(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = tmp_path / "step-000008"
    shutil.copytree(copy / "checkpoints" / "step-000008", alone)
    assert "Not logged: the checkpoint is not in a run directory." in said(capsys, str(alone))


@pytest.mark.slow
def test_into_mlflow_and_when_it_is_down(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run was made with tracking=none; delivering it is the same."""
    import sqlite3

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = find("last")
    metrics = {"evaluation/validation_loss": 2.5, "evaluation/validation_accuracy": 0.25}
    for _ in range(2):
        told = evaluation.log_evaluation(found, 8, "mlflow", metrics)
        assert told == "Logged to the run as evaluation/validation_* at step 8, in metrics.jsonl and MLflow."
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        rows = database.execute("select key, value, step from metrics where key like 'evaluation/%' order by key")
        assert rows.fetchall() == [("evaluation/validation_accuracy", 0.25, 8), ("evaluation/validation_loss", 2.5, 8)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    told = evaluation.log_evaluation(found, 4, "mlflow", metrics)
    assert "Logged to the run as evaluation/validation_* at step 4. MLflow did not take it" in told
    assert f"python -m manual_backprop.sync {copy.name}" in told
    assert json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])["metrics"] == metrics
