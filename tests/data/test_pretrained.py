"""tokenizer=file: tokenizers that others made, in the forms in which they lie in a folder."""

import shutil
from pathlib import Path

import pytest
import tokenizers

from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
from manual_backprop.data.tokens.corpus import prepare_corpus
from manual_backprop.data.tokens.pretrained import tokenizer_of_folder
from manual_backprop.data.tokens.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer

TEXT = "the cat and the dog, the dog and the cat; <|endoftext|> is text here, grün 日本 👩\u200d🔬\n"


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json, vocab.json and merges.txt, which truncates and pads with its end token."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 5, 300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save_model(str(folder))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8, pad_id=0, pad_token="<|endoftext|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_folder_of_the_tokenizers_library(gpt2_like: Path) -> None:
    tokenizer = tokenizer_of_folder(gpt2_like)
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 8
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.end_token_id == 0
    assert 0 not in ids
    assert tokenizer_of_folder(gpt2_like / "tokenizer.json").digest == tokenizer.digest


def test_a_folder_with_the_two_files_of_gpt2(gpt2_like: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(gpt2_like / name, tmp_path)
    tokenizer = tokenizer_of_folder(tmp_path)
    assert tokenizer.encode(TEXT) == tokenizer_of_folder(gpt2_like).encode(TEXT)
    assert tokenizer.end_token_id == 0


def test_a_folder_that_transformers_saved(gpt2_like: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(gpt2_like / "tokenizer.json"), eos_token="<|endoftext|>")
    theirs.save_pretrained(str(tmp_path))
    tokenizer = tokenizer_of_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.end_token_id == theirs.eos_token_id


def test_our_own_tokenizers(tmp_path: Path) -> None:
    for name, made in (
        ("byte", ByteTokenizer()),
        ("char", CharTokenizer(TEXT)),
        ("bpe", BpeTokenizer.train([TEXT], 280)),
    ):
        (tmp_path / name).mkdir()
        made.save(tmp_path / name)
        assert tokenizer_of_folder(tmp_path / name).encode(TEXT) == made.encode(TEXT)


def test_a_corpus_of_such_a_tokenizer(gpt2_like: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 30)
    config = DatasetConfig("text", str(tmp_path / "text.txt"))
    corpus = prepare_corpus(config, TokenizerConfig("file", path=str(gpt2_like)), tmp_path / "cache")
    assert corpus.tokenizer.decode(corpus.train.tolist()) == (TEXT * 30)[: len(TEXT) * 27]
    assert corpus.train[-1] == 0
    assert corpus.validation[-1] == 0
    again = tokenizer_of_folder(next((tmp_path / "cache").glob("text-file-*/")))
    assert again.digest == corpus.tokenizer_digest


def test_a_tokenizer_that_loses_something_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    lowercase = tokenizers.ByteLevelBPETokenizer(lowercase=True)
    lowercase.train_from_iterator(["a text"], 300, special_tokens=["[SEP]"], show_progress=False)
    lowercase.save(str(tmp_path / "tokenizer/tokenizer.json"))
    (tmp_path / "text.txt").write_text("some Text " * 30)
    config = DatasetConfig("text", str(tmp_path / "text.txt"))
    corpus = prepare_corpus(config, TokenizerConfig("file", path=str(tmp_path / "tokenizer")), tmp_path / "cache")
    no_end, lost = corpus.notes
    assert no_end.startswith("the tokenizer has no end token (<eos>, <|endoftext|>")
    assert (
        lost == "the tokenizer does not preserve the text: 'Text some Text some ' is decoded as 'text some text some '"
    )
    own = prepare_corpus(config, TokenizerConfig("bpe", 300), tmp_path / "cache")
    assert own.notes == ()


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.path=.*absent: there is no such folder"):
        tokenizer_of_folder(tmp_path / "absent")
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match=r"expected tokenizer\.json there, but found model\.bin"):
        tokenizer_of_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(InputError, match=r"vocab\.json and merges\.txt in .* are not a tokenizer"):
        tokenizer_of_folder(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer=gpt: there is no such tokenizer"):
        prepare_corpus(DatasetConfig("python_docs"), TokenizerConfig("gpt"), tmp_path)
