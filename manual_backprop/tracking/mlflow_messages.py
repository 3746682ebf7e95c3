"""Messages about MLflow for the user: its address, why it refused something, where to see a run. Without secrets."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from ..common.errors import ManualBackpropError

LONGEST = 300  # characters of a reason, enough for MLflow's sentences with a remedy at their end
# A phrase in one of MLflow's long messages -> our short one.
KNOWN = {
    "database schema": "the database is from another version of MLflow; save a copy of it and run: mlflow db "
    "upgrade {uri} (if that does not know the database's version either, it is from a newer MLflow: pip install "
    "--upgrade mlflow)",
    "filesystem tracking backend": "MLflow does not support a store in files any more; name a database instead, as in "
    "MLFLOW_TRACKING_URI=sqlite:///mlflow.db, and convert the old store with mlflow migrate-filestore",
}
REMEDIES = {
    "artifacts": "Artifacts stay in the run directory until the server accepts them (mlflow server "
    "--serve-artifacts) or its artifact folder can be written from here.",
    "model": "A server needs MLflow 3 for models; the run directory has the checkpoints.",
}


def without_credentials(uri: str) -> str:
    """The URI without secrets, to show or store: http://user:secret@host/?token=secret -> http://host/."""
    parts = urlsplit(uri)
    if not parts.netloc:
        return uri  # a file
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def one_line(error: BaseException, uri: str = "") -> str:
    """The reason for an error of MLflow at `uri`, in one line."""
    if isinstance(error, ManualBackpropError):
        return _without_secrets(" ".join(str(error).split()), uri)
    text = _innermost(error)
    for phrase, remedy in KNOWN.items():
        if phrase in text:
            return remedy.format(uri=shlex.quote(without_credentials(uri)))
    text = _without_secrets(re.sub(r"\s*Response body: .*<.*", "", text), uri)
    text = text.rstrip(".")
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0] + " ..."


def refusals(refused: Mapping[str, str]) -> str:
    """The parts of a run that MLflow refuses, with reasons, as half a sentence, which names the first of each kind."""
    kinds: dict[str, list[str]] = {}
    for part in refused:
        kinds.setdefault(part.partition(" ")[0], []).append(part)
    return ", ".join(
        f"the {parts[0]}{f' and {len(parts) - 1} more {kind}s' * (len(parts) > 1)} ({refused[parts[0]]})"
        for kind, parts in kinds.items()
    )


def remedies(refused: Mapping[str, str]) -> str:
    """Sentences about what the user can do about refused parts; empty if there is nothing."""
    artifacts = any(part.split()[0] in ("artifacts", "artifact", "checkpoints") for part in refused)
    no_models = "404" in refused.get("model", "")
    return " ".join([REMEDIES["artifacts"]] * artifacts + [REMEDIES["model"]] * no_models)


def where_to_look(uri: str, root: Path, known: Mapping[str, Any] | None) -> str | None:
    """The command, or the address, to see a run at `uri`; None if it is not there. `root` is the outputs directory,
    `known` the entry `mlflow` of run.json."""
    shown = without_credentials(uri)
    if not known or known.get("tracking_uri") != shown:
        return None
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        return f"{shown.rstrip('/')}/#/experiments/{known.get('experiment_id', 0)}"
    if scheme not in ("sqlite", "postgresql", "mysql", "mssql", "file", ""):
        return shown  # another kind of server
    if uri == os.environ.get("MLFLOW_TRACKING_URI"):  # which may contain a password
        return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    # Without options, `mlflow ui` opens mlflow.db in the working directory, unless there is an mlruns
    bare = root.absolute().parent == Path.cwd() and not Path("mlruns").exists()
    return "mlflow ui" if bare else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"


def _innermost(error: BaseException) -> str:
    """The message of the first cause, which is the shortest: MLflow and requests wrap it many times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _without_secrets(text: str, uri: str) -> str:
    """The text without credentials: MLflow, requests and SQLAlchemy quote addresses, or parts of them."""
    parts = urlsplit(uri)
    if parts.netloc:
        text = text.replace(uri, without_credentials(uri))
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        secrets = [user, password, parts.query, *(value for _, value in parse_qsl(parts.query))]
        for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
            if len(secret) > 3:  # a shorter one may be part of other words
                text = text.replace(secret, "***")
    text = re.sub(r"(\w+://)[^\s/'\"@]*@", r"\1", text)
    return re.sub(r"(/[^\s?'\"]*)\?[^\s'\")]+", r"\1", text)
