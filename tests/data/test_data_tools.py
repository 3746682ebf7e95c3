"""The tools for data on files of one's own: names, tokenizers, token shards, analysis, and how they end."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from manual_backprop import load_pretokenized, pretokenize_dataset, train_tokenizer, train_tokenizer_from_files
from manual_backprop.common.errors import InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.data.datasets import analysis
from manual_backprop.data.datasets import pretokenization as shards
from manual_backprop.data.datasets.named import dataset_named, shipped_datasets, short_name
from manual_backprop.data.sources.reading import training_text
from manual_backprop.data.tokens.token_shards import manifest_of
from manual_backprop.data.tokens.tokenizer import BpeTokenizer, ByteTokenizer, load_tokenizer
from manual_backprop.tools import download_dataset, inspect, tokenization
from manual_backprop.tools.dataset_arguments import pasted
from manual_backprop.training.command_line import check

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "big",
    "small",
    "red",
    "12",
    "345",
    "!",
    ",",
    "and",
    "then",
    "she",
    "he",
    "it",
    "was",
    "said",
    "Once",
    "time",
    "Größe",
    "日本",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = np.random.default_rng(3)
    lengths = draw.integers(3, 120, 200).tolist()
    return [" ".join(draw.choice(WORDS, length).tolist()) + ".\n" for length in lengths]


@pytest.fixture(scope="module")
def lines(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 2**13)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents(folder: Path, split: str) -> list[str]:
    tokens = load_pretokenized(folder, split)
    return [tokens.tokenizer.decode(tokens.document(number).tolist()) for number in range(tokens.documents)]


# Names


def test_a_dataset_by_one_word(lines: Path, tmp_path: Path) -> None:
    assert dataset_named("wikitext").config == "wikitext-2-raw-v1"
    assert dataset_named("fineweb", subset_size=9).subset_size == 9
    assert dataset_named("owner/name", revision="main").repository == "owner/name"
    assert dataset_named(lines).name == "jsonl"
    (tmp_path / "notes.md").write_text("text")
    assert (dataset_named(tmp_path).name, dataset_named(tmp_path / "notes.md").name) == ("text", "text")
    assert short_name("a/b/my notes.jsonl") == "my_notes"
    assert {"python_docs", "tinystories", "fineweb"} <= {name for name, _, _ in shipped_datasets()}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tinystory", {}, "did you mean tinystories"),
        ("text", {}, "is a kind of dataset: give"),
        ("no/such/folder", {}, "no dataset has this name"),
        ("python_docs", {"text_column": "body"}, "has no columns"),
        ("python_docs", {"revision": "main"}, "is not on the hub"),
    ],
)
def test_a_name_that_means_nothing(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        dataset_named(name, **options)


# Tokenizers


def test_transformers_loads_what_was_learned(texts: list[str], lines: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "a.txt").write_text(texts[0] * 20, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet")
    files = [tmp_path / "a.txt", lines, tmp_path / "b.parquet"]
    folder = train_tokenizer_from_files(files, 300, output=tmp_path / "learned")
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert len(theirs) == ours.vocab_size == 300
    named = [theirs.unk_token, theirs.pad_token, theirs.bos_token, theirs.eos_token]
    assert named == ["<unk>", "<pad>", "<bos>", "<eos>"]
    assert theirs.convert_tokens_to_ids(named) == [0, 1, 2, 3]
    assert ours.end_token_id == 3
    for text in [*texts[:5], "  spaces \n\t", "naïve 👩\u200d🔬"]:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    before = bytes_of(folder)
    assert train_tokenizer_from_files(files, 300, output=folder) == folder
    assert bytes_of(folder) == before
    with pytest.raises(InputError, match="exists and is not this tokenizer"):
        train_tokenizer_from_files(files, 280, output=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.parquet", "learned"]


def test_a_folder_that_is_something_else_is_refused_before_any_work(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    learned = train_tokenizer_from_files([lines], 270, output=tmp_path / "learned")

    def not_yet(*_: object, **__: object) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr("manual_backprop.data.datasets.tokenizer_training.text_of_files", not_yet)
    monkeypatch.setattr("manual_backprop.data.datasets.tokenizer_training.training_text", not_yet)
    for folder, options in (
        (tmp_path / "notes", {}),
        (learned, {"vocab_size": 280}),
        (learned, {"min_frequency": 3}),
    ):
        asked: dict[str, Any] = {"vocab_size": 270, "output": folder} | options
        with pytest.raises(InputError, match="exists and is not this tokenizer"):
            train_tokenizer_from_files([lines], **asked)
        with pytest.raises(InputError, match="exists and is not this tokenizer"):
            train_tokenizer(lines, **asked)


@pytest.mark.usefixtures("here")
def test_another_subset_or_frequency_has_another_name(lines: Path) -> None:
    folders = [
        train_tokenizer_from_files([lines], 270, **options)
        for options in ({}, {"subset_size": 50}, {"min_frequency": 5})
    ]
    assert [folder.name for folder in folders] == ["stories-270", "stories-270-first-50", "stories-270-min-5"]


@pytest.mark.parametrize("value", [0, -3, 2**70, "300", 1.5, True])
def test_numbers_that_mean_nothing_are_refused_before_any_work(value: Any, lines: Path, tmp_path: Path) -> None:
    for call in (
        lambda: train_tokenizer_from_files([lines], 300, subset_size=value, output=tmp_path / "x"),
        lambda: train_tokenizer_from_files([lines], 300, min_frequency=value, output=tmp_path / "x"),
        lambda: train_tokenizer_from_files([lines], value, output=tmp_path / "x"),
        lambda: train_tokenizer(lines, 300, subset_size=value, output=tmp_path / "x"),
        lambda: train_tokenizer(lines, value, output=tmp_path / "x"),
        lambda: analysis.analyze_dataset(lines, subset_size=value),
        lambda: analysis.analyze_dataset(lines, vocab_sizes=[value]),
        lambda: pretokenize_dataset(lines, "byte", subset_size=value, output=tmp_path / "x"),
        lambda: pretokenize_dataset(lines, "byte", value, output=tmp_path / "x"),
        lambda: pretokenize_dataset(lines, "byte", workers=value, output=tmp_path / "x"),
    ):
        with pytest.raises(InputError, match="must be a whole number from"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_no_name_is_not_the_folder_one_is_in(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No dataset was given"):
        train_tokenizer("", 300, output=tmp_path / "x")
    with pytest.raises(InputError, match="No file was given"):
        train_tokenizer_from_files("", 300, output=tmp_path / "x")
    with pytest.raises(InputError, match=r"No vocab_sizes were given"):
        analysis.analyze_dataset(tmp_path, vocab_sizes=[])


def test_rare_pairs_are_not_merged(lines: Path, tmp_path: Path) -> None:
    few = train_tokenizer_from_files([lines], 400, min_frequency=800, output=tmp_path / "few")
    assert 260 < load_tokenizer(few).vocab_size < 280


# Shards


def test_any_number_of_workers_writes_the_same_bytes(
    texts: list[str], lines: Path, tmp_path: Path, small_shards: None
) -> None:
    tokenizer = BpeTokenizer.train(texts, 300)
    one = pretokenize_dataset(lines, tokenizer, output=tmp_path / "one", workers=1)
    four = pretokenize_dataset(lines, tokenizer, output=tmp_path / "four", workers=4)
    assert bytes_of(one) == bytes_of(four)
    contents = manifest_of(one)
    assert len(contents["splits"]["train"]["shards"]) > 4
    assert contents["settings"]["tokenizer_digest"] == tokenizer.digest
    assert sorted(documents(one, "train") + documents(one, "validation")) == sorted(texts)
    tokens = load_pretokenized(one, "train")
    everything = np.concatenate(tokens.shards)
    assert len(tokens) == len(everything) == contents["splits"]["train"]["tokens"]
    begin = len(tokens.shards[0]) - 5
    assert tokens[begin : begin + 9].tolist() == everything[begin : begin + 9].tolist()
    assert (tokens[begin + 7], tokens[-1]) == (everything[begin + 7], everything[-1])
    assert isinstance(tokens.shards[0], np.memmap)
    assert everything[tokens.offsets[1:] - 1].tolist() == [tokenizer.end_token_id] * tokens.documents


def test_a_document_may_reach_over_shards(
    texts: list[str], tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manual_backprop.data.sources.spool.PIECE", 2**11)
    text = "".join(texts)
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    tokenizer = BpeTokenizer.train(texts, 300)
    folder = pretokenize_dataset(tmp_path / "one.txt", tokenizer, output=tmp_path / "tokens")
    tokens = load_pretokenized(folder, "train")
    assert (tokens.documents, len(tokens.shards) > 3) == (1, True)
    read = tokens.tokenizer.decode(tokens.document(0).tolist())
    assert text.startswith(read)
    assert len(read) > 0.85 * len(text), "a tenth is the validation split"
    assert tokens.document(0).tolist() == [*tokenizer.encode(read), tokenizer.end_token_id]


def test_longer_documents_are_cut_and_counted(texts: list[str], lines: Path, tmp_path: Path) -> None:
    folder = pretokenize_dataset(lines, "byte", 50, output=tmp_path / "tokens")
    splits = [load_pretokenized(folder, name) for name in ("train", "validation")]
    assert max(int(np.diff(split.offsets).max()) for split in splits) == 51
    kept = sorted(documents(folder, "train") + documents(folder, "validation"))
    assert kept == sorted(text.encode()[:50].decode("utf-8", "replace") for text in texts)
    cut = sum(split["cut"] for split in manifest_of(folder)["splits"].values())
    assert cut == sum(len(text.encode()) > 50 for text in texts)


def test_given_again_it_finds_its_work_done(lines: Path, tmp_path: Path) -> None:
    said: list[int] = []
    folder = pretokenize_dataset(lines, "byte", output=tmp_path / "tokens", progress=lambda *_: said.append(1))
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert said
    said.clear()
    assert pretokenize_dataset(lines, "byte", output=folder, progress=lambda *_: said.append(1)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert not said
    with pytest.raises(InputError, match=r"other tokens \(other max_length\)"):
        pretokenize_dataset(lines, "byte", 9, output=folder)
    with (folder / "train-00000.bin").open("r+b") as file:
        file.write(b"\xff")
    for again in (lambda: load_pretokenized(folder), lambda: pretokenize_dataset(lines, "byte", output=folder)):
        with pytest.raises(InputError, match=r"train-00000.bin is damaged"):
            again()


SLOWLY = """
import sys, time
from manual_backprop.data.datasets import pretokenization as shards
from manual_backprop.common.interruption import Interruption

