"""Where text comes from, and how it is split into training and validation.

A source of text is first read as files (`read_python_docs`, `read_text`): their bytes identify the data, so that a
cache can be asked before anything is parsed. Only then are they made into documents. Tokens are not this module's
business.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import logging
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

log = logging.getLogger(__name__)

SHORTEST_DOCSTRING = 40  # [characters]; what is not longer says little beyond the name
FEWEST_DOCUMENTS_TO_SPLIT = 20  # with fewer, a split by document would be a split by luck

_TOPICS = "pydoc_data/topics.py"
_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file as it was read."""

    name: str  # relative to the folder that was asked for, with forward slashes; a single file's last part
    path: Path
    data: bytes


@dataclass(frozen=True)
class Source:
    """A kind of data: how its files are read, and how documents are made of them.

    `version` is raised whenever `parse` makes other documents of the same bytes.
    """

    version: str
    read: Callable[[], Iterator[SourceFile]]
    parse: Callable[[Iterable[SourceFile]], list[Document]]

    def digest(self, files: Iterable[SourceFile]) -> str:
        """SHA-256 of everything that the documents depend on: the version, and the name and bytes of each file."""
        total = hashlib.sha256(self.version.encode())
        for file in files:
            total.update(hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).digest())
            total.update(hashlib.sha256(file.data).digest())
        return total.hexdigest()


def open_source(name: str, path: str | Path | None) -> Source:
    """The source that `dataset.name` and `dataset.path` mean."""
    if name == "python_docs":
        return Source("python_docs 1", read_python_docs, parse_python_docs)
    if name == "text":
        if path is None:
            raise InputError("dataset=text needs to know which text: give a file or a folder as dataset.path=PATH.")
        return Source("text 1", lambda: read_text(path), parse_text)
    raise InputError(f"dataset={name}: there is no such dataset; use python_docs or text.")


def python_docs_documents() -> list[Document]:
    """The English documentation inside this Python installation: language topics and the library's docstrings.

    One document a topic, then one a module, about 2 MB in all. Nothing is imported: sources are read with `ast`.
    """
    return parse_python_docs(read_python_docs())


def text_documents(path: str | Path) -> list[Document]:
    """UTF-8 text: `path` is one file, or a folder whose files are taken in sorted order, at any depth.

    One file is one document. Every file counts, whatever its ending; hidden files and folders (a leading dot) do not,
    nor do empty files of a folder. A byte order mark is dropped; line ends stay as they are. A file that is not UTF-8
    is an InputError with its name and the position of the first bad byte.
    """
    return parse_text(read_text(path))


# The standard library


def read_python_docs() -> Iterator[SourceFile]:
    """The standard library's source files, sorted; in a virtual environment, those of the base installation."""
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in _files_below(root, lambda folder: folder in _FOREIGN_FOLDERS):
        if path.suffix == ".py":
            try:
                data = path.read_bytes()
            except OSError as error:  # a broken link of the distribution
                log.debug("passed over %s: %s", path, error)
                continue
            found = True
            yield SourceFile(path.relative_to(root).as_posix(), path, data)
    if not found:
        raise InputError(
            f"dataset=python_docs reads the sources of Python's standard library, and there are none in {root}. "
            "Use a Python installation that has them, or your own text with dataset=text dataset.path=PATH."
        )


def parse_python_docs(files: Iterable[SourceFile]) -> list[Document]:
    topics: list[Document] = []
    modules: list[Document] = []
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are millions of small objects without a cycle: looking for cycles takes 3/4 of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in other people's sources
            for file in files:
                try:
                    tree = ast.parse(file.data)
                except (SyntaxError, ValueError, RecursionError) as error:  # undecodable bytes are a SyntaxError too
                    log.debug("passed over %s: %s", file.name, error)
                    continue
                if file.name == _TOPICS:
                    topics = _topics(tree)
                else:
                    name = file.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                    text = "\n\n".join(_docstrings(tree, name))
                    if text:
                        modules.append(Document(name, _encodable(text)))
    finally:
        if collecting:
            gc.enable()
    return topics + modules


