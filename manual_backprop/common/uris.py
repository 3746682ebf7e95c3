"""Paths as they are typed, and conversion between paths and URIs. Nothing else in the package converts them.

A path may contain every character but NUL. In a URI `#`, `?` and `%` have a meaning, and MLflow and SQLAlchemy parse
URIs in different ways, so there is a function for each case.
"""

import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

DATABASES = (".db", ".sqlite", ".sqlite3")  # a path with one of these suffixes is a database, even before it exists


def expanded(typed: str | Path) -> Path:
    """A path with the home folder in place of ~ or ~USER. Without such a user it stays as it is, and there is no such
    file; `Path.expanduser` would raise RuntimeError."""
    return Path(os.path.expanduser(typed))


def file_uri(path: Path) -> str:
    """The file:/// URI of a path, in which every character with a meaning in URIs is percent-encoded."""
    return path.absolute().as_uri()


def path_of(uri: str) -> Path | None:
    """The local path that MLflow uses for `uri`; None if it is not on a local file system.

    MLflow decodes a location without a scheme as well: "/data/a%20b" is the folder "/data/a b".
    """
    if uri.startswith("file:"):
        parts = urlsplit(uri)
        return Path(unquote(parts.path)) if parts.netloc in {"", "localhost"} else None
    return Path(unquote(uri)) if urlsplit(uri).scheme == "" else None


def sqlite_uri(database: Path) -> str:
    """The URI with which MLflow, through SQLAlchemy, opens this SQLite file and creates nothing else.

    For `sqlite:///PATH`, MLflow creates the folder of PATH without decoding it; for `sqlite+pysqlite:///PATH` it
    creates none. From version 2.1 on, SQLAlchemy decodes PATH.
    """
    path = str(database.absolute())
    if not set(path) & set("%?"):
        return f"sqlite:///{path}"
    import importlib.metadata

    major, minor = importlib.metadata.version("sqlalchemy").split(".")[:2]
    if (int(major), int(minor)) >= (2, 1):
        return "sqlite+pysqlite:///" + path.replace("%", "%25").replace("?", "%3F")
    return f"sqlite+pysqlite:///file:{quote(os.fsencode(path))}?uri=true"  # SQLite itself decodes this one


def sqlite_database(uri: str) -> tuple[bool, Path | None]:
    """Whether `uri` names an SQLite database, and its file; None if it is in memory or the file is unknown."""
    if urlsplit(uri).scheme.partition("+")[0] != "sqlite":
        return False, None
    from sqlalchemy import make_url

    parts = make_url(uri)
    file = parts.database or ":memory:"
    if file.startswith("file:/") and dict(parts.query) == {"uri": "true"}:
        return True, path_of(file)
    return True, None if file.startswith((":", "file:")) else Path(file)


def store_uri(given: str) -> str:
    """The URI to use for a given MLFLOW_TRACKING_URI. The path of a database becomes the URI of that database; MLflow
    itself would look for a folder of that name."""
    is_file = given.startswith("file:")
    path = path_of(given) if is_file else None if "://" in given else expanded(given)
    if path is not None and (path.suffix in DATABASES or path.is_file()):
        return sqlite_uri(path)
    if given.startswith("sqlite:///") and "%" in given:
        return given.replace("sqlite", "sqlite+pysqlite", 1)  # as in `sqlite_uri`
    return given


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is inside `folder`, either as both are spelled or after resolving symbolic links."""
    plain, resolved = Path(os.path.normpath(path)), Path(os.path.realpath(path))
    return plain.is_relative_to(folder.absolute()) or resolved.is_relative_to(os.path.realpath(folder))


def same_place(one: Path, other: Path) -> bool:
    """Whether both paths exist and are the same file or folder."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
