"""Tokenizers: every text comes back as it was, and a saved one is the same one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from manual_backprop.common.errors import InputError
from manual_backprop.data.tokens.tokenizer import (
    FILE_NAME,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
)

TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog over the fox",
    "  leading and trailing  \n\n\t\r\n",
    "naïve café, Grüße, 日本語, עברית, \u0000 nul, \u200b zero width, \ufeff mark, \u2028 separator",
    "👩\u200d🔬🇩🇪 e\u0301",
    "<eos> is text here, <pad> and <|endoftext|> too",
    "".join(map(chr, range(1, 256))),
    "",
]


def make(name: str) -> Tokenizer:
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.train(TEXTS)
    return BpeTokenizer.train(TEXTS, 290)


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_every_text_comes_back(name: str, tmp_path: Path) -> None:
    tokenizer = make(name)
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert (loaded.digest, loaded.vocab_size, loaded.end_token_id) == (
        tokenizer.digest,
        tokenizer.vocab_size,
        tokenizer.end_token_id,
    )
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert isinstance(ids, list)
        assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.end_token_id for token in ids)
        assert tokenizer.decode(ids) == text
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == text


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_many_texts_are_encoded_as_each_by_itself(name: str) -> None:
    tokenizer = make(name)
    assert [ids.tolist() for ids in tokenizer.encode_many(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]


HARD = [
    *range(0x300),
    0x301,
    0x600,
    0xAD,
    0x0E33,
    *range(0x200B, 0x2010),
    0x2028,
    0x202E,
    0x3000,
    0xAC00,
    0x1100,
    0xD7FF,
]
HARD += [0xE000, 0xFB01, 0xFE0F, *range(0xFFF0, 0x10000), 0x1F1E9, 0x1F469, 0x1F3FD, 0xE0001, 0xF0000, 0x10FFFF]


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_random_texts_of_what_is_hard_come_back(name: str) -> None:
    """Controls, marks, neighbours of surrogates, joiners, and the spelling of tokens."""
    random = np.random.default_rng(0)
    pieces = [*map(chr, HARD), "<eos>", "<|endoftext|>", "<unk>", "  ", "\r\n", "Ġ", "'s", "\ufeff", "the", "0123"]
    tokenizer = make(name)
    for length in random.integers(1, 40, 2000):
        text = "".join(pieces[place] for place in random.integers(0, len(pieces), length))
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_what_is_no_text_is_shown_as_replacement_characters(name: str) -> None:
    tokenizer = make(name)
    ids = tokenizer.encode("the")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 9, *ids]) == "the\ufffd\ufffdthe"


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_half_a_character_can_be_shown(name: str) -> None:
    tokenizer = ByteTokenizer() if name == "byte" else BpeTokenizer.train(["nothing to learn"], 257)
    assert tokenizer.decode([*tokenizer.encode("a"), *tokenizer.encode("日")[:2]])[:2] == "a\ufffd"


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_half_a_surrogate_pair_is_refused_with_its_position(name: str) -> None:
    tokenizer = make(name)
    for encode in (tokenizer.encode, lambda text: list(tokenizer.encode_many([text]))):
        with pytest.raises(InputError, match=r"surrogate.*position 3"):
            encode("abc\ud800")


def test_byte_tokens_are_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_token_id) == (257, 256)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]


def test_char_tokens_are_the_characters_of_the_corpus_in_order() -> None:
    tokenizer = CharTokenizer.train(["hello", "日 "])
    assert tokenizer.characters == [" ", "e", "h", "l", "o", "日"]
    assert (tokenizer.vocab_size, tokenizer.end_token_id) == (6, None)
    assert tokenizer.encode("oh 日") == [4, 2, 0, 5]


@pytest.mark.parametrize(("text", "said"), [("hello!", r"'!' \(U\+0021, at position 5\)"), ("\ud800", r"U\+D800")])
def test_a_character_outside_the_corpus_is_named(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        CharTokenizer.train(["hello"]).encode(text)


def test_a_char_tokenizer_needs_characters() -> None:
    with pytest.raises(InputError, match="none"):
        CharTokenizer.train([""])


def test_bpe_learns_what_was_asked_and_its_end_token_is_not_text() -> None:
    tokenizer = BpeTokenizer.train(TEXTS, 270)
    assert tokenizer.vocab_size == 270
    assert tokenizer.end_token_id == 0
    assert len(tokenizer.encode("the")) < 3
    assert tokenizer.end_token_id not in tokenizer.encode("<eos>")


def test_bpe_learns_fewer_tokens_where_the_text_is_too_small() -> None:
    assert BpeTokenizer.train(["abab"], 300).vocab_size == 258  # "ab" is the only pair that is seen twice


@pytest.mark.parametrize("size", [256, 0, -1])
def test_bpe_needs_a_token_for_each_byte(size: int) -> None:
    with pytest.raises(InputError, match=f"vocab_size={size}.*at least 257"):
        BpeTokenizer.train(TEXTS, size)


def test_bpe_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from manual_backprop.data.tokens.tokenizer import BpeTokenizer;"
        "print(BpeTokenizer.train(Path(sys.argv[1]).read_text().split('\\f'), 600).digest)"
    )
    path = tmp_path / "text"
    path.write_text("\f".join(Path(file).read_text() for file in (__file__, np.__file__)))
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, path],
            env={"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path.cwd())},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for parallel, seed in (("true", "1"), ("false", "2"), ("true", "3"))
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64


def test_a_tokenizer_of_another_maker_can_be_loaded(tmp_path: Path) -> None:
    import tokenizers

    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    foreign.save(str(tmp_path / FILE_NAME))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.end_token_id) == (2, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[]", "no known tokenizer"),
        (b'{"format": "manual_backprop tokenizer 1", "name": "char"}', "no known tokenizer"),
        (b'{"format": "manual_backprop tokenizer 9", "name": "byte"}', "no known tokenizer"),
        (b'{"model": {"type": "nonsense"}}', "tokenizers library"),
    ],
)
def test_what_is_no_tokenizer_is_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_tokenizer(tmp_path)


def test_large_vocabularies_take_four_bytes_a_token() -> None:
    tokenizer = CharTokenizer(chr(point) for point in range(0xE000, 0xE000 + 2**16))
    assert tokenizer.dtype is np.uint16
    tokenizer = CharTokenizer(chr(point) for point in range(0xE000, 0xE000 + 2**16 + 1))
    assert tokenizer.dtype is np.uint32
    assert [ids.tolist() for ids in tokenizer.encode_many(["\ue000", chr(0xE000 + 2**16)])] == [[0], [2**16]]
