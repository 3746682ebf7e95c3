"""The cache of prepared text: made once, shared by processes, never used when it is damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from manual_backprop.common.errors import InputError, StorageError
from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
from manual_backprop.data.sources.registry import open_source
from manual_backprop.data.tokens.corpus import Corpus, prepare_corpus, prepared_corpus
from manual_backprop.data.tokens.token_cache import MANIFEST

FILES = {f"{number:02}.txt": f"This is text number {number}, grün und schön.\n" * (number + 1) for number in range(30)}
BYTE = TokenizerConfig("byte")


@pytest.fixture
def text(tmp_path: Path) -> DatasetConfig:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
    return DatasetConfig("text", str(folder))


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "tokenizer", [TokenizerConfig("byte"), TokenizerConfig("char"), TokenizerConfig("bpe", 300)], ids=lambda t: t.name
)
def test_a_corpus_holds_the_text(text: DatasetConfig, tokenizer: TokenizerConfig, tmp_path: Path) -> None:
    corpus = prepare_corpus(text, tokenizer, tmp_path / "cache")
    train, validation = (corpus.tokenizer.decode(tokens.tolist()) for tokens in (corpus.train, corpus.validation))
    assert sorted(train + validation) == sorted("".join(FILES.values()))
    assert len(train.encode()) == corpus.train_bytes
    assert len(validation.encode()) == corpus.validation_bytes
    assert corpus.train_documents + corpus.validation_documents == 30
    assert corpus.validation_documents >= 1
    assert isinstance(corpus.train, np.memmap)
    assert corpus.train.dtype == np.uint16
    assert not corpus.train.flags.writeable
    assert corpus.tokenizer_digest == corpus.tokenizer.digest
    end = corpus.tokenizer.end_token_id
    if end is not None:
        assert (corpus.train == end).sum() == corpus.train_documents
        assert corpus.train[-1] == end
        assert (corpus.train[corpus.train_offsets[1:] - 1] == end).all()
    assert corpus.train_offsets[0] == 0
    assert corpus.train_offsets[-1] == len(corpus.train)
    assert corpus.validation_offsets[-1] == len(corpus.validation)


def test_a_second_call_finds_the_same_files(text: DatasetConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = prepare_corpus(text, BYTE, cache)
    (entry,) = entries(cache)
    times = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    second = prepare_corpus(text, BYTE, cache)
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == times
    tokens = {"train.bin", "train.offsets.bin", "validation.bin", "validation.offsets.bin"}
    assert set(times) == {*tokens, "tokenizer.json", MANIFEST}
    assert (second.train == first.train).all()
    assert second.dataset_digest == first.dataset_digest


def test_what_changes_the_tokens_makes_another_corpus(text: DatasetConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = prepare_corpus(text, TokenizerConfig("bpe", 300), cache)
    other_size = prepare_corpus(text, TokenizerConfig("bpe", 301), cache)
    assert other_size.dataset_digest == first.dataset_digest
    assert other_size.tokenizer_digest != first.tokenizer_digest
    (Path(text.path or "") / "00.txt").write_text("changed")
    changed = prepare_corpus(text, TokenizerConfig("bpe", 300), cache)
    assert changed.dataset_digest != first.dataset_digest
    assert len(entries(cache)) == 3
    prepare_corpus(text, TokenizerConfig("byte", 300), cache)
    prepare_corpus(text, TokenizerConfig("byte", None), cache)  # a size that means nothing here changes nothing
    assert len(entries(cache)) == 4


def test_the_same_text_elsewhere_is_the_same_corpus(text: DatasetConfig, tmp_path: Path) -> None:
    first = prepare_corpus(text, BYTE, tmp_path / "cache")
    moved = shutil.copytree(text.path or "", tmp_path / "moved")
    assert (
        prepare_corpus(DatasetConfig("text", str(moved)), BYTE, tmp_path / "cache").dataset_digest
        == first.dataset_digest
    )
    assert len(entries(tmp_path / "cache")) == 1


def test_a_single_text_by_characters_is_cut_without_additions(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_text("0123456789" * 100)
    corpus = prepare_corpus(DatasetConfig("text", str(path)), TokenizerConfig("char"), tmp_path / "cache")
    assert corpus.tokenizer.vocab_size == 10
    assert corpus.train.tolist() == list(range(10)) * 90
    assert corpus.validation.tolist() == list(range(10)) * 10


def test_bpe_sees_the_training_split_only(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_text("abcdefghij" * 90 + "zyxwvutsrq" * 10)
    corpus = prepare_corpus(DatasetConfig("text", str(path)), TokenizerConfig("bpe", 270), tmp_path / "cache")
    assert len(corpus.tokenizer.encode("abcdefghij")) < 3
    assert len(corpus.tokenizer.encode("zyxwvutsrq")) == 10


def test_a_text_too_small_for_its_vocabulary_is_said_each_time(tmp_path: Path, caplog) -> None:
    (tmp_path / "input.txt").write_text("ab" * 10)
    for _ in range(2):
        caplog.clear()
        corpus = prepare_corpus(
            DatasetConfig("text", str(tmp_path / "input.txt")), TokenizerConfig("bpe", 300), tmp_path / "cache"
        )
        assert corpus.tokenizer.vocab_size < 300
        assert f"tokenizer.vocab_size=300 tokens: the tokenizer has {corpus.tokenizer.vocab_size}" in caplog.text


def damage_token(entry: Path) -> None:
    data = bytearray((entry / "train.bin").read_bytes())
    data[7] ^= 1
    (entry / "train.bin").write_bytes(data)


def shorten(entry: Path) -> None:
    os.truncate(entry / "validation.bin", 10)


def damage_tokenizer(entry: Path) -> None:
    (entry / "tokenizer.json").write_text("{}")


def remove_tokens(entry: Path) -> None:
    (entry / "train.bin").unlink()


def remove_manifest(entry: Path) -> None:
    (entry / MANIFEST).unlink()


def damage_manifest(entry: Path) -> None:
    (entry / MANIFEST).write_text("[")


def forget_a_digest(entry: Path) -> None:
    manifest = json.loads((entry / MANIFEST).read_text())
    del manifest["contents"]["sha256"]["train.bin"]
    (entry / MANIFEST).write_text(json.dumps(manifest))


def claim_fewer_tokens(entry: Path) -> None:
    manifest = json.loads((entry / MANIFEST).read_text())
    manifest["contents"]["splits"]["train"]["tokens"] -= 1
    (entry / MANIFEST).write_text(json.dumps(manifest))


def claim_other_settings(entry: Path) -> None:
    manifest = json.loads((entry / MANIFEST).read_text())
    manifest["contents"]["settings"]["format"] += 1
    (entry / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        damage_token,
        shorten,
        damage_tokenizer,
        remove_tokens,
        remove_manifest,
        damage_manifest,
        forget_a_digest,
        claim_fewer_tokens,
        claim_other_settings,
    ],
)
def test_a_damaged_corpus_is_prepared_again(damage, text: DatasetConfig, tmp_path: Path, caplog) -> None:
    cache = tmp_path / "cache"
    want = prepare_corpus(text, BYTE, cache).train.tolist()
    (entry,) = entries(cache)
    manifest = (entry / MANIFEST).read_bytes()
    damage(entry)
    assert prepare_corpus(text, BYTE, cache).train.tolist() == want
    assert (entry / MANIFEST).read_bytes() == manifest
    assert entries(cache) == [entry]
    assert "damaged" in caplog.text


def test_a_corpus_in_use_stays_readable_while_its_place_is_taken(text: DatasetConfig, tmp_path: Path) -> None:
    corpus = prepare_corpus(text, BYTE, tmp_path / "cache")
    want = corpus.train.tolist()
    (entry,) = entries(tmp_path / "cache")
    (entry / MANIFEST).unlink()
    prepare_corpus(text, BYTE, tmp_path / "cache")
    assert corpus.train.tolist() == want


def test_what_a_killed_process_left_is_swept_away(text: DatasetConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare_corpus(text, BYTE, cache)
    (entry,) = entries(cache)
    partial = entry.rename(f"{entry}.partial-12345")
    (partial / MANIFEST).unlink()
    prepare_corpus(text, BYTE, cache)
    assert entries(cache) == [entry]


PREPARE = """
import sys
from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
from manual_backprop.data.tokens.corpus import prepare_corpus
print("ready", flush=True)
sys.stdin.readline()
corpus = prepare_corpus(DatasetConfig("text", sys.argv[1]), TokenizerConfig("bpe", 500), sys.argv[2])
print(corpus.tokenizer_digest, corpus.dataset_digest, int(corpus.train.sum()), len(corpus.validation), flush=True)
"""


def start(text: DatasetConfig, cache: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, text.path or "", str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_that_start_together_share_one_corpus(text: DatasetConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    processes = [start(text, cache) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len(set(answers)) == 1
    assert len(entries(cache)) == 1


def test_what_takes_long_is_said(text: DatasetConfig, tmp_path: Path, monkeypatch, caplog) -> None:
    """A process that waits for another one, and one that has much to do."""
    cache = tmp_path / "cache"
    prepare_corpus(text, TokenizerConfig("bpe", 500), cache)
    caplog.clear()
    (folder,) = entries(cache)
    shutil.rmtree(folder)
    with FileLock(folder.with_name(folder.name + ".lock")):
        process = start(text, cache)
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert "waiting for another process, which is preparing" in process.stderr.readline()
    assert process.communicate(timeout=60)[0]
    assert process.returncode == 0

    assert caplog.text == ""
    monkeypatch.setattr("manual_backprop.data.tokens.corpus.LARGE", 1000)
    prepare_corpus(text, BYTE, tmp_path / "other")
    assert "tokenizing 0 MB of text, once" in caplog.text


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    path, cache = tmp_path / "large.txt", tmp_path / "cache"
    words = np.random.default_rng(0).integers(0, 10**6, 300_000)
    path.write_text(" ".join(map(str, words)))
    text = DatasetConfig("text", str(path))
    process = start(text, cache)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while not list(cache.glob("*.partial-*/text")) and time.monotonic() < deadline:  # it has begun
        time.sleep(0.005)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list(cache.glob(f"*/{MANIFEST}")), "killed too late to test anything"
    corpus = prepare_corpus(text, TokenizerConfig("bpe", 500), cache)
    assert corpus.tokenizer.vocab_size == 500
    assert len(entries(cache)) == 1


def test_a_cache_that_cannot_be_written_is_a_storage_error(text: DatasetConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"cannot be stored in .*file"):
        prepare_corpus(text, BYTE, tmp_path / "file")


def test_bad_input_leaves_no_corpus_behind(text: DatasetConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(InputError, match="at least 257"):
        prepare_corpus(text, TokenizerConfig("bpe", 256), cache)
    with pytest.raises(InputError, match=r"tokenizer\.vocab_size=NUMBER"):
        prepare_corpus(text, TokenizerConfig("bpe"), cache)
    with pytest.raises(InputError, match="no such tokenizer"):
        prepare_corpus(text, TokenizerConfig("word"), cache)
    with pytest.raises(InputError, match="no such file"):
        prepare_corpus(DatasetConfig("text", str(tmp_path / "absent")), BYTE, cache)
    (Path(text.path or "") / "bad").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"bad, line 1: byte 0 .*not UTF-8 \([a-z ]+\)\. Correct it, or .*=skip"):
        prepare_corpus(text, BYTE, cache)
    assert entries(cache) == []


@pytest.mark.slow
def test_python_docs_with_bpe(tmp_path: Path) -> None:
    config = DatasetConfig("python_docs"), TokenizerConfig("bpe", 1024)
    corpus: Corpus = prepare_corpus(*config, tmp_path)
    assert corpus.tokenizer.vocab_size == 1024
    assert len(corpus.train) > 400_000
    assert corpus.train.max() == 1023
    assert 2 < corpus.train_bytes / len(corpus.train) < 4
    assert "\n" in corpus.tokenizer.decode(corpus.validation[:300].tolist())
    begin = time.process_time()
    prepare_corpus(*config, tmp_path)
    assert time.process_time() - begin < 2  # it takes 0.05 s; making it takes 4 s


@pytest.mark.parametrize("tokenizer", [TokenizerConfig("byte"), TokenizerConfig("char"), TokenizerConfig("bpe", 300)])
def test_a_document_is_found_by_its_offsets(tokenizer: TokenizerConfig, text: DatasetConfig, tmp_path: Path) -> None:
    corpus = prepare_corpus(text, tokenizer, tmp_path / "cache")
    found = [
        corpus.tokenizer.decode(corpus.train[begin:end].tolist())
        for begin, end in zip(corpus.train_offsets[:-1], corpus.train_offsets[1:], strict=True)
    ]
    assert len(found) == corpus.train_documents
    assert set(found) <= set(FILES.values())


def test_tokens_do_not_depend_on_how_much_is_read_at_once(tmp_path: Path, monkeypatch) -> None:
    """Neither on pieces of a long document, nor on batches; also where characters have several bytes."""
    random = np.random.default_rng(1)
    words = [
        "grün",
        "the",
        "cat's",
        "日本",
        " ",
        "\n",
        "\t",
        "x=1",
        "...",
        "\u00a0",
        "\u2028",
        "\r\n",
        "e\u0301",
        "👩\u200d🔬",
    ]
    long = " ".join(words[place] for place in random.integers(0, len(words), 30_000))
    path = tmp_path / "long.txt"
    path.write_bytes(long.encode())
    config = DatasetConfig("text", str(path)), TokenizerConfig("bpe", 400)
    whole = prepare_corpus(*config, tmp_path / "whole")
    monkeypatch.setattr("manual_backprop.data.sources.spool.PIECE", 1000)
    monkeypatch.setattr("manual_backprop.data.sources.spool.BATCH", 5000)
    monkeypatch.setattr("manual_backprop.data.sources.files.CHUNK", 777)
    pieces = prepare_corpus(*config, tmp_path / "pieces")
    assert pieces.tokenizer_digest == whole.tokenizer_digest
    assert (pieces.train == whole.train).all()
    assert (pieces.validation == whole.validation).all()
    assert (whole.train[:-1] == whole.tokenizer.encode(long[: len(long) - -(-len(long) // 10)])).all()


def test_bpe_learns_from_all_over_a_text_that_is_too_long(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("manual_backprop.data.sources.spool.SAMPLE", 3000)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:03}").write_text(f"{'begin' if number < 50 else 'finish'} " * 30)
    corpus = prepare_corpus(DatasetConfig("text", str(folder)), TokenizerConfig("bpe", 280), tmp_path / "cache")
    assert len(corpus.tokenizer.encode(" begin finish")) == 2


def test_a_subset_and_a_share_make_another_corpus(text: DatasetConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    few = prepare_corpus(replace(text, subset_size=25), BYTE, tmp_path / "cache")
    assert few.train_documents + few.validation_documents == 25
    half = prepare_corpus(replace(text, validation=0.5), BYTE, tmp_path / "cache")
    assert half.validation_bytes > 0.4 * half.train_bytes
    whole = prepare_corpus(text, BYTE, tmp_path / "cache")
    assert len({few.dataset_digest, half.dataset_digest, whole.dataset_digest}) == 3


def test_what_is_prepared_is_found_without_writing(text: DatasetConfig, tmp_path: Path) -> None:
    assert prepared_corpus(text, BYTE, tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()
    made = prepare_corpus(text, BYTE, tmp_path / "cache")
    found = prepared_corpus(text, BYTE, tmp_path / "cache")
    assert found is not None
    assert (found.train == made.train).all()


def test_a_text_that_changes_while_it_is_read_is_refused(text: DatasetConfig, tmp_path: Path) -> None:
    source = open_source(text)
    (Path(text.path or "") / "00.txt").write_text("other")
    with pytest.raises(InputError, match=r"00\.txt changed while it was being read"):
        source.check_unchanged()


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """20 MB more text, in one document and in many, is not 20 MB more memory."""
    code = """
import resource, sys
from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
from manual_backprop.data.tokens.corpus import prepare_corpus
for name in ("small", "large"):
    config = DatasetConfig("jsonl", f"{sys.argv[1]}/{name}.jsonl")
    prepare_corpus(config, TokenizerConfig("byte"), f"{sys.argv[1]}/cache")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    row = json.dumps({"text": "some words in a row " * 100}) + "\n"
    (tmp_path / "small.jsonl").write_text(row * 2000)
    (tmp_path / "large.jsonl").write_text(row * 20_000)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    assert large - small < 15, (small, large)
