"""Where text comes from: the standard library's documentation, files and folders, and the split."""

import gzip
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import DatasetConfig
from manual_backprop.data.sources.documents import BadRow, Document, FileSource
from manual_backprop.data.sources.files import TextFiles
from manual_backprop.data.sources.python_docs import PythonDocs, parse_python_docs
from manual_backprop.data.sources.registry import open_source
from manual_backprop.data.sources.spool import Spool


def text_documents(path: Path) -> list[tuple[str, str]]:
    rows = list(TextFiles(path).rows())
    return [(row.name, row.text) for row in rows if isinstance(row, Document)]


@pytest.fixture(scope="module")
def python_docs() -> list[Document]:
    return list(PythonDocs().rows())


def module(source: str, name: str = "folder/part.py") -> list[Document]:
    return parse_python_docs([(name, source.encode())])


def test_python_docs_are_topics_then_modules(python_docs: list[Document]) -> None:
    names = [document.name for document in python_docs]
    assert len(set(names)) == len(names)
    assert {"topics/while", "json.decoder", "os", "_pydecimal"} <= set(names)
    topics = [name.startswith("topics/") for name in names]
    assert topics == sorted(topics, reverse=True)
    assert names[: sum(topics)] == sorted(names[: sum(topics)])
    assert 1_500_000 < sum(len(document.text) for document in python_docs) < 5_000_000
    assert all(document.text.strip() for document in python_docs)


def test_python_docs_put_the_name_above_the_docstring(python_docs: list[Document]) -> None:
    text = {document.name: document.text for document in python_docs}["json.decoder"]
    assert text.startswith("module json.decoder\n\nImplementation of JSONDecoder\n") is False  # too short to count
    assert "class JSONDecoder(object)\n\nSimple JSON" in text
    assert "JSONDecoder.raw_decode(self, s, idx=0)\n\nDecode a JSON document from" in text


