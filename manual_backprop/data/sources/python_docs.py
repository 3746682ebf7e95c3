"""The English documentation inside every Python installation: language topics and the library's docstrings.

About 2 MB: one document for each topic, then one for each module. Sources are parsed with `ast`, not imported.
"""

import ast
import gc
import inspect
import logging
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...common.errors import InputError
from .documents import Document, FileSource, SourceFile, files_below

log = logging.getLogger(__name__)

SHORTEST_DOCSTRING = 40  # [characters]; one that is not longer adds little to the name

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_TOPICS = "pydoc_data/topics.py"
FOREIGN_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def library_files(folder: Path) -> Iterator[SourceFile]:
    """The source files in a folder of the standard library, sorted."""
    for path in files_below(folder, lambda name: name in FOREIGN_FOLDERS, follow_links=False):
        if path.suffix == ".py" and path.is_file():  # a distribution may have broken links
            yield SourceFile(path.relative_to(STANDARD_LIBRARY).as_posix(), path)


class PythonDocs(FileSource):
    """The standard library's source files, sorted; in a virtual environment, those of the base installation."""

    version = "python_docs 1"

    def __init__(self) -> None:
        super().__init__(library_files(STANDARD_LIBRARY))
        if not self.files:
            raise InputError(
                "dataset=python_docs reads the sources of Python's standard library, but there are none in "
                f"{STANDARD_LIBRARY}. Use a Python installation that has them, or your own text with dataset=text "
                "dataset.path=PATH."
            )

    def rows(self) -> Iterator[Document]:
        yield from parse_python_docs((file.name, file.path.read_bytes()) for file in self.files)


def parse_python_docs(files: Iterable[tuple[str, bytes]]) -> list[Document]:
    """The documents in source files, which are given as name and content."""
    topics: list[Document] = []
    modules: list[Document] = []
    for file, tree in syntax_trees(files):
        if file == _TOPICS:
            topics = _topics(tree)
        else:
            name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            text = "\n\n".join(_docstrings(tree, name))
            if text:
                modules.append(Document(name, [encodable(text)]))
    return topics + modules


def syntax_trees(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, ast.Module]]:
    """The syntax trees of source files, which are given as name and content; files that do not parse are skipped."""
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are millions of small objects without cycles; the collector would take 3/4 of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in other people's sources
            for file, source in files:
                try:
                    tree = ast.parse(source)
                except (SyntaxError, ValueError, RecursionError) as error:  # undecodable bytes are a SyntaxError too
                    log.debug("skipped %s: %s", file, error)
                    continue
                yield file, tree
    finally:
        if collecting:
            gc.enable()


def _topics(tree: ast.Module) -> list[Document]:
    """The language reference as `help()` shows it: the dictionary `topics = {name: text}` of pydoc_data."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "topics":
            try:
                topics = ast.literal_eval(statement.value)
            except ValueError as error:
                log.debug("skipped %s: %s", _TOPICS, error)
                return []
            return [
                Document(f"topics/{name}", [encodable(text.strip("\n") + "\n")])
                for name, text in sorted(topics.items())
            ]
    return []


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    """Each docstring under a heading line with its module, class or function, as in common documentation."""
    text = docstring(tree)
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
            text = docstring(node)
            if text:
                yield f"{heading}\n\n{text}\n"
        inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)]
        pending += [(child, prefix) for child in reversed(inner)]  # a stack: reversed, to visit in source order


def docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    raw = ast.get_docstring(node, clean=False)
    if raw is None:
        return None
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(raw).split("\n"))
    return text if len(text) > SHORTEST_DOCSTRING else None


def encodable(text: str) -> str:
    """The text with unpaired surrogates, which UTF-8 cannot encode, replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
