"""Paths as URIs, and back. Nothing else in the package makes one of the other.

A path may hold every character but NUL. In a URI `#`, `?` and `%` mean something, and MLflow and SQLAlchemy read
what looks like one each in a way of its own: so does each function here.
"""

import importlib.metadata
import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

DATABASES = (".db", ".sqlite", ".sqlite3")  # a file that ends so is a database, also before it is there


def file_uri(path: Path) -> str:
    """file:///..., in which nothing of the path means anything to a reader of URIs."""
    return path.absolute().as_uri()


def path_of(uri: str) -> Path | None:
    """Where MLflow reads and writes what lies at `uri`; None where that is no folder of a file system here.

    It decodes what has no scheme too: a location "/data/a%20b" is the folder "/data/a b".
    """
    if uri.startswith("file:"):
        parts = urlsplit(uri)
        return Path(unquote(parts.path)) if parts.netloc in {"", "localhost"} else None
    return Path(unquote(uri)) if urlsplit(uri).scheme == "" else None


def sqlite_uri(database: Path) -> str:
    """The URI by which MLflow, through SQLAlchemy, opens this file of sqlite, and touches nothing else.

    MLflow makes the folder that `sqlite:///` precedes, letter by letter, but not the one of `sqlite+pysqlite:///`;
    SQLAlchemy decodes a database's name since version 2.1.
    """
    path = str(database.absolute())
    if not set(path) & set("%?"):
        return f"sqlite:///{path}"
    if _version("sqlalchemy") >= (2, 1):
        return "sqlite+pysqlite:///" + path.replace("%", "%25").replace("?", "%3F")
    return f"sqlite+pysqlite:///file:{quote(os.fsencode(path))}?uri=true"  # which sqlite itself decodes


def sqlite_database(uri: str) -> tuple[bool, Path | None]:
    """Whether `uri` names a sqlite database, and the file, where it is one that lies by itself in a folder."""
    if urlsplit(uri).scheme.partition("+")[0] != "sqlite":
        return False, None
    from sqlalchemy import make_url

    parts = make_url(uri)
    file = parts.database or ":memory:"
    if file.startswith("file:/") and dict(parts.query) == {"uri": "true"}:
        return True, path_of(file)
    return True, None if file.startswith((":", "file:")) else Path(file)


def store_uri(given: str) -> str:
    """MLFLOW_TRACKING_URI as somebody gave it. A path to a database means that database; MLflow itself would look for
    a folder of that name."""
    is_file = given.startswith("file:")
    path = path_of(given) if is_file else None if "://" in given else Path(os.path.expanduser(given))
    if path is not None and (path.suffix in DATABASES or path.is_file()):
        return sqlite_uri(path)
    if given.startswith("sqlite:///") and "%" in given:
        return given.replace("sqlite", "sqlite+pysqlite", 1)  # as in `sqlite_uri`
    return given


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` lies in `folder`: as both are spelled, or by way of the symbolic links in either."""
    plain, resolved = Path(os.path.normpath(path)), Path(os.path.realpath(path))
    return plain.is_relative_to(folder.absolute()) or resolved.is_relative_to(os.path.realpath(folder))


def same_place(one: Path, other: Path) -> bool:
    """Whether both are there and the same, however they are spelled."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _version(library: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(library).split(".")[:2])