def progress(done, *_):
    print(done, flush=True)
    time.sleep(0.3)

shards.SHARD = 2**13
with Interruption():
    shards.pretokenize_dataset(sys.argv[1], "byte", output=sys.argv[2], workers=1, progress=progress)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_one_goes_on(
    number: signal.Signals, lines: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SLOWLY, str(lines), str(tmp_path / "tokens")]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "1\n"
    child.send_signal(number)
    assert child.wait(30) != 0
    child.stdout.close()
    assert not (tmp_path / "tokens").exists()
    (partial,) = tmp_path.glob("tokens.*.partial")
    (written, *_) = sorted(partial.glob("*.bin"))
    for half in (".train-00003.json.1-a1b2c3", "train-00003.bin.tmp"):  # as a kill leaves it, now and in older versions
        (partial / half).write_bytes(b"{")
    time = written.stat().st_mtime_ns

    def not_again(*_: object) -> None:
        raise AssertionError("the text was read again")

    monkeypatch.setattr(shards, "_read_text", not_again)
    folder = pretokenize_dataset(lines, "byte", output=tmp_path / "tokens")
    assert (folder / written.name).stat().st_mtime_ns == time
    assert not partial.exists()
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD", 2**13)
    whole = pretokenize_dataset(lines, "byte", output=tmp_path / "whole")
    assert bytes_of(folder) == bytes_of(whole)


