"""Runs on each shape of batches, and on prepared tokens: what they report, and that a resume in the middle of an epoch
sees what is next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_tools import assert_same_tensors, config_of, metric, resume, same_process, train

from manual_backprop import pretokenize_dataset
from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
from manual_backprop.data.datasets import pretokenization as shards
from manual_backprop.data.tokens.corpus import prepare_corpus
from manual_backprop.data.tokens.token_shards import TokenShards, manifest_of
from manual_backprop.data.tokens.tokenizer import CharTokenizer
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
    assert "1 bad row of 150 was left out: " in said
    assert "line 150: 'text' should be text but is the number 7" in said
    seen = metric(run, "tokens_seen")
    assert len(seen) == 22  # steps of 6 of the 130 documents, and one of 4
    assert seen[-1] < 22 * 6 * 8
    assert seen == sorted(set(seen))
    assert read_run(run)["status"] == "FINISHED"
    assert load_training_log(run).config["batching"] == {"name": "padded"}


# Prepared tokens


@pytest.fixture(scope="module")
def tokens(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as shards of about 200 bytes."""
    dataset = DatasetConfig("jsonl", str(rows), text_column="text", on_bad_row="skip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 200)
        return pretokenize_dataset(dataset, "byte", output=tmp_path_factory.mktemp("tokens") / "tokens")


PREPARED = ("dataset=pretokenized", "tokenizer=pretokenized", *ROWS[2:])


@pytest.mark.parametrize("shape", SHAPES)
def test_prepared_tokens_train_as_their_text_does(
    shape: tuple[str, ...], rows: Path, tokens: Path, tmp_path: Path
) -> None:
    """To the last bit, over the border of an epoch; and again after a resume in the middle of one."""
    assert len(manifest_of(tokens)["splits"]["train"]["shards"]) > 10
    long = (*shape, "training.max_steps=26", "training.save_every=10", "training.keep_checkpoints=3")
    with same_process():
        text = train(tmp_path / "text", rows, *ROWS, *long)
        run = train(tmp_path / "tokens", tokens, *PREPARED, *long)
        assert_same_tensors(run / "checkpoints/step-000026", text / "checkpoints/step-000026")
        for name in ("train/loss", "tokens_seen", "validation/loss", "validation/bits_per_byte"):
            assert metric(run, name) == metric(text, name)
        moved = Path(shutil.copytree(tokens, tmp_path / "moved"))
        resume(tmp_path / "tokens", f"resume={run / 'checkpoints' / 'step-000010'}", f"dataset.path='{moved}'")
    assert_same_tensors(run / "checkpoints/step-000026", text / "checkpoints/step-000026")
    assert metric(run, "train/loss") == metric(text, "train/loss")
    assert not (tmp_path / "tokens/outputs/datasets").exists(), "they are read where they lie"
    assert "1 bad row of 150 was left out" in (run / "run.log").read_text()


def test_prepared_tokens_are_mapped_not_read(tokens: Path) -> None:
    config = config_of(tokens, *PREPARED)
    corpus = prepare_corpus(config.dataset, config.tokenizer, "nowhere")
    assert isinstance(corpus.train, TokenShards)
    everything = np.concatenate(corpus.train.shards)
    places = np.random.default_rng(5).integers(0, len(everything), (7, 9))
    assert corpus.train[places].tolist() == everything[places].tolist()
    assert corpus.train[places].dtype == everything.dtype
    with pytest.raises(IndexError, match=f"of {len(everything)}"):
        corpus.train[np.array([len(everything)])]


def test_cut_tokens_are_another_text(rows: Path, tokens: Path, tmp_path: Path) -> None:
    """Of which only what is kept counts as text, and of which a run says that it was cut."""
    dataset = DatasetConfig("jsonl", str(rows), text_column="text", on_bad_row="skip")
    cut = pretokenize_dataset(dataset, "byte", 6, output=tmp_path / "cut")
    config = config_of(cut, *PREPARED)
    corpus = prepare_corpus(config.dataset, config.tokenizer, "nowhere")
    assert corpus.train_bytes == len(corpus.train) - corpus.train_documents
    whole = prepare_corpus(config_of(tokens, *PREPARED).dataset, config.tokenizer, "nowhere")
    assert whole.train_bytes == len(whole.train) - whole.train_documents
    assert whole.dataset_digest != corpus.dataset_digest
    assert whole.tokenizer_digest == corpus.tokenizer_digest
    assert any(note.endswith("documents have more than 6 tokens and were cut there") for note in corpus.notes)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("tokenizer=bpe",), "add tokenizer=pretokenized"),
        (("dataset.subset_size=5",), "dataset.subset_size=5: the documents and splits of dataset=pretokenized"),
        (("dataset.validation=0.5",), "dataset.validation=0.5: the documents and splits of dataset=pretokenized"),
        (("dataset=text",), "tokenizer=pretokenized: belongs to dataset=pretokenized"),
    ],
)
def test_what_prepared_tokens_do_not_go_with(overrides: tuple[str, ...], words: str, tokens: Path) -> None:
    named = {override.partition("=")[0] for override in overrides}
    others = [one for one in PREPARED if one.partition("=")[0] not in named]
    with pytest.raises(ConfigError) as caught:
        config_of(tokens, *others, *overrides)
    assert any(words in violation for violation in caught.value.violations)


def test_prepared_tokens_that_cannot_be_used(rows: Path, tokens: Path, tmp_path: Path) -> None:
    def prepared(folder: Path, tokenizer: str = "pretokenized", **more: str) -> None:
        prepare_corpus(DatasetConfig("pretokenized", str(folder)), TokenizerConfig(tokenizer, **more), tmp_path)

    prepared(tokens, "byte")  # which it is
    CharTokenizer("abc").save(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer=file: the tokens in .* are from another tokenizer; use"):
        prepared(tokens, "file", path=str(tmp_path))
    with pytest.raises(InputError, match="holds no token shards"):
        prepared(rows.parent)
    prepare_corpus(DatasetConfig("jsonl", str(rows), on_bad_row="skip"), TokenizerConfig("byte"), tmp_path / "cache")
    with pytest.raises(InputError, match="is damaged, or is not the manifest of token shards"):
        prepared(next((tmp_path / "cache").glob("*/")))
    damaged = Path(shutil.copytree(tokens, tmp_path / "damaged"))
    with (damaged / "train-00003.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(InputError, match=r"train-00003.bin is damaged"):
        prepared(damaged)
    with pytest.raises(InputError, match="holds tokens, not text"):
        pretokenize_dataset(tokens, "byte", output=tmp_path / "again")
