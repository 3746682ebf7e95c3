"""What `inspect` shows of data that is damaged: what is bad has its reason in its place, and the rest is shown."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.data.tokens.tokenizer import CharTokenizer
from manual_backprop.tools import inspect

GOOD = [f"row {number} of good text" for number in range(30)]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert exit_code_of(lambda: inspect.main([*map(str, arguments)])) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert exit_code_of(lambda: inspect.main([*map(str, arguments)])) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


def lines(path: Path, *rows: bytes) -> Path:
    path.write_bytes(b"".join(row + b"\n" for row in rows))
    return path


@pytest.mark.parametrize("column", ["text", "other"])
def test_a_parquet_file_with_a_damaged_page(column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page that is damaged is of the text, or of another column: then the text is shown all the same."""
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": GOOD, "other": [f"{text} of another kind" for text in GOOD]})
    pyarrow.parquet.write_table(table, path, use_dictionary=False)
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(table.column_names.index(column))
    data = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    data[middle : middle + 100] = b"\xaa" * 100
    path.write_bytes(data)
    out = shown(capsys, path)
    assert "train: 30 rows" in out
    assert "(damaged: " in out
    assert ("no text: " in out) == (column == "text")
    assert ("up to row 0" in out) == (column == "text")
    assert ("    row 2 of good text" in out) == (column == "other")


def test_a_parquet_row_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.parquet"
    texts = pyarrow.array([b"good", b"a\xffb", b"last"])
    column = pyarrow.StringArray.from_buffers(3, *texts.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    out = shown(capsys, path)
    assert r"b'a\\xffb'" in out
    assert "rows.parquet, row 2: 'text' is not UTF-8 (byte 1)" in out
    assert "\n    last\n" in out


def test_deep_nesting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "rows.jsonl", b'{"text": "good"}', b"[" * 100_000 + b"]" * 100_000, b'{"text": "last"}')
    out = shown(capsys, path)
    assert "line 2: this is not JSON that can be read" in out
    assert "\n    last\n" in out


def test_half_a_surrogate_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "rows.jsonl", rb'{"text": "a\ud800b"}', b'{"text": "last"}')
    out = shown(capsys, path, "--tokenizer", "byte")
    assert "no text: " in out
    assert r"line 1: the text has half of a surrogate pair ('\ud800') at position 1" in out
    assert out.count(" tokens\n") == 1
    assert "l|a|s|t" in out


def test_a_character_that_the_tokenizer_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CharTokenizer("last").save(tmp_path)
    path = lines(tmp_path / "rows.jsonl", b'{"text": "xyz"}', b'{"text": "last"}')
    out = shown(capsys, path, "--tokenizer", tmp_path)
    assert "no tokens\n    The character 'x'" in out
    assert "l|a|s|t" in out


def test_rows_of_a_saved_dataset_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["good", None]}).save_to_disk(str(tmp_path / "null"))
    datasets.Dataset.from_dict({"text": [1]}).save_to_disk(str(tmp_path / "number"))
    assert "row 2: 'text' should be text but is null" in shown(capsys, tmp_path / "null")
    assert "row 1: 'text' should be text but is the number 1" in shown(capsys, tmp_path / "number")


def test_two_columns_of_the_same_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(GOOD)] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "rows.parquet")
    assert "has 2 columns named 'text'" in refused(capsys, tmp_path)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_a_file_without_permission(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / f"rows.{ending}", json.dumps({"text": "a"}).encode())
    path.chmod(0o000)
    if os.access(path, os.R_OK):
        pytest.skip("this user may do everything")
    assert f"rows.{ending} cannot be read (Permission denied); make it readable" in refused(capsys, path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no file here that nobody can read")
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_file_whose_reading_fails(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"rows.{ending}"
    path.symlink_to("/proc/self/mem")
    assert f"rows.{ending} cannot be read (Input/output error); make it readable" in refused(capsys, path)


def test_a_folder_with_rows_and_other_files_is_read_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines(tmp_path / "a.jsonl", b'{"text": "last"}')
    (tmp_path / "README.md").write_text("what this is")
    assert "\n    last\n" in shown(capsys, tmp_path)
    assert "1 of 2 files left out" in caplog.text
    assert "'README.md'" in caplog.text


def test_a_name_that_no_file_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no dataset has this name" in refused(capsys, "a" * 300)


def test_what_a_terminal_would_obey_is_made_visible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    text = "one\u2028two\u2029three\x85four\x00five\x1b[31msix\ttab\nnext"
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "other"}) + "\n")
    out = shown(capsys, path, "--tokenizer", "byte")
    decoded = "    one\\u2028two\\u2029three\\x85four\\x00five\\x1b[31msix\ttab\n    next\n"
    assert f"  decoded\n{decoded}" in out
    assert not set(out) & set("\x00\x1b\x85\u2028\u2029")