# Analysis


def test_a_small_tokenizer_is_the_beginning_of_a_large_one(texts: list[str]) -> None:
    large = BpeTokenizer.train(texts, 340)
    small = analysis.shortened(large, 290)
    trained = BpeTokenizer.train(texts, 290)
    assert json.loads(small.content) == json.loads(trained.content)
    assert small.vocab_size == 290


def test_the_numbers_of_a_report(tmp_path: Path) -> None:
    """Bytes as tokens: everything can be counted by hand."""
    for number in range(40):  # 40 documents of 7 bytes, of which some validate
        (tmp_path / f"{number:02}.txt").write_text("aaaa 1.")
    report, found = analysis.analyze_dataset(tmp_path, tokenizer="byte")
    (one,) = report.vocabularies
    count = report.documents
    assert 30 < count < 40
    assert (one.tokens, one.text_bytes, one.bytes_per_token) == (7 * count, 7 * count, 1.0)
    assert one.used == 4 / 257
    assert [one.covering(share) for share in (0.5, 0.57, 0.58, 0.999)] == [1, 1, 2, 4]
    shares = {name: round(share * 7) for name, (_, share) in one.classes.items()}
    assert shares == {"letters": 4, "numbers": 1, "punctuation": 1, "space": 1, "other": 0}
    assert one.rare == (3, 3 / 7)
    assert one.most_frequent[0] == ("a", 4 * count)
    assert set(one.lengths.tolist()) == {8}
    assert found.max_seq_len == 64
    assert found.embedding_parameters_saved == (50257 - found.vocab_size) * 256
    assert "7.0" not in report.summary()
    assert f"{7 * count:,}" in report.summary()


