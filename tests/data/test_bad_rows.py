"""What is no text ends a run, with its place and reason, or is left out and counted: nothing is silent."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
from manual_backprop.data.tokens.corpus import Corpus, prepare_corpus

BYTE = TokenizerConfig("byte")
GOOD = [f"row {number} of good text" for number in range(30)]


def line(text: object) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def jsonl(folder: Path, bad: bytes, after: int = 30) -> DatasetConfig:
    """`after` good rows, one more line, and a good row."""
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(line(GOOD[number % 30]) for number in range(after)) + bad + line("the last"))
    return DatasetConfig("jsonl", str(path))


def texts(corpus: Corpus) -> list[str]:
    return [
        corpus.tokenizer.decode(tokens[begin:end].tolist())
        for tokens, offsets in (
            (corpus.train, corpus.train_offsets),
            (corpus.validation, corpus.validation_offsets),
        )
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]


BAD_LINES = {
    "cut off": (b'{"text": "abc\n', "this is not JSON"),
    "no JSON": (b"text\n", "this is not JSON"),
    "an array": (b"[1, 2]\n", "expected an object with a 'text', but this is a list"),
    "another column": (b'{"title": "a", "body": "b"}\n', "there is no 'text', only 'title', 'body'.*text_column=NAME"),
    "null": (line(None), "'text' should be text but is null"),
    "a number": (line(12.5), r"'text' should be text but is the number 12\.5"),
    "a list": (line(["a"]), "'text' should be text but is a list"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}\n', "byte 13 of the line is 0xe9, which is not UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16") + b"\n", "not UTF-8"),
    "half a surrogate pair": (b'{"text": "a\\ud800b"}\n', r"half of a surrogate pair \('\\ud800'\) at position 1"),
    "deep nesting": (b'{"text": ' + b"[" * 200_000 + b"\n", "this is not JSON"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_with_its_place_and_reason(bad: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 31: .*{reason}.*dataset\.on_bad_row=skip"):
        prepare_corpus(jsonl(tmp_path, bad), BYTE, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/"))


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_left_out_and_counted(bad: bytes, reason: str, tmp_path: Path) -> None:
    config = replace(jsonl(tmp_path, bad, after=120), on_bad_row="skip")
    corpus = prepare_corpus(config, BYTE, tmp_path / "cache")
    assert corpus.counts == {"rows": 122, "bad_rows": 1, "empty_documents": 0}
    assert len(texts(corpus)) == 121
    (note,) = corpus.notes
    assert note.startswith("1 bad row of 122 was left out: ")
    assert "line 121" in note
    with pytest.raises(InputError, match=r"line 121.*on_bad_row=skip"):  # what was skipped is no less bad now
        prepare_corpus(replace(config, on_bad_row="error"), BYTE, tmp_path / "cache")


def test_of_several_bad_rows_the_first_is_named(tmp_path: Path) -> None:
    config = replace(jsonl(tmp_path, b"bad\nworse\n", after=250), on_bad_row="skip")
    (note,) = prepare_corpus(config, BYTE, tmp_path / "cache").notes
    assert note.startswith("2 bad rows of 253 were left out, the first: ")
    assert "line 251" in note


def test_more_than_one_bad_row_in_a_hundred_ends_it(tmp_path: Path) -> None:
    config = replace(jsonl(tmp_path, b"bad\nbad\n", after=150), on_bad_row="skip")
    with pytest.raises(InputError, match=r"2 of 153 rows are bad, more than the 1%.*first: .*line 151"):
        prepare_corpus(config, BYTE, tmp_path / "cache")


def test_too_many_bad_rows_end_a_long_reading_early(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"bad\n" * 10_000 + line("good") * 10)
    with pytest.raises(InputError, match="10000 of 10000 rows are bad"):
        prepare_corpus(DatasetConfig("jsonl", str(path), on_bad_row="skip"), BYTE, tmp_path / "cache")


def test_marks_line_ends_and_blank_lines_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    content = ["a\x00b", "crlf\r\n inside", "\ufeffmark", "👩\u200d🔬", *GOOD]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(line(text).rstrip() for text in content) + b"\r\n\r\n")
    corpus = prepare_corpus(DatasetConfig("jsonl", str(path)), BYTE, tmp_path / "cache")
    assert sorted(texts(corpus)) == sorted(content)
    assert corpus.notes == ()


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    corpus = prepare_corpus(jsonl(tmp_path, line("") * 3), BYTE, tmp_path / "cache")
    assert corpus.notes == ("3 empty documents of 34 were left out",)
    assert len(texts(corpus)) == 31
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    (folder / "b.txt").touch()
    corpus = prepare_corpus(DatasetConfig("text", str(folder)), BYTE, tmp_path / "cache")
    assert corpus.notes == ("1 empty document of 2 was left out",)


@pytest.mark.parametrize("name", ["text", "jsonl"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_nothing_but_an_empty_file(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"no text for training in .*rows\.jsonl"):
        prepare_corpus(DatasetConfig(name, str(path)), BYTE, tmp_path / "cache")


@pytest.mark.parametrize("character", ["日", pytest.param("x", marks=pytest.mark.slow)])
def test_a_line_of_ten_megabytes_without_a_space(character: str, tmp_path: Path) -> None:
    """Learning merges takes the square of a word's length."""
    size = 10_000_000 // len(character.encode())
    begin = time.process_time()
    corpus = prepare_corpus(
        jsonl(tmp_path, json.dumps({"text": character * size}, ensure_ascii=False).encode() + b"\n"),
        TokenizerConfig("bpe", 300),
        tmp_path / "cache",
    )
    assert character * size in texts(corpus)
    assert time.process_time() - begin < 60


