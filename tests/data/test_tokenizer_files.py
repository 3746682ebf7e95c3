"""A tokenizer is what its own files say: real ones of several kinds, against `transformers` where it can load them."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
from manual_backprop.data.tokens.corpus import prepare_corpus
from manual_backprop.data.tokens.pretrained import tokenizer_of_folder
from manual_backprop.data.tokens.run_tokenizer import tokenizer_identity
from manual_backprop.data.tokens.tokenizer import FILE_NAME, SETTINGS_FILE, load_tokenizer
from manual_backprop.trained_models.text_stream import UNREADABLE, WholeCharacters, prompt_tokens
from manual_backprop.trained_models.tokenizer_files import write_tokenizer

TEXT = "the cat sat on the mat, and the dog sat on the cat. "
SPECIAL = ["<unk>", "<s>", "</s>", "<end>"]


def settings(**more: object) -> dict[str, object]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<end>", **more}


def learned(made: Tokenizer, trainer: object) -> Tokenizer:
    made.train_from_iterator([TEXT] * 5, trainer)
    return made


def byte_fallback() -> Tokenizer:
    """As Llama's: blanks are letters, unknown characters are bytes, a token begins every text."""
    words = {token: number for number, token in enumerate(SPECIAL)}
    words |= {f"<0x{byte:02X}>": len(SPECIAL) + byte for byte in range(256)}
    for letter in ["▁", *sorted(set(TEXT) - {" "})]:
        words[letter] = len(words)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "t"), ("▁", "c"), ("▁c", "at")]
    for pair in merges:
        words["".join(pair)] = len(words)
    made = Tokenizer(models.BPE(vocab=words, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def metaspace() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return learned(made, trainer)


def word_piece() -> Tokenizer:
    """As BERT's: it puts a token before and one behind, and writes in small letters."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made = learned(made, trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False))
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made.post_processor = template
    return made


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return learned(made, trainer)


KINDS = [byte_fallback, metaspace, word_piece, byte_level]


def folder_of(made: Tokenizer, folder: Path, content: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / FILE_NAME))
    if content is not None:
        (folder / SETTINGS_FILE).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_makes_of_the_same_files(kind: Callable[[], Tokenizer], tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = folder_of(kind(), tmp_path / "theirs", settings(unk_token="<unk>", pad_token="</s>"))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder), tokenizer_of_folder(folder)
    assert ours.end_token_id == theirs.eos_token_id == SPECIAL.index("<end>")
    got, want = prompt_tokens(ours, "the cat sat"), theirs("the cat sat")["input_ids"]
    assert got == want[: len(got)]
    assert want[len(got) :] == [2] * (kind is word_piece)  # what it puts behind a text is no part of a prompt
    assert ours.decode(got) == theirs.decode(got, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # to-hf, and the checkpoint of a run
    (tmp_path / "exported").mkdir()
    write_tokenizer(ours, tmp_path / "exported", 64)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "exported")
    assert again.special_tokens_map == theirs.special_tokens_map
    assert again("the cat sat")["input_ids"] == want
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    (tmp_path / "saved" / "manifest.json").write_text("{}")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.digest, saved.end_token_id, saved.begin_token_ids) == (
        ours.digest,
        ours.end_token_id,
        ours.begin_token_ids,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_all_ids_decoded_at_once(kind: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizer_of_folder(folder_of(kind(), tmp_path))
    chance = random.Random(0)
    texts = [tokenizer.encode(text) for text in (TEXT * 4, "the cat sat on the mat", "sat ☕ 日本 é!")]
    drawn = [[chance.randrange(tokenizer.vocab_size + 2) for _ in range(chance.randrange(1, 90))] for _ in range(60)]
    for tokens in texts + drawn:
        for begin in {0, len(tokens) // 3}:
            characters = WholeCharacters(tokenizer, tokens[:begin])
            streamed = "".join([*map(characters.add, tokens[begin:]), characters.rest()])
            whole, before = tokenizer.decode(tokens), tokenizer.decode(tokens[:begin])
            if whole.startswith(before) and not before.endswith(
                UNREADABLE
            ):  # a prompt does not end inside of a character
                assert streamed == whole[len(before) :]


def test_the_files_of_an_older_version_are_what_they_were(tmp_path: Path) -> None:
    """It read tokenizer.json alone and put nothing before a text."""
    folder = folder_of(byte_fallback(), tmp_path)
    (folder / "manifest.json").write_text("{}")
    older = tokenizer_of_folder(folder)
    assert (older.begin_token_ids, older.end_token_id) == ((), SPECIAL.index("</s>"))
    (folder / "manifest.json").unlink()
    now = tokenizer_of_folder(folder)
    assert now.begin_token_ids == (SPECIAL.index("<s>"),)
    assert now.digest != older.digest


def test_caches_and_digests_know_both_files(tmp_path: Path) -> None:
    folder = folder_of(byte_fallback(), tmp_path / "tokenizer", settings())
    (tmp_path / "text.txt").write_text(TEXT * 40)
    text, config = DatasetConfig("text", str(tmp_path / "text.txt")), TokenizerConfig("file", path=str(folder))
    corpus = prepare_corpus(text, config, tmp_path / "cache")
    assert (corpus.train[0], corpus.train[-1]) == (1, SPECIAL.index("<end>"))
    identity = tokenizer_identity(config)
    folder_of(byte_fallback(), folder, settings(eos_token={"content": "</s>", "special": True}))
    assert tokenizer_identity(config) != identity
    other = prepare_corpus(text, config, tmp_path / "cache")
    assert other.train[-1] == SPECIAL.index("</s>")
    assert other.tokenizer_digest != corpus.tokenizer_digest
    folder_of(byte_fallback(), folder, settings(eos_token=None))
    assert tokenizer_of_folder(folder).end_token_id is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps(settings(eos_token="<nowhere>")), "names the eos_token '<nowhere>'"),
        ("[]", "is damaged"),
        ("{", "is damaged"),
    ],
)
def test_settings_that_do_not_fit_are_refused(content: str, says: str, tmp_path: Path) -> None:
    folder = folder_of(byte_level(), tmp_path)
    (folder / SETTINGS_FILE).write_text(content)
    with pytest.raises(InputError, match=says):
        tokenizer_of_folder(folder)


def test_an_unknown_token_that_the_vocabulary_lacks_is_a_sentence(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"the": 0, "cat": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tokenizer_of_folder(folder_of(made, tmp_path))
    with pytest.raises(InputError, match="cannot encode every character"):
        list(tokenizer.encode_many(["the cat", "the dog"]))


def test_what_a_tokenizer_drops_is_counted_and_refused_above_a_share(tmp_path: Path) -> None:
    letters = {letter: number for number, letter in enumerate(sorted(set(TEXT)))}
    silent = Tokenizer(models.BPE(vocab=letters, merges=[]))  # no unknown token: what it lacks is left out
    silent.decoder = decoders.Fuse()
    cut = byte_level()
    cut.normalizer = normalizers.Replace(Regex("[é☕]"), "")
    for name, made in (("silent", silent), ("cut", cut)):
        folder = folder_of(made, tmp_path / name)
        config = TokenizerConfig("file", path=str(folder))
        few, many = tmp_path / "few.txt", tmp_path / "many.txt"
        few.write_text(TEXT * 50 + "é☕" + TEXT)
        many.write_text((TEXT + "é☕é☕") * 40)
        corpus = prepare_corpus(DatasetConfig("text", str(few)), config, tmp_path / "cache")
        assert any("no token for 5 of 2,657 bytes" in note for note in corpus.notes), corpus.notes
        with pytest.raises(InputError, match="no token for 400 of 2,480 bytes"):
            prepare_corpus(DatasetConfig("text", str(many)), config, tmp_path / "cache")


def test_what_became_the_unknown_token_is_counted(tmp_path: Path) -> None:
    config = TokenizerConfig("file", path=str(folder_of(word_piece(), tmp_path / "words")))
    (tmp_path / "text.txt").write_text(TEXT * 5 + "zzz " + TEXT * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corpus = prepare_corpus(DatasetConfig("text", str(tmp_path / "text.txt")), config, tmp_path / "cache")
    assert any(note.startswith("1 of ") and "unknown token" in note for note in corpus.notes), corpus.notes