def test_classes_of_tokens() -> None:
    kinds = {" the": "letters", "été": "letters", "12": "numbers", " !": "punctuation", "\n ": "space", "": "other"}
    kinds |= {"a1": "other", "\ufffd": "other", "½": "numbers", "日本": "letters"}
    assert {text: analysis.class_of(text) for text in kinds} == kinds


# Commands


def given(main: Callable[[list[str]], None], *arguments: str) -> int:
    return exit_code_of(lambda: main(list(arguments)))


@pytest.mark.usefixtures("here")
def test_from_a_text_to_tokens(
    texts: list[str], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("".join(texts), encoding="utf-8")
    assert given(tokenization.main, "analyze", "notes.txt", str(lines), "--text-key", "text") == 0
    shown = capsys.readouterr().out
    for words in ("notes, V=", "stories, V=", "99.9% cover", "numbers", "rare", "longest", "notes: recommended"):
        assert words in shown
    assert (tmp_path / "outputs/analysis/notes-stories.png").read_bytes().startswith(b"\x89PNG")
    assert given(tokenization.main, "train", "file", "notes.txt", str(lines), "300") == 0
    assert "tokenizer.path=outputs/tokenizers/notes-and-1-more-300" in capsys.readouterr().out
    assert given(tokenization.main, "pretokenize", str(lines), "notes-and-1-more-300", "--max-length", "20") == 0
    folder = next((tmp_path / "outputs/pretokenized").glob("stories-notes*"))
    assert "of them cut" in capsys.readouterr().out
    assert given(inspect.main, str(folder), "--rows", "1") == 0
    shown = capsys.readouterr().out
    assert "columns: tokens (1 shards" in shown
    assert " ".join(map(str, load_pretokenized(folder).document(0).tolist())) in shown
    assert given(inspect.main, str(lines), "--rows", "2") == 0
    assert json.dumps({"text": texts[1]})[:80] in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_what_is_advised_can_be_pasted(texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "é ü 日本.txt").write_text("".join(texts), encoding="utf-8")
    for arguments, key in (
        (["train", "file", "é ü 日本.txt", "300"], "tokenizer"),
        (["train", "file", "é ü 日本.txt", "300", "--output", "my $tok's dir"], "tokenizer"),
        (["pretokenize", "é ü 日本.txt", "byte"], "dataset"),
        (["pretokenize", "é ü 日本.txt", "byte", "--output", "300"], "dataset"),
    ):
        assert given(tokenization.main, *arguments) == 0
        advised = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
        shell = ["bash", "-c", 'printf "%s\\n" ' + advised]  # as a shell understands what is pasted
        words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
        config = check(words[words.index("manual_backprop.run") + 1 :]).jobs[0].config
        path = config.tokenizer.path if key == "tokenizer" else config.dataset.path
        assert path is not None
        assert (tmp_path / path).is_dir()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("path", ["a b", "it's", "end\\", "b\\'c", "300", "null", "1e3", 'q"u`x!', "plain/x-1.0"])
def test_any_path_comes_back_from_what_is_pasted(path: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("text")
    (word,) = shlex.split(pasted("dataset.path", path))
    assert check(["dataset=text", word]).jobs[0].config.dataset.path == path
    assert pasted("dataset.path", "plain/x-1.0") == "dataset.path=plain/x-1.0"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (tokenization.main, ["analize"], "did you mean analyze"),
        (tokenization.main, ["analyze", "bad.jsonl"], "line 2: this is not JSON"),
        (tokenization.main, ["analyze", "bad.jsonl", "--picture", "x.jpg"], "must end in .png"),
        (tokenization.main, ["analyze", "bad.jsonl", "--text-key", "body"], "there is no 'body', only 'text'"),
        (tokenization.main, ["train", "registry", "bad.jsonl", "many"], "must be a whole number"),
        (tokenization.main, ["train", "registry", "bad.jsonl", "100"], "give at least 260"),
        (tokenization.main, ["train", "file", "none.txt", "300"], "there is no such file"),
        (tokenization.main, ["pretokenize", "bad.jsonl", "bpe"], "bpe is learned from a text"),
        (tokenization.main, ["pretokenize", "bad.jsonl", "byte"], "--skip-bad-rows"),
        (inspect.main, ["none.txt"], "no dataset has this name"),
        (download_dataset.main, ["python_docs"], "nothing to download"),
        (download_dataset.main, [], "--list shows"),
    ],
)
def test_bad_input_is_a_sentence(
    main: Callable[[list[str]], None],
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    assert given(main, *arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == [tmp_path / "bad.jsonl"]


@pytest.mark.parametrize("main", [tokenization.main, inspect.main, download_dataset.main])
def test_help_is_a_page(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > 12
    assert "Exit codes" in shown


def test_the_list_names_every_dataset_of_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    assert given(download_dataset.main, "--list") == 0
    shown = capsys.readouterr().out
    for name, _, dataset in shipped_datasets():
        assert (f"\n{name} " in shown) == (dataset.repository is not None)


def test_a_byte_tokenizer_writes_one_byte_more_than_bytes(lines: Path, texts: list[str], tmp_path: Path) -> None:
    """The end token follows every document, and nothing else is added."""
    folder = pretokenize_dataset(lines, ByteTokenizer(), output=tmp_path / "tokens")
    splits = manifest_of(folder)["splits"].values()
    assert sum(split["tokens"] for split in splits) == sum(len(text.encode()) + 1 for text in texts)


def test_a_text_that_is_read_for_once_is_gone_with_the_process(tmp_path: Path) -> None:
    """However that ends: the file has no name, and is read through the open one."""
    (tmp_path / "a.txt").write_text("some words " * 100)
    with training_text(dataset_named(str(tmp_path))) as reading:
        assert not list(reading.spool.path.parent.iterdir())
        assert "".join(next(reading.spool.texts(reading.train))).startswith("some words")
