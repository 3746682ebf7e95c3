"""task=classification: labelled texts, what is refused of them, the measures, and a run to its last command."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from run_tools import metric, newest, resume, same_process

from manual_backprop import evaluate, predict
from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint
from manual_backprop.common import exit_codes
from manual_backprop.common.errors import CheckpointError, ConfigError, InputError
from manual_backprop.config.schema import DatasetConfig, RunConfig, TokenizerConfig
from manual_backprop.data.sources.labelled import PACKAGES, open_labelled
from manual_backprop.data.tokens.augmentation import augmented
from manual_backprop.data.tokens.labelled_corpus import LabelledCorpus, open_test_split, prepare_labelled
from manual_backprop.tasks import preview_task
from manual_backprop.tasks.classification.measures import Measures, draw_confusion
from manual_backprop.tasks.classification.rows import LabelledOrder, TextRows, text_of
from manual_backprop.tracking.mlflow_model import is_servable, write_model
from manual_backprop.trained_models.saved_model import load
from manual_backprop.trained_models.served import load_pyfunc
from manual_backprop.training.command_line import check
from manual_backprop.training.runner import run_job

BYTES = TokenizerConfig("byte")
SMALL = ("task=classification", "tokenizer=byte", "model=tiny", "model.d_model=16", "model.d_ffn=24")
SMALL += ("model.n_blocks=1", "model.n_heads=2", "model.max_seq_len=32", "training=smoke", "training.batch_size=16")
SMALL += ("training.gradient_accumulation_steps=1", "training.max_steps=40", "training.eval_every=20", "device=cpu")
SMALL += ("training.save_every=20", "training.log_every=20", "training.keep_checkpoints=9", "tracking=none")
SMALL += ("optimizer.learning_rate=1e-2", "device.threads=1", "kernels.compile=never", "training.inspect_every=40")
SMALL += ("schedule=constant", "schedule.warmup_ratio=0")
ANIMALS = {"bird": ("owl", "crow", "swan"), "cat": ("lynx", "puma", "lion"), "fish": ("carp", "tuna", "pike")}


def rows_of(count: int = 120) -> list[tuple[str, str]]:
    """Texts of four words, of which one tells the label."""
    random = np.random.default_rng(0)
    labels = [list(ANIMALS)[n] for n in random.integers(3, size=count)]
    words = [ANIMALS[label][n] for label, n in zip(labels, random.integers(3, size=count), strict=True)]
    return [(f"{n % 97} days a {word} {n}", label) for n, (word, label) in enumerate(zip(words, labels, strict=True))]


def write(path: Path, rows: list[tuple[Any, Any]], columns: tuple[str, str] = ("text", "label")) -> Path:
    """In the format that its name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    else:
        sign = {".csv": ",", ".tsv": "\t"}[path.suffix]
        quoted = (f'"{text}"' if path.suffix == ".csv" else text for text, _ in rows)
        lines = [sign.join(columns), *(f"{text}{sign}{label}" for text, (_, label) in zip(quoted, rows, strict=True))]
        path.write_text("\n".join(lines) + "\n")
    return path


def corpus_of(path: Path, cache: Path, **settings: Any) -> LabelledCorpus:
    return prepare_labelled(DatasetConfig("labelled", str(path), **settings), BYTES, cache)


def texts_of(corpus: LabelledCorpus, name: str) -> list[tuple[str, str]]:
    split = corpus.splits[name]
    return [(text_of(corpus.tokenizer, split.ids(n)), corpus.labels[split.labels[n]]) for n in range(len(split))]


# Where texts come from


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_holds_the_same_rows(ending: str, tmp_path: Path) -> None:
    columns = ("what", "kind")
    path = write(tmp_path / f"rows.{ending}", rows_of(), columns)
    corpus = corpus_of(path, tmp_path / "cache", text_column="what", label_column="kind", test_share=0.2)
    assert corpus.labels == ("bird", "cat", "fish")
    splits = {name: texts_of(corpus, name) for name in ("train", "validation", "test")}
    assert sorted(row for split in splits.values() for row in split) == sorted(rows_of())
    in_all = Counter(label for _, label in rows_of())
    for name, share in (("validation", 0.1), ("test", 0.2)):  # of each label the same share
        assert Counter(label for _, label in splits[name]) == {label: int(n * share) for label, n in in_all.items()}
    again = corpus_of(path, tmp_path / "cache", text_column="what", label_column="kind", test_share=0.2)
    assert (texts_of(again, "train"), again.dataset_digest) == (splits["train"], corpus.dataset_digest)


