"""One reader of JSON files: an object, or one sentence about what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from manual_backprop.common.errors import CheckpointError, InputError
from manual_backprop.common.json_files import read_object


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "Ä", "more": [1, null]}', encoding="utf-8")
    assert read_object(tmp_path / "a.json") == {"name": "Ä", "more": [1, None]}


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "it is not JSON"),
        (b'{"a": 1', "it is not JSON"),
        (b'{"a": "\xff"}', "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
    ],
    ids=["empty", "cut", "not UTF-8", "nested too deep", "list", "null"],
)
def test_another_content_is_damage(content: bytes, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_object(tmp_path / "a.json", kind=CheckpointError)
    assert str(caught.value) == f"{tmp_path / 'a.json'} is damaged: {wrong}"


def test_no_file(tmp_path: Path) -> None:
    """What is said is what the caller knows about it; another failure is not called that."""
    with pytest.raises(InputError) as caught:
        read_object(tmp_path / "a.json")
    assert str(caught.value) == f"{tmp_path / 'a.json'} cannot be read: No such file or directory"
    with pytest.raises(InputError, match=r"^this is no run$"):
        read_object(tmp_path / "a.json", "this is no run")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_object(tmp_path / "a.json", "this is no run")