def _topics(tree: ast.Module) -> list[Document]:
    """The language reference as `help()` shows it: the dictionary `topics = {name: text}` of pydoc_data."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "topics":
            try:
                topics = ast.literal_eval(statement.value)
            except ValueError as error:
                log.debug("passed over %s: %s", _TOPICS, error)
                return []
            return [
                Document(f"topics/{name}", _encodable(text.strip("\n") + "\n")) for name, text in sorted(topics.items())
            ]
    return []


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    """Each docstring under a line that says whose it is, as documentation is usually laid out."""
    text = _docstring(tree)
    if text:
        yield f"module {module}\n\n{text}\n"
    pending: list[tuple[ast.AST, str]] = [(tree, "")]
    while pending:
        node, prefix = pending.pop()
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, node.bases))
            heading = f"class {prefix}{node.name}({bases})" if bases else f"class {prefix}{node.name}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            heading = f"{prefix}{node.name}({ast.unparse(node.args)})"
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            prefix += node.name + "."
            text = _docstring(node)
            if text:
                yield f"{heading}\n\n{text}\n"
        inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)]
        pending += [(child, prefix) for child in reversed(inner)]  # the order of the source


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    raw = ast.get_docstring(node, clean=False)
    if raw is None:
        return None
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(raw).split("\n"))
    return text if len(text) > SHORTEST_DOCSTRING else None


def _encodable(text: str) -> str:
    """A docstring may hold half of a surrogate pair, which is no text: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


# The user's own text


def read_text(path: str | Path) -> Iterator[SourceFile]:
    root = Path(path).expanduser()
    if root.is_dir():
        paths = list(_files_below(root, lambda folder: False))
        if not paths:
            raise InputError(
                f"dataset.path={path}: this folder holds no file that could be read (hidden ones do not count). "
                "Give a file or a folder with UTF-8 text."
            )
    elif root.exists():
        paths = [root]
    else:
        raise InputError(f"dataset.path={path}: there is no such file or folder. Give an existing one with UTF-8 text.")
    for file in paths:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise InputError(
                f"{file} cannot be read ({error.strerror or error}); make it readable or move it away."
            ) from error
        yield SourceFile(file.name if file == root else file.relative_to(root).as_posix(), file, data)


def parse_text(files: Iterable[SourceFile]) -> list[Document]:
    documents = []
    paths = []
    for file in files:
        paths.append(str(file.path))
        mark = len(_BYTE_ORDER_MARK) if file.data.startswith(_BYTE_ORDER_MARK) else 0
        try:
            text = file.data[mark:].decode("utf-8")
        except UnicodeDecodeError as error:
            position = error.start + mark
            raise InputError(
                f"{file.path} is not UTF-8 text: byte {position} is 0x{file.data[position]:02x} ({error.reason}). "
                "Convert the file to UTF-8, or move it out of the folder."
            ) from error
        if text:
            documents.append(Document(file.name, text))
        else:
            log.info("%s is empty", file.path)
    if not documents:
        listed = ", ".join(paths[:3] + ["..."] * (len(paths) > 3))
        raise InputError(f"There is no text in {listed}: give a file that is not empty.")
    return documents


def _files_below(root: Path, foreign: Callable[[str], bool]) -> Iterator[Path]:
    """Every file below a folder in an order that depends on names only, without hidden and foreign ones."""
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not foreign(name))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


def _refuse(error: OSError) -> None:
    raise InputError(
        f"{error.filename} cannot be read ({error.strerror}); make it readable or move it away."
    ) from error


# The split


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and documents to validate on: no text is in both.

    With 20 documents or more, they are taken in the order of a hash of their names, and each that still fits into a
    tenth of all characters validates; so a document mostly stays on its side when others come and go, and one that is
    long by itself is trained on. Fewer are read as one text, whose last 10 % (of the characters) validates.
    """
    if len(documents) < FEWEST_DOCUMENTS_TO_SPLIT:
        return _cut(documents)
    room = sum(len(document.text) for document in documents) // 10  # the shortest of 20 fits: neither side stays empty
    chosen = set()
    for document in sorted(documents, key=lambda document: _place(document.name)):
        if len(document.text) <= room:
            room -= len(document.text)
            chosen.add(document.name)
    training = [document for document in documents if document.name not in chosen]
    return training, [document for document in documents if document.name in chosen]


def _place(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _cut(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    length = sum(len(document.text) for document in documents)
    border = length * 9 // 10  # in whole numbers: 1,003,854 of tiny Shakespeare's 1,115,394
    if border == 0:
        raise InputError(
            f"There are only {length} characters of text, too few for a training and a validation part: give more text."
        )
    training, validation = [], []
    begin = 0
    for document in documents:
        head, tail = document.text[: max(border - begin, 0)], document.text[max(border - begin, 0) :]
        if head:
            training.append(Document(document.name, head))
        if tail:
            validation.append(Document(document.name, tail))
        begin += len(document.text)
    return training, validation