def test_a_split_is_a_function_of_the_text_alone(tmp_path: Path) -> None:
    """Equal texts stay together, in whatever order they come; and each label is trained on."""
    rows = [*rows_of(), *rows_of()[::3], ("the only fox", "fox")]
    one, other = (
        corpus_of(write(tmp_path / name, some), tmp_path / "cache", validation=0.3)
        for name, some in (("one.jsonl", rows), ("other.jsonl", rows[::-1]))
    )
    train, validation = ({text for text, _ in texts_of(one, name)} for name in ("train", "validation"))
    assert not train & validation
    assert {text for text, _ in texts_of(other, "validation")} == validation
    assert "fox" in one.labels


def test_numbers_are_labels_and_a_quoted_cell_has_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        "\ufefftext,label\r\n".encode() + b"".join(b'"a, ""b""\n%d",%d\r\n' % (n, n % 2) for n in range(30))
    )
    corpus = corpus_of(path, tmp_path / "cache")
    assert corpus.labels == ("0", "1")
    assert ('a, "b"\n4', "0") in texts_of(corpus, "train") + texts_of(corpus, "validation")
    values = write(tmp_path / "rows.parquet", [(f"text {n}", n % 3) for n in range(30)])
    assert corpus_of(values, tmp_path / "cache").labels == ("0", "1", "2")


