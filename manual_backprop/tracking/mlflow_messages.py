"""What a person reads about MLflow: where it is, why it did not take something, where to look. No secrets."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from manual_backprop.common.errors import ManualBackpropError

LONGEST = 300  # characters of a reason; a sentence that MLflow ends with its remedy has them
# What MLflow says in a paragraph, its remedy last.
KNOWN = {
    "database schema": "the database was made by another version of MLflow; save a copy of it and run: mlflow db "
    "upgrade {uri} (where that does not know the database's version either, a newer MLflow made it: pip install "
    "--upgrade mlflow)",
    "filesystem tracking backend": "MLflow does not keep a store in files any more; name a database instead, as in "
    "MLFLOW_TRACKING_URI=sqlite:///mlflow.db, to which mlflow migrate-filestore brings what is there",
}
REMEDIES = {
    "artifacts": "Artifacts stay in the run's directory until the server passes them on (mlflow server "
    "--serve-artifacts) or the folder is one that can be written from here.",
    "model": "A server keeps models from MLflow 3 on; the run's directory has its checkpoints.",
}


def without_credentials(uri: str) -> str:
    """http://user:secret@host/?token=secret -> http://host/: what may be written and shown."""
    parts = urlsplit(uri)
    if not parts.netloc:
        return uri  # a file
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def one_line(error: BaseException, uri: str = "") -> str:
    """Why MLflow at `uri` did not take something."""
    if isinstance(error, ManualBackpropError):
        return _without_secrets(" ".join(str(error).split()), uri)
    text = _innermost(error)
    for said, remedy in KNOWN.items():
        if said in text:
            return remedy.format(uri=shlex.quote(without_credentials(uri)))
    text = _without_secrets(re.sub(r"\s*Response body: .*<.*", "", text), uri)
    text = text.rstrip(".")
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0] + " ..."


def refusals(refused: Mapping[str, str]) -> str:
    """Parts of a run that MLflow refuses, and why, in half a sentence. Of many of a kind the first is named."""
    kinds: dict[str, list[str]] = {}
    for part in refused:
        kinds.setdefault(part.partition(" ")[0], []).append(part)
    return ", ".join(
        f"the {parts[0]}{f' and {len(parts) - 1} more {kind}s' * (len(parts) > 1)} ({refused[parts[0]]})"
        for kind, parts in kinds.items()
    )


def remedies(refused: Mapping[str, str]) -> str:
    artifacts = any(part.split()[0] in ("artifacts", "artifact", "checkpoints") for part in refused)
    no_models = "404" in refused.get("model", "")
    return " ".join([REMEDIES["artifacts"]] * artifacts + [REMEDIES["model"]] * no_models)


def where_to_look(uri: str, root: Path, known: Mapping[str, Any] | None) -> str | None:
    """What to type, or to open, to see a run at `uri`; None where it is not there. `root` is the outputs directory,
    `known` what run.json remembers of MLflow."""
    shown = without_credentials(uri)
    if not known or known.get("tracking_uri") != shown:
        return None
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        return f"{shown.rstrip('/')}/#/experiments/{known.get('experiment_id', 0)}"
    if scheme not in ("sqlite", "postgresql", "mysql", "mssql", "file", ""):
        return shown  # whatever shows that
    if uri == os.environ.get("MLFLOW_TRACKING_URI"):  # with the password that may be in it
        return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    # A bare one looks here, at mlflow.db unless there is an mlruns
    bare = root.absolute().parent == Path.cwd() and not Path("mlruns").exists()
    return "mlflow ui" if bare else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"


def _innermost(error: BaseException) -> str:
    """MLflow and requests wrap the reason many times; the first cause says it shortest."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _without_secrets(text: str, uri: str) -> str:
    """MLflow, requests and SQLAlchemy quote addresses as they were given, or parts of them."""
    parts = urlsplit(uri)
    if parts.netloc:
        text = text.replace(uri, without_credentials(uri))
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        secrets = [user, password, parts.query, *(value for _, value in parse_qsl(parts.query))]
        for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
            if len(secret) > 3:  # a shorter one stands in other words as well
                text = text.replace(secret, "***")
    text = re.sub(r"(\w+://)[^\s/'\"@]*@", r"\1", text)
    return re.sub(r"(/[^\s?'\"]*)\?[^\s'\")]+", r"\1", text)
