"""Exports the page as one file that opens from a disk without a network: it contains the scripts and all data."""

import base64
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..common.durable_files import write_atomically
from ..common.errors import InputError, ManualBackpropError
from .series import AXES, View
from .session import Session, as_json
from .style import STRONG

PLOTLY = "plotly.min.js"
SCRIPTS = (PLOTLY, "state.js", "views.js", "page.js")
OWN = ("page.html", "page.css", *SCRIPTS[1:])
MOST_PICTURES = 16_000_000  # [bytes] of pictures in one file
MOST_STEPS = 50  # of samples


def page_file(name: str) -> bytes | None:
    """A file of the page by its name; None if there is none. plotly's script comes from its package."""
    if name == PLOTLY:
        return (files("plotly") / "package_data" / PLOTLY).read_bytes()
    return (files(__package__) / "page" / name).read_bytes() if name in OWN else None


def exported(
    session: Session,
    run_ids: Sequence[str],
    view: View,
    strong: int = STRONG,
    state: str = "",
    model: dict[str, Any] | None = None,
) -> bytes:
    """The content of the file. `state` is the part of the page's address after #, `model` an answer of
    `session.model`."""
    run_ids = [*run_ids] or session.chosen()
    if not run_ids:
        raise InputError("there are no runs here to export")
    table = session.table()
    samples = session.samples(run_ids)
    answers = {
        "table": table | {"runs": [row for row in table["runs"] if row["id"] in run_ids], "chosen": run_ids},
        "state": state,
        "curves": {x: session.curves(run_ids, replace(view, x=x), strong) for x in AXES},
        "compute": session.compute(run_ids, strong),
        "tables": session.tables(run_ids),
        "samples": {str(step): session.samples(run_ids, step) for step in samples["steps"][-MOST_STEPS:]}
        | {"": samples},
        "pictures": _pictures(session, run_ids),
        "model": model,
    }
    page = _text("page.html")
    content = as_json(answers).replace("<", "\\u003c")
    parts = {'<link rel="stylesheet" href="page.css">': f"<style>{_text('page.css')}</style>"}
    parts |= {f'<script src="{name}"></script>': f"<script>{_script(name)}</script>" for name in SCRIPTS}
    parts["<main>"] = f'<script type="application/json" id="exported">{content}</script>\n<main>'
    for before, after in parts.items():
        head, found, tail = page.partition(before)
        assert found, before
        page = head + after + tail
    return page.encode()


def write_export(session: Session, path: Path, text: str | None = None) -> None:
    """Exports the runs that the session starts with. Raises InputError and StorageError."""
    ids = session.chosen()
    model = None if text is None else session.model(ids[0], text) if ids else None
    write_atomically(path, exported(session, ids, View(), state="tab=model" if model else "", model=model))


def _pictures(session: Session, run_ids: Sequence[str]) -> dict[str, Any]:
    answer, room = session.pictures(run_ids), MOST_PICTURES
    for run in answer["runs"]:
        inside = {}
        for name in run["pictures"]:
            with suppress(ManualBackpropError, OSError):
                content = session.picture(run["id"], name)
                room -= len(content)
                if room >= 0:
                    inside[name] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        run["inside"] = inside
        run["pictures"] = [*inside]
    return answer


def _text(name: str) -> str:
    content = page_file(name)
    assert content is not None
    return content.decode("utf-8")


def _script(name: str) -> str:
    return _text(name).replace("</script", "<\\/script")