GOOD = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows_of(30))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD + '{"text": "  ", "label": "cat"}\n', r"a.jsonl, line 31: 'text' is empty.*on_bad_row=skip"),
        ("a.jsonl", GOOD + '{"text": "x", "label": ""}\n', r"line 31: 'label' is empty: expected a label"),
        ("a.jsonl", GOOD + '{"text": "x", "label": [1]}\n', r"line 31: 'label' is \[1\]: expected a label"),
        ("a.jsonl", GOOD + '{"text": 3, "label": "cat"}\n', r"line 31: 'text' should be text but is 3"),
        (
            "a.jsonl",
            GOOD + '{"text": "x"}\n',
            r"line 31: there is no 'label', only 'text'; name one: dataset.label_col",
        ),
        ("a.jsonl", GOOD + "{text}\n", r"line 31: this is not JSON"),
        ("a.jsonl", GOOD + "[1]\n", r"line 31: expected an object, as in \{'text': \.\.\., 'label'"),
        ("a.jsonl", GOOD + '{"text": "\\ud800", "label": "cat"}\n', r"line 31: 'text' has a half of a surrogate pair"),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xff", "label": "cat"}\n', r"line 31: 'text' has a byte 0xff at pos"),
        ("a.csv", "text,kind\nx,cat\n", r"a.csv, line 1: there is no column 'label', only 'text', 'kind'; name one"),
        ("a.csv", "text,text,label\nx,y,cat\n", r"line 1: there is 2 times the column 'text'"),
        ("a.csv", "text,label\nx,cat\ny\n", r"a.csv, line 3: this row has 1 cell, but the heading has 2 cells"),
        ("a.csv", 'text,label\n"x" y,cat\n', r"line 2: this is not CSV"),
        ("a.csv", "text,label\nx,cat\ny,cat\nz,cat\n", r"all \d training rows have the label 'cat', but a classifier"),
        ("a.csv", "text,label\na,1\nb,2\nc,3\nd,4\n", r"4 different labels in 4 training rows; is it the text\?"),
        ("a.csv", "text,label\n", r"There are no texts for training in .*rows read: 0"),
        ("a.txt", "x", r"ends in none of .jsonl, .*Give dataset.format=jsonl, csv, tsv, parquet, saved, hub"),
        ("a.parquet", "x", r"is damaged or not a Parquet file"),
    ],
)
def test_bad_input_is_named(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    """File, line, reason, way out."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=re.compile(words, re.DOTALL)):
        corpus_of(path, tmp_path / "cache")


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "", "label": "cat"}\n' + GOOD + "nothing\n")
    corpus = corpus_of(path, tmp_path / "cache", on_bad_row="skip")
    assert corpus.counts == {"rows": 32, "bad_rows": 2}
    assert corpus.notes[0].startswith(f"2 of 32 rows left out as bad, the first: {path}, line 1: 'text' is empty")
    with pytest.raises(InputError, match="2 of 32 rows left out as bad"):  # another run wants to hear of it
        corpus_of(path, tmp_path / "cache")


def test_a_label_that_only_another_split_has(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows_of(60))
    other = write(tmp_path / "other.jsonl", [*rows_of(9), ("an old dog", "dog")])
    words = r"other.jsonl, line 10: the label 'dog' is only in the {} split; training rows have 'bird', 'cat', 'fish'"
    with pytest.raises(InputError, match=words.format("validation")):
        corpus_of(train, tmp_path / "cache", validation=str(other))
    corpus = corpus_of(train, tmp_path / "cache")
    dataset = DatasetConfig("labelled", str(train), test=str(other))
    with pytest.raises(InputError, match=words.format("test")):
        open_test_split(dataset, corpus)
    with pytest.raises(InputError, match=r"has no test split yet; give a file or a folder, as dataset.test=PATH"):
        open_test_split(DatasetConfig("labelled", str(train)), corpus)


def test_the_docstrings_do_not_name_their_package() -> None:
    """Of every Python that the project runs on: eight packages, each with a hundred docstrings or more."""
    rows = list(open_labelled(DatasetConfig("docstrings")).rows())
    labels = Counter(row.label for row in rows)  # type: ignore[union-attr]
    assert tuple(sorted(labels)) == PACKAGES
    assert min(labels.values()) > 90
    texts = [row.text for row in rows]  # type: ignore[union-attr]
    assert len({*texts}) == len(texts) > 1500
    assert not any(re.search("|".join(PACKAGES), text, re.IGNORECASE) for text in texts)
    assert sum("PACKAGE" in text for text in texts) > 100


# Augmentation

TEXT = "the  quick brown fox jumps\nover the lazy dog and runs"


@pytest.mark.parametrize("kind", ["swap", "delete", "insert"])
def test_a_changed_text_is_a_function_of_seed_epoch_and_row(kind: str) -> None:
    words = Counter(TEXT.split())
    changed = [augmented(TEXT, [kind], 3, epoch, 5) for epoch in range(40)]
    assert changed == [augmented(TEXT, [kind], 3, epoch, 5) for epoch in range(40)]
    assert len({*changed}) > 10
    for other in ((4, 0, 5), (3, 0, 6)):
        assert [augmented(TEXT, [kind], other[0], epoch, other[2]) for epoch in range(40)] != changed
    for text in changed:
        now = Counter(text.split())
        if kind == "swap":
            assert now == words
        elif kind == "delete":
            assert now <= words
            assert now
        else:
            assert now.total() == words.total() + 1
            assert not words - now
    assert augmented("one", [kind], 0, 0, 0) == "one"
    assert augmented(TEXT, [], 0, 0, 0) == TEXT


def test_training_texts_alone_are_changed(tmp_path: Path) -> None:
    """Every epoch otherwise; what is measured and the labels stay, and the same step is the same batch."""
    corpus = corpus_of(write(tmp_path / "rows.jsonl", rows_of()), tmp_path / "cache")
    rows = TextRows(corpus.splits["train"], 64)
    plain, changing = (LabelledOrder(rows, corpus.tokenizer, kinds, 7, 8, 2) for kinds in ((), ("swap", "delete")))
    seen: dict[str, set[str]] = {}
    for step in range(2 * plain.steps_per_epoch):
        (count, first), (same, second) = plain.batches(step), changing.batches(step)
        batches, changed = list(first), list(second)
        assert count == same == sum(len(batch.targets) for batch in batches)
        assert [batch.first_row for batch in batches] == [batch.first_row for batch in changed]
        for one, other in zip(batches, changed, strict=True):
            assert torch.equal(one.targets, other.targets)
            for (a, n), (b, m) in zip(lines(one), lines(other), strict=True):
                seen.setdefault(corpus.tokenizer.decode(a[: n - 1]), set()).add(corpus.tokenizer.decode(b[: m - 1]))
        for one, other in zip(changed, changing.batches(step)[1], strict=True):
            assert torch.equal(one.inputs, other.inputs)
    assert {*seen} == {text for text, _ in texts_of(corpus, "train")}
    assert sum(len(texts) == 2 for texts in seen.values()) > len(seen) / 2
    assert changing.tokens_before(3) == plain.tokens_before(3)


def lines(batch: Any) -> list[tuple[list[int], int]]:
    return list(zip(batch.inputs.tolist(), batch.lengths.tolist(), strict=True))


# Measures


def test_macro_f1_is_scikit_learns() -> None:
    from sklearn.metrics import confusion_matrix, f1_score

    random = np.random.default_rng(0)
    for count, labels in ((1, 2), (7, 9), (300, 5)):
        wanted, found = random.integers(labels, size=(2, count))
        measures = Measures(wanted, found)
        assert measures.f1 == pytest.approx(f1_score(wanted, found, average="macro", zero_division=0), rel=1e-12)
        assert np.array_equal(measures.confusion(labels), confusion_matrix(wanted, found, labels=range(labels)))
    nothing = np.array([], dtype=np.int64)
    assert (Measures(nothing, nothing).f1, Measures(nothing, nothing).accuracy) == (0.0, 0.0)


def test_the_picture_of_many_labels(tmp_path: Path) -> None:
    wanted = np.arange(200) % 60
    names = [f"<$label {number}> {'long ' * 9}" for number in range(60)]
    assert draw_confusion(Measures(wanted, wanted), names, tmp_path / "a.png", "$a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# A run


def config_of(path: Path, *overrides: str) -> RunConfig:
    return check([*SMALL, "dataset=labelled", f"dataset.path='{path}'", *overrides]).jobs[0].config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run of rows whose test texts are a share of them."""
    folder = tmp_path_factory.mktemp("classification")
    with same_process():
        path = write(folder / "rows.jsonl", rows_of(240))
        run_job(config_of(path, "dataset.test_share=0.2", "dataset.augment=swap"), folder)
    return folder


@pytest.fixture
def run(root: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    return newest(root)


def test_what_a_run_leaves(run: Path) -> None:
    accuracy, f1 = metric(run, "validation/accuracy"), metric(run, "validation/f1")
    assert accuracy[-1] > 0.9 > 0.6 > metric(run, "validation/majority_accuracy")[-1]
    assert metric(run, "validation/tfidf_accuracy")[-1] > 0.9
    assert len(f1) == 2
    for name in ("accuracy", "f1", "loss", "majority_accuracy", "tfidf_f1"):
        assert metric(run, f"test/{name}")
    for picture in ("confusion.png", "training_progress.png", "inspection/attention.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    best = CheckpointManager(run / "checkpoints").best()
    assert best is not None
    saved = load_checkpoint(best)
    assert (saved.metric, saved.metric_name) == (max(accuracy), "validation/accuracy")
    assert json.loads((best / "labels.json").read_text()) == {"labels": ["bird", "cat", "fish"]}
    shown = (run / "samples/step-000040.txt").read_text().splitlines()
    assert 5 <= len(shown) <= 10
    assert all(re.match(r"(bird|cat|fish) \d+% (\u2713|\u2717 expected \w+)  \d+ days a ", line) for line in shown)
    assert "simple methods on the validation texts: the most frequent label" in (run / "run.log").read_text()


def test_it_is_measured_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["last@last", "--split", "test", "--predictions", "4"])
    page = capsys.readouterr().out
    assert f"{metric(run, 'test/accuracy')[0]:.2%}" in page
    assert len(re.findall(r"%\s+[\u2713\u2717]", page)) == 4
    assert re.search(r"majority +\d+\.\d+%", page)
    assert re.search(r"tfidf +\d+\.\d+%", page)
    assert metric(run, "evaluation/test_f1") == metric(run, "test/f1")
    Path("held-out.csv").write_text("text,label\n1 days a lynx 1,cat\n2 days a pike 2,fish\n")
    evaluate.main(["last", "--split", "test", "--test", "held-out.csv"])
    assert "test: 2 texts" in capsys.readouterr().out
    Path("bad.csv").write_text("text,label\n1 days a lynx 1,cat\n ,fish\n")
    for arguments, words in (
        (["--tokens", "3"], "--tokens: is not available for task=classification; available: --test, --predictions"),
        (
            ["--split", "test", "--test", "absent.jsonl"],
            "--split test: dataset.test=absent.jsonl: there is no such file",
        ),
        (
            ["--split", "test", "--test", "bad.csv"],
            r"--split test: bad\.csv, line 3: 'text' is empty.* correct this one, or remove it, and give the result as "
            "--test",
        ),
    ):
        with pytest.raises(InputError, match=words) as refused:
            evaluate.main(["last", *arguments])
        assert "on_bad_row" not in str(refused.value), "evaluate takes no keys"


def answers(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_is_asked_without_its_data(
    run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON lines of texts, of files in each format, and of stdin."""
    (root / "rows.jsonl").rename(tmp_path / "moved")
    try:
        predict.main([str(run), "--text", "8 days a puma 9", "--text", "3 days a carp 2"])
        cat, fish = answers(capsys)
        assert (cat["text"], cat["label"], fish["label"]) == ("8 days a puma 9", "cat", "fish")
        assert list(cat["probabilities"]) != list(fish["probabilities"])
        assert sum(cat["probabilities"].values()) == pytest.approx(1)
        assert max(cat["probabilities"], key=cat["probabilities"].__getitem__) == "cat"
        texts = [(text, "?") for text, _ in rows_of(70)]  # more than are asked at once
        (tmp_path / "plain.txt").write_text("".join(f"{text}\n\n" for text, _ in texts))
        labels = []
        for place in [
            tmp_path / "plain.txt",
            *(write(tmp_path / f"a.{end}", texts) for end in ("jsonl", "csv", "tsv")),
        ]:
            predict.main([str(run), "--file", str(place)])
            labels.append([answer["label"] for answer in answers(capsys)])
        assert labels[0] == labels[1] == labels[2] == labels[3]
        assert np.mean(np.array(labels[0]) == [label for _, label in rows_of(70)]) > 0.8
        for place in ("plain.txt", "a.jsonl"):
            with (tmp_path / place).open() as file:
                monkeypatch.setattr("sys.stdin", file)
                predict.main([str(run), "--file", "-"])
            assert [answer["label"] for answer in answers(capsys)] == labels[0]
    finally:
        (tmp_path / "moved").rename(root / "rows.jsonl")


def test_what_cannot_be_asked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the file and the line; what comes before it is answered."""
    (tmp_path / "a.jsonl").write_text('{"text": "a puma"}\n{"text": ""}\n')
    (tmp_path / "b.txt").write_bytes(b"a puma\n\xff\n")
    (tmp_path / "empty.txt").write_text("\n")
    write(tmp_path / "rows.parquet", [("a puma", "cat")])
    for arguments, words in (
        (["--file", "a.jsonl"], r"a.jsonl, line 2: 'text' is empty"),
        (["--file", "b.txt"], r"b.txt, line 2: byte 0 of the line is 0xff, which is not UTF-8"),
        (["--file", "empty.txt"], r"empty.txt: holds no input"),
        (["--file", "rows.parquet"], r"rows.parquet is a Parquet file, and --file reads text: JSON lines, CSV.*to_csv"),
        (["--file", "absent"], r"absent: cannot be read \(No such file"),
        (["--text", " "], r"is empty: there is nothing to classify"),
        ([], r"give --text TEXT or --file FILE"),
        (["--text", "a", "--file", "b"], r"give --text TEXT or --file FILE"),
    ):
        given = [str(tmp_path / word) if word.count(".") == 1 or word == "absent" else word for word in arguments]
        assert exit_codes.exit_code_of(lambda given=given: predict.main([str(run), *given])) == 2  # type: ignore[misc]
        assert re.search(words, capsys.readouterr().err), words
    (tmp_path / "text.txt").write_text("PAR1 is a word\n")
    assert [*predict.lines_of(str(tmp_path / "text.txt"))] == ["PAR1 is a word\n"]


def test_mlflow_serves_labels(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints/step-000040"
    assert is_servable(checkpoint)
    write_model(tmp_path / "model", checkpoint, "r", "m-1")
    described = json.loads((tmp_path / "model/MLmodel").read_text())
    text = [{"type": "string", "required": True}]
    assert {name: json.loads(value) for name, value in described["signature"].items()} == {
        "inputs": text,
        "outputs": text,
        "params": [],
    }
    served = load_pyfunc(str(tmp_path / "model/step-000040"))
    assert served.predict(["8 days a puma 9", "3 days a carp 2"]) == ["cat", "fish"]
    for given, params, words in (([3], {}, "3 is not a text"), (["a"], {"seed": 1}, "there is no parameter 'seed'")):
        with pytest.raises(InputError, match=words):
            served.predict(given, params)
    (tmp_path / "model/step-000040/labels.json").unlink()
    with pytest.raises(CheckpointError, match=r"labels\.json"):
        load_pyfunc(str(tmp_path / "model/step-000040"))


def test_it_goes_on_bit_for_bit_and_with_its_own_data_alone(root: Path, tmp_path: Path) -> None:
    """After half of its steps, in the epoch in which it stopped: the same texts, changed in the same way."""
    path = write(tmp_path / "rows.jsonl", rows_of(240))
    options = ("dataset.test_share=0.2", "dataset.augment=swap")
    run_job(config_of(path, *options, "training.max_steps=20", "training.inspect_every=null"), tmp_path)
    resume(tmp_path, f"resume={newest(tmp_path)}", "training.max_steps=40")
    there, here = (load_checkpoint(newest(one) / "checkpoints/step-000040") for one in (root, tmp_path))
    for name, tensor in there.tensors["parameters"].items():
        assert torch.equal(tensor, here.tensors["parameters"][name])
    write(path, rows_of(239))
    with pytest.raises(ConfigError, match="dataset: the texts or their labels have changed"):
        resume(tmp_path, f"resume={newest(tmp_path)}", "training.max_steps=50")


def test_a_plan_and_a_tokenizer_of_fewer_letters(root: Path, tmp_path: Path) -> None:
    preview = preview_task(config_of(root / "rows.jsonl"), root / "outputs/datasets")
    assert (preview.network_config.vocab_size, preview.network_config.n_outputs, preview.prepared) == (257, 3, False)
    assert "texts of 3 labels for training" in preview.examples[1]
    path = write(tmp_path / "rows.jsonl", [("ab" * (1 + n % 9), n % 2) for n in range(40)])
    other = write(tmp_path / "other.jsonl", [("abc", 0)])
    dataset = DatasetConfig("labelled", str(path), test=str(other))
    corpus = prepare_labelled(dataset, TokenizerConfig("char"), tmp_path / "cache")
    with pytest.raises(InputError, match=r"other.jsonl, line 1: The character 'c'"):
        open_test_split(dataset, corpus)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["dataset=python_docs"], "dataset=python_docs: task=classification learns from labelled, docstrings; use"),
        (["tokenizer=none"], "tokenizer=none: task=classification reads texts; use tokenizer=bpe"),
        (["network=decoder"], "network=decoder: task=classification needs network=encoder; leave it null"),
        (["batching=packed"], "batching=packed: task=classification never packs several examples"),
        (["dataset.augment=swop"], "swop is none of swap, delete, insert; did you mean swap?"),
        (["dataset.augment=swap,swap"], "must not name one of them twice"),
        (["dataset.augment=[]"], "must be some of swap, delete, insert, as in swap,delete, or null"),
        (["dataset.test_share=0.9"], "with dataset.validation=0.15 nothing is left to train on"),
        (
            ["dataset=labelled", "dataset.path=.", "dataset.label_column=text"],
            "is the column of the texts; name another",
        ),
        (
            ["dataset=labelled", "dataset.path=.", "dataset.test_share=0.1", "dataset.test=x"],
            "dataset.test_share=0.1: dataset.test=x is the test split",
        ),
        (["dataset=labelled", "dataset.path=.", "dataset.format=lines"], "dataset=labelled supports jsonl, csv"),
        (["dataset=labelled", "dataset.path=.", "dataset.split=test"], "only dataset.format=saved or hub has splits"),
        (["dataset=labelled", "dataset.path=x", "dataset.format=hub"], "a dataset of the hub is OWNER/NAME"),
        (["dataset=dates"], "or use task=translation"),
    ],
)
def test_refusals(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(["task=classification", *overrides, "tracking=none"])
    assert any(sentence in violation for violation in caught.value.violations), caught.value.violations


def test_changes_are_named_with_commas_and_swept_with_brackets() -> None:
    def of(*words: str) -> list[Any]:
        jobs = check(["task=classification", "tracking=none", *words]).jobs
        return [job.config.dataset.augment for job in jobs]

    assert of("dataset.augment=swap,delete,insert") == [("swap", "delete", "insert")]
    assert of("dataset.augment=swap") == of("dataset.augment=[swap]") == [("swap",)]
    assert of() == of("dataset.augment=null") == [None]
    jobs = check(["task=classification", "tracking=none", "dataset.augment=null,[swap,delete]"], multirun=True).jobs
    assert [job.config.dataset.augment for job in jobs] == [None, ("swap", "delete")]


def test_other_commands_say_what_to_use(run: Path) -> None:
    from manual_backprop import convert, generate

    asked = r"it was trained with task=classification; use it with python -m manual_backprop.predict \S+ --text"
    with pytest.raises(InputError, match=asked):
        generate.main([str(run), "--prompt", "a"])
    with pytest.raises(InputError, match=asked):
        generate.main([str(run), "--source", "a"])
    with pytest.raises(InputError, match="transformers"):
        convert.main(["to-hf", str(run), "exported"])
    assert load(str(run)).line.startswith("custom (gpt2, fp32): ")


# What `diagnose` says of rows


def test_a_diagnosis_of_rows(root: Path, one_thread: None) -> None:
    """All seven checks, and of what is wrong with an order each time the one that looks for it."""
    from manual_backprop.study.diagnosis import Diagnosis
    from manual_backprop.study.diagnosis.rows import RowLoader
    from manual_backprop.tasks import open_task

    config = config_of(root / "rows.jsonl", "training.batch_size=8")
    task = open_task(config, root / "outputs/datasets")
    assert [finding.status for finding in Diagnosis(task).findings()] == ["passed"] * 7
    for wrong, check_1, check_7 in (
        (lambda batch, _: replace(batch, targets=batch.targets * 0), "there is nothing to distinguish", None),
        (lambda batch, _: replace(batch, targets=batch.targets + 1), "not among the 3 outputs of the network", None),
        (lambda batch, _: replace(batch, first_row=3), None, "says that it begins at row 3; it is row 0"),
        (lambda batch, _: replace(batch, lengths=batch.lengths - 1), None, "its longest row has"),
        (lambda batch, call: replace(batch, inputs=batch.inputs + call), None, "another batch each time"),
        (lambda batch, _: replace(batch, targets=batch.targets - 100 * (batch.targets == 0)), None, "is divided by"),
    ):
        order = task.order()
        given, calls = order.batches, iter(range(10**6))

        def batches(step: int, device: Any = "cpu", wrong: Any = wrong, given: Any = given, calls: Any = calls) -> Any:
            count, some = given(step, device)
            return count, (wrong(batch, next(calls)) for batch in some)

        order.batches = batches  # type: ignore[method-assign]
        loader = RowLoader(config, order, 3)
        for words, found in ((check_1, loader.labels()), (check_7, loader.order_and_masks())):
            assert words is None or words in found.reason, found
            assert (found.status == "passed") == (words is None), found
    order = task.order()
    plan = order._plan  # type: ignore[attr-defined]
    order._plan = lambda epoch: plan(0)  # type: ignore[attr-defined]
    assert "every epoch has the same order" in RowLoader(config, order, 3).order_and_masks().reason


def test_a_text_that_it_reads_is_looked_at(run: Path) -> None:
    """Where every head looks, and the likeliest labels of all of it."""
    from manual_backprop.trained_models.saved_model import find
    from manual_backprop.visualizer.model_view import look

    seen = look(find(str(run)), "8 days a puma")
    assert (len(seen.tokens), seen.next[0][0][0], len(seen.next[0])) == (1, "cat", 3)
    (attention,) = seen.maps.values()
    assert "".join(attention.rows) == "".join(attention.columns) == "8␣days␣a␣puma∅"
    assert attention.heads.shape == (2, 14, 14)  # its end too
    assert np.allclose(attention.heads.sum(-1), 1)