def test_a_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number:03}.txt").write_text(f"text {number}")
    (folder / "050.txt").write_bytes(b"x" * 2**21 + b"\nabc\n\xff and more")
    config = DatasetConfig("text", str(folder))
    with pytest.raises(InputError, match=r"050\.txt, line 3: byte 2097157 of the file is 0xff"):
        prepare_corpus(config, BYTE, tmp_path / "cache")
    corpus = prepare_corpus(replace(config, on_bad_row="skip"), BYTE, tmp_path / "cache")
    assert sorted(texts(corpus)) == sorted(f"text {number}" for number in range(200) if number != 50)
    assert corpus.counts["bad_rows"] == 1


def parquet(path: Path, column: pyarrow.Array, name: str = "text") -> DatasetConfig:
    pyarrow.parquet.write_table(pyarrow.table({name: column}), path, row_group_size=100)
    return DatasetConfig("parquet", str(path))


def test_parquet_rows(tmp_path: Path) -> None:
    content = [f"row {number} grün" for number in range(2500)]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        config = parquet(tmp_path / "rows.parquet", pyarrow.array(content).cast(kind))
        corpus = prepare_corpus(config, BYTE, tmp_path / "cache")
        assert sorted(texts(corpus)) == sorted(content)


def test_bad_parquet_rows(tmp_path: Path) -> None:
    invalid = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"ab\xff\xfe")]
    )
    config = parquet(tmp_path / "rows.parquet", pyarrow.concat_arrays([pyarrow.array(GOOD), invalid]))
    with pytest.raises(InputError, match=r"rows\.parquet, row 32: 'text' is not UTF-8 \(byte 0\)"):
        prepare_corpus(config, BYTE, tmp_path / "cache")
    config = parquet(tmp_path / "rows.parquet", pyarrow.array([*GOOD, None]))
    with pytest.raises(InputError, match=r"rows\.parquet, row 31: 'text' should be text but is null"):
        prepare_corpus(config, BYTE, tmp_path / "cache")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda path: path.write_text("no Parquet"), lambda path: path.write_text("")]
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_damaged_parquet_file(damage: Callable[[Path], object], on_bad_row: str, tmp_path: Path) -> None:
    """How many rows are lost nobody knows, so that they cannot be counted: it always ends here."""
    path = tmp_path / "rows.parquet"
    config = replace(parquet(path, pyarrow.array(GOOD * 100)), on_bad_row=on_bad_row)
    damage(path)
    with pytest.raises(InputError, match=r"rows\.parquet is damaged or not a Parquet file; .* up to row \d+"):
        prepare_corpus(config, BYTE, tmp_path / "cache")


def test_a_wrong_column(tmp_path: Path) -> None:
    config = parquet(tmp_path / "rows.parquet", pyarrow.array(GOOD), "story")
    with pytest.raises(InputError, match=r"has no column 'text', only 'story'.*dataset\.text_column=NAME"):
        prepare_corpus(config, BYTE, tmp_path / "cache")
    corpus = prepare_corpus(replace(config, text_column="story"), BYTE, tmp_path / "cache")
    assert sorted(texts(corpus)) == sorted(GOOD)
    config = parquet(tmp_path / "rows.parquet", pyarrow.array(range(30)))
    with pytest.raises(InputError, match=r"the column 'text' holds int64, not text"):
        prepare_corpus(config, BYTE, tmp_path / "cache")


def test_two_columns_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    twice = pyarrow.Table.from_arrays([pyarrow.array(GOOD), pyarrow.array(GOOD)], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(InputError, match=r"has 2 columns named 'text'.*rename all but one"):
        prepare_corpus(DatasetConfig("parquet", str(path)), BYTE, tmp_path / "cache")


@pytest.mark.parametrize("content", ['[\n{"text": "a"},\n{"text": "b"}\n]\n', '[{"text": "a"}, {"text": "b"}]'])
def test_a_json_array_is_called_one(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"rows\.json, line 1: .*a JSON array; write one object per line"):
        prepare_corpus(DatasetConfig("jsonl", str(path)), BYTE, tmp_path / "cache")


def test_what_skipping_can_do_is_said(tmp_path: Path) -> None:
    config = jsonl(tmp_path, b'{"text": "cut\n', after=0)
    with pytest.raises(InputError, match=r"on_bad_row=skip, .* no more than 1% of all rows") as caught:
        prepare_corpus(config, BYTE, tmp_path / "cache")
    assert "at at" not in str(caught.value)
    with pytest.raises(
        InputError, match=r"1 of 2 rows is bad, .*line 1: .*\. Correct such rows, or remove .* from the data"
    ):
        prepare_corpus(replace(config, on_bad_row="skip"), BYTE, tmp_path / "cache")


@pytest.mark.parametrize("line", ['{"text": "unterminated', '{"text": "a" x}'])
def test_a_position_in_a_line_is_said_once(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=r"this is not JSON \([^)]* at column \d+\)") as caught:
        prepare_corpus(DatasetConfig("jsonl", str(path)), BYTE, tmp_path / "cache")
    assert "at at" not in str(caught.value)