def test_python_docs_read_no_tests_and_nothing_that_was_installed() -> None:
    files = [file.name.split("/") for file in PythonDocs().files]
    assert len(files) > 400
    folders = {folder for parts in files for folder in parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def test_python_docs_come_from_the_base_installation_in_a_virtual_environment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    code = "import sysconfig; print(sysconfig.get_path('stdlib'))"
    found = subprocess.run(
        [tmp_path / "venv/bin/python", "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert Path(found) == Path(sysconfig.get_path("stdlib"))


def test_python_docs_import_nothing() -> None:
    code = (
        "import sys; from manual_backprop.data.sources.python_docs import PythonDocs; before = set(sys.modules);"
        "list(PythonDocs().rows()); print(sorted(set(sys.modules) - before))"
    )
    new = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "tkinter" not in new
    assert "pydoc_data" not in new
    assert "idlelib" not in new


def test_docstrings_are_cleaned_and_named_after_what_holds_them() -> None:
    long = "words " * 8
    source = f'''
class Outer(Base, key=1):
    """{long}

        indented\x20\x20
    last line
    """
    if True:
        async def method(self, x: int = 1, *rest, **others) -> None:
            """{long}"""
            def inner():
                """{long}"""
    def silent(self):
        """too short to be worth reading (40 chars)"""
try:
    pass
except ImportError:
    def fallback():
        """{long}"""
'''
    (document,) = module(source)
    assert document.name == "folder.part"
    assert document.text == (
        f"class Outer(Base)\n\n{long.rstrip()}\n\n    indented\nlast line\n\n\n"
        f"Outer.method(self, x: int=1, *rest, **others)\n\n{long.rstrip()}\n\n\n"
        f"Outer.method.inner()\n\n{long.rstrip()}\n\n\n"
        f"fallback()\n\n{long.rstrip()}\n"
    )


def test_a_module_docstring_and_a_package_name() -> None:
    (document,) = module('"""' + "x" * 41 + '"""', "package/__init__.py")
    assert document == Document("package", ["module package\n\n" + "x" * 41 + "\n"])
    assert module('"""' + "x" * 40 + '"""') == []


@pytest.mark.parametrize(
    "data",
    [
        b"def broken(:\n",
        b'"""\xff\xfe not UTF-8 %s"""' % (b"x" * 50),
        b'x = "nul \x00 byte"',
        b"# coding: no-such-code\n",
    ],
)
def test_sources_that_cannot_be_parsed_are_passed_over(data: bytes) -> None:
    sound = b'"""' + b"x" * 50 + b'"""'
    documents = parse_python_docs([("a.py", data), ("b.py", sound)])
    assert [document.name for document in documents] == ["b"]


def test_half_a_surrogate_pair_in_a_docstring_becomes_text() -> None:
    (document,) = module(r'"""' + "x" * 50 + r'\ud800"""')
    assert document.text.endswith("x?\n")
    document.text.encode("utf-8")


def test_topics_are_read_as_a_literal_only() -> None:
    def topics(source: bytes) -> list[Document]:
        return parse_python_docs([("pydoc_data/topics.py", source)])

    assert topics(b"topics = {'b': '\\ntwo\\n\\n', 'a': 'one'}") == [
        Document("topics/a", ["one\n"]),
        Document("topics/b", ["two\n"]),
    ]
    assert topics(b"topics = {'a': print('run')}") == []


def test_one_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "text.anything"
    path.write_bytes("\ufeffgrün\r\n\x00日本".encode())
    assert text_documents(path) == [("text.anything", "grün\r\n\x00日本")]


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c", ".hidden", ".git/config", "a-file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "empty").touch()
    assert text_documents(tmp_path) == [
        *((name, f"text of {name}") for name in ("a-file", "b.txt")),
        ("empty", ""),
        *((name, f"text of {name}") for name in ("a/z.md", "a/b/c")),
    ]


def test_a_file_that_is_not_utf8_is_named_with_the_position(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 au lait")
    with pytest.raises(BadRow, match=r"bad\.txt, line 1: byte 6 of the file is 0xe9, which is not UTF-8"):
        text_documents(tmp_path)


def test_nothing_to_read_says_what_was_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        text_documents(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no file"):
        text_documents(tmp_path)


def test_a_source_needs_a_name_that_is_known_and_its_path() -> None:
    for name in ("text", "jsonl", "parquet", "saved"):
        with pytest.raises(InputError, match=rf"dataset={name} needs a path.*dataset\.path"):
            open_source(DatasetConfig(name))
    with pytest.raises(InputError, match="no such dataset"):
        open_source(DatasetConfig("texts", "here"))


def test_the_identity_depends_on_names_and_bytes_not_on_the_place(tmp_path: Path) -> None:
    def identity(folder: str, files: dict[str, bytes]) -> str:
        root = tmp_path / folder
        root.mkdir()
        for name, data in files.items():
            (root / name).write_bytes(data)
        return str(open_source(DatasetConfig("text", str(root))).identity())

    first = identity("one", {"a": b"xy", "b": b"z"})
    assert identity("two", {"a": b"xy", "b": b"z"}) == first
    others = [{"a": b"x", "b": b"yz"}, {"a": b"xy", "c": b"z"}, {"a": b"xyz"}, {"a": b"xy", "b": b"z", "c": b""}]
    identities = [identity(f"other{number}", files) for number, files in enumerate(others)]
    assert len({first, *identities}) == 5


# What a folder may hold


def given(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The tool `inspect`, in a process that may be given up."""
    command = [sys.executable, "-m", "manual_backprop.tools.inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    for path in (tmp_path, tmp_path / "b.txt"):
        done = given(path)
        assert done.returncode == 2
        assert re.fullmatch(r".*b\.txt is not a regular file .*: move it away, .*\n", done.stderr)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_links_to_folders_are_followed_and_each_folder_is_read_once(kind: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    (folder / "own").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    for place in (folder, folder / "own", elsewhere, elsewhere / "deep"):
        (place / "rows.jsonl").write_text('{"text": "some"}')
    for name, target in {"more": elsewhere, "more2": elsewhere, "me": folder, "up": tmp_path}.items():
        (folder / name).symlink_to(target)
    (folder / "own2").symlink_to("own")
    (elsewhere / "deep/back").symlink_to(folder)
    source = open_source(DatasetConfig(kind, str(folder)))
    assert isinstance(source, FileSource)
    names = ["rows.jsonl", "more/rows.jsonl", "more/deep/rows.jsonl", "own/rows.jsonl"]
    assert [file.name for file in source.files] == names


def warnings_of(kind: str, folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    for _ in range(2):  # said once
        open_source(DatasetConfig(kind, str(folder)))
    return caplog.messages


@pytest.mark.parametrize(("kind", "ending"), [("jsonl", ".jsonl"), ("parquet", ".parquet")])
def test_files_that_are_left_out_are_counted_and_named(
    kind: str, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (f"a{ending}", f"b{ending.upper()}", f"c{ending}.gz", "d.pq", "e.txt", "sub/f.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (said,) = warnings_of(kind, tmp_path, caplog)
    assert f"{tmp_path}: 4 of 6 files left out" in said
    assert said.endswith(f": 'c{ending}.gz', 'd.pq', 'e.txt', 1 more")


def test_nothing_is_said_of_a_folder_that_is_read_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "b.json", ".hidden"):
        (tmp_path / name).touch()
    assert warnings_of("jsonl", tmp_path, caplog) == []
    (tmp_path / "a.jsonl").rename(tmp_path / "a.md")
    assert warnings_of("text", tmp_path, caplog) == []


def test_files_with_rows_that_are_read_as_plain_text_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jsonl", "README.md"):
        (tmp_path / name).write_text("{}")
    (said,) = warnings_of("text", tmp_path, caplog)
    assert said.startswith(f"{tmp_path}: read as plain text, each file as one document, not row by row: 'a.jsonl'.")


def test_a_folder_without_such_files_says_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl.gz").touch()
    with pytest.raises(InputError, match=r"holds no file whose name ends in \.jsonl.*, only 'b\.jsonl\.gz'\. Give"):
        open_source(DatasetConfig("jsonl", str(tmp_path)))


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_compressed_file_is_to_be_unpacked(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}'))
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz is compressed.*unpack it"):
        open_source(DatasetConfig(kind, str(path)))
    path.write_text("no gzip, whatever its name")
    open_source(DatasetConfig(kind, str(path)))


# What cannot be read


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"aaa cannot be read \(File name too long\); make"):
        open_source(DatasetConfig("text", str(tmp_path / ("a" * 300))))


def test_a_folder_without_search_permission(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    folder.chmod(0o000)
    try:
        if os.access(folder, os.X_OK):
            pytest.skip("this user may do everything")
        for path in (folder, folder / "a.txt"):
            with pytest.raises(InputError, match=r"cannot be read \(Permission denied\); make it readable"):
                open_source(DatasetConfig("text", str(path)))
    finally:
        folder.chmod(0o700)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no file here that nobody can read")
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_file_whose_reading_fails(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    source = open_source(DatasetConfig(kind, str(tmp_path)))
    with pytest.raises(InputError, match=r"a\.jsonl cannot be read \(Input/output error\); make"):
        source.identity()
    with pytest.raises(InputError, match=r"a\.jsonl cannot be read \(Input/output error\); make"):
        assert [row.text for row in source.rows() if isinstance(row, Document)]


# The split


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "spooled text")
    yield opened
    opened.close()


def split(spool: Spool, texts: dict[str, str], share: float = 0.1) -> tuple[list[str], list[str]]:
    """The texts to train on, and those to validate on."""
    spool.read(Document(name, [text]) for name, text in texts.items())
    training, validation = spool.split(share)
    return tuple(["".join(spool.pieces(*part)) for part in parts.tolist()] for parts in (training, validation))  # type: ignore


def numbered(count: int) -> dict[str, str]:
    return {f"document {number}": f"some text {number:03}" for number in range(count)}


def test_many_documents_are_split_by_document(spool: Spool) -> None:
    training, validation = split(spool, numbered(200))
    assert len(validation) == 20
    assert sorted(training + validation) == list(numbered(200).values())
    assert training == sorted(training)


def test_most_documents_keep_their_side_when_others_come(tmp_path: Path) -> None:
    before = set(split(Spool(tmp_path / "before"), numbered(200))[1])
    after = set(split(Spool(tmp_path / "after"), numbered(220))[1])
    assert len(before & after) >= 16


@pytest.mark.parametrize("lengths", [[1] * 20, [10**6] + [1] * 19, list(range(1, 31))])
def test_neither_side_of_a_split_is_empty(lengths: list[int], spool: Spool) -> None:
    training, validation = split(spool, {str(number): "x" * length for number, length in enumerate(lengths)})
    assert training
    assert validation
    assert sum(map(len, validation)) <= sum(lengths) / 10


def test_python_docs_are_split_in_nine_to_one(python_docs: list[Document], spool: Spool) -> None:
    training, validation = split(spool, {document.name: document.text for document in python_docs})
    share = sum(map(len, validation)) / sum(len(d.text) for d in python_docs)
    assert 0.09 < share <= 0.1
    assert len(validation) > 30
    assert not set(training) & set(validation)


def test_few_documents_are_cut_at_the_last_tenth_of_their_characters(tmp_path: Path) -> None:
    training, validation = split(Spool(tmp_path / "one"), {"one": "x" * 1_115_394})  # the length of tiny Shakespeare
    assert [len(text) for text in training + validation] == [1_003_854, 111_540]
    training, validation = split(Spool(tmp_path / "three"), {"a": "ä" * 50, "b": "b" * 45, "c": "c" * 5})
    assert training == ["ä" * 50, "b" * 40]
    assert validation == ["b" * 5, "c" * 5]
    training, validation = split(Spool(tmp_path / "border"), {"a": "ä" * 90, "b": "b" * 10})
    assert (training, validation) == (["ä" * 90], ["b" * 10])


def test_a_text_of_one_character_cannot_be_split(spool: Spool) -> None:
    with pytest.raises(InputError, match="only 1 character"):
        split(spool, {"a": "x"})
