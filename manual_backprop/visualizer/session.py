"""The answers to the page's requests, as plain mappings: the server sends them, and an export contains them.

A request names a run by its id, which is looked up among the known runs: no text from a browser becomes a path.
"""

import base64
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError
from ..common.origin import SEPARATOR
from ..tracking import TrainingLog
from . import equal_compute, figures, style, tables
from .runs import Runs, labels_of, status_of
from .series import AXES, View, last_step, metrics_of
from .style import STRONG

CHARTS = ("learning_rate", "gradient_norm", "tokens_per_second", "peak_share")
MOST_CHOSEN = 200
MOST_SAMPLES = 12  # texts of one evaluation
LONGEST_SAMPLE = 20_000  # [characters]
MOST_PICTURES = 24
_SAMPLE = re.compile(r"step-(\d+)\.txt")


class Session:
    """The data for one page or several, from the runs of one outputs directory. Its methods are thread-safe."""

    def __init__(self, runs: Runs, chosen: Sequence[str] = ()):
        self.runs = runs
        self.named = bool(chosen)
        self._chosen = list(dict.fromkeys(chosen))
        self._lock = threading.RLock()
        self._versions: dict[str, tuple[TrainingLog, int]] = {}

    def chosen(self) -> list[str]:
        """The runs named on the command line, or the newest ones."""
        return self._chosen or [row["id"] for row in self.runs.rows()[:STRONG]]

    def table(self) -> dict[str, Any]:
        with self._lock:
            rows = self.runs.rows()
            chosen = self._chosen or [row["id"] for row in rows[:STRONG]]
            return {"runs": rows, "chosen": chosen, "named": self.named, "axes": AXES, "colours": style.COLOURS}

    def tick(self, run_ids: Sequence[str]) -> dict[str, Any]:
        """The progress of runs: `version` increases whenever there is something new to draw."""
        with self._lock:
            answer = {}
            for run_id, log in self._logs(run_ids).items():
                known = self._versions.get(run_id)
                version = 1 if known is None else known[1] + (known[0] is not log)
                self._versions[run_id] = log, version
                about = {"status": status_of(log.run), "step": last_step(log), "resumes": [*log.resumes]}
                answer[run_id] = {"version": version} | about
            return {"runs": answer}

    def curves(
        self, run_ids: Sequence[str], view: View, strong: int = STRONG, also: Sequence[str] = (), only: str = ""
    ) -> dict[str, Any]:
        """All pictures of curves, or only the one named `only`; `also` are additional metrics by name."""
        with self._lock:
            logs = self._labelled(run_ids)
            drawn: dict[str, Callable[..., dict[str, Any]]] = {"loss": figures.loss_curves}
            if any("validation/loss" in log.validation for log in logs.values()):
                drawn["validation"] = figures.validation_curves
            there = dict.fromkeys(name for log in logs.values() for name in metrics_of(log))
            wanted = [name for name in CHARTS if name in there] + figures.task_metrics(logs)
            for metric in dict.fromkeys([*wanted, *(name for name in also if name in there)]):
                drawn[metric] = partial(figures.metric_curves, metric=metric)
            more = [name for name in there if name not in {*wanted, *figures.UNDRAWN, "train/loss"}]
            shown = [key for key in drawn if logs and only in ("", key)]
            charts = [{"key": key, "figure": drawn[key](logs, view=view, strong=strong)} for key in shown]
            return {"charts": charts, "more": more, "runs": self._named(logs)}

    def compute(self, run_ids: Sequence[str], strong: int = STRONG) -> dict[str, Any]:
        with self._lock:
            logs = self._labelled(run_ids)
            first = dict(list(logs.items())[:strong])
            metric = equal_compute.compute_metric(logs)
            return {
                "figure": equal_compute.compute_curves(logs, metric, strong=strong),
                "table": equal_compute.budget_table(logs, metric),
                "about": style.words(metric).lower(),
                "sentences": equal_compute.sentences(first, metric),
                "runs": self._named(logs),
            }

    def tables(self, run_ids: Sequence[str]) -> dict[str, Any]:
        with self._lock:
            logs = self._labelled(run_ids)
            rows = [tables.summary(log) for log in logs.values()]
            keys = rows[0] if rows else ()
            return {
                "names": [*logs],
                "best": tables.best_run(logs),
                "summary": [{"key": key, "values": [_number_or_word(row[key]) for row in rows]} for key in keys],
                "configs": tables.configs(logs),
                "runs": self._named(logs),
            }

    def samples(self, run_ids: Sequence[str], step: int | None = None) -> dict[str, Any]:
        """The samples of each run at `step`, or the last ones before it; without a step, its last ones."""
        with self._lock:
            logs = self._labelled(run_ids)
            files = {name: self._sample_files(log.path) for name, log in logs.items()}
            steps = sorted({one for found in files.values() for one in found})
            at = steps[-1] if step is None and steps else step
            answer = []
            for name, found in files.items():
                before = max((one for one in found if at is None or one <= at), default=None)
                texts = [] if before is None else _read(found[before]).rstrip("\n").split(SEPARATOR)
                shown = [text[:LONGEST_SAMPLE] for text in texts[:MOST_SAMPLES]]
                answer.append({"name": name, "step": before, "texts": shown})
            return {"steps": steps, "step": at, "samples": answer, "runs": self._named(logs)}

    def pictures(self, run_ids: Sequence[str]) -> dict[str, Any]:
        with self._lock:
            logs = self._labelled(run_ids)
            found = [
                {"name": name, "id": run_id, "pictures": [*self._picture_files(log.path)]}
                for run_id, (name, log) in zip(dict.fromkeys(run_ids), logs.items(), strict=True)
            ]
            return {"runs": found}

    def picture(self, run_id: str, name: str) -> bytes:
        """A PNG of a run. Raises InputError if `pictures` does not list it."""
        with self._lock:
            path = self.runs.path(run_id)
            files = {} if path is None else self._picture_files(path)
        if name not in files:
            raise InputError("there is no such picture of this run")
        return files[name].read_bytes()

    def model(self, run_id: str, text: str) -> dict[str, Any]:
        """The view of the run's best checkpoint on a text. Raises InputError if the run has none."""
        from ..trained_models.saved_model import find
        from .model_view import COLUMNS, attention_map, look

        with self._lock:
            path = self.runs.path(run_id)
            label = labels_of({run_id: self.runs.log(run_id)})[run_id]
        if path is None:
            raise InputError("this run is only in MLflow: its checkpoints are not available here")
        seen = look(find(str(path), self.runs.root), text)
        maps = [
            {"name": name, "columns": min(COLUMNS, len(one.heads)), "figure": attention_map(one)}
            for name, one in seen.maps.items()
        ]
        return vars(seen) | {"id": run_id, "name": label, "text": text, "maps": maps}

    # Runs by id

    def _logs(self, run_ids: Sequence[str]) -> dict[str, TrainingLog]:
        """The logs of these runs, each once, in the given order."""
        ids = [*dict.fromkeys(run_ids)]
        if len(ids) > MOST_CHOSEN:
            raise InputError(f"{len(ids)} runs were chosen: at most {MOST_CHOSEN} can be drawn over each other")
        return {run_id: self.runs.log(run_id) for run_id in ids}

    def _labelled(self, run_ids: Sequence[str]) -> dict[str, TrainingLog]:
        logs = self._logs(run_ids)
        labels = labels_of(logs)
        return {labels[run_id]: log for run_id, log in logs.items()}

    def _named(self, logs: Mapping[str, TrainingLog]) -> list[dict[str, Any]]:
        return [
            {"name": name, "status": status_of(log.run), "damaged": log.damaged_lines, "empty": not metrics_of(log)}
            for name, log in logs.items()
        ]

    def _sample_files(self, path: Path) -> dict[int, Path]:
        folder = path / "samples"
        found = folder.iterdir() if folder.is_dir() else ()
        named = {int(match[1]): file for file in found if (match := _SAMPLE.fullmatch(file.name))}
        return {step: file for step, file in sorted(named.items()) if _inside(file, path)}

    def _picture_files(self, path: Path) -> dict[str, Path]:
        found = [file for pattern in ("*.png", "*/*.png") for file in sorted(path.glob(pattern)) if _inside(file, path)]
        return {file.relative_to(path).as_posix(): file for file in found[:MOST_PICTURES]}


def _inside(file: Path, folder: Path) -> bool:
    """Whether a file is inside the folder; a link that leads out of it is not."""
    return file.is_file() and file.resolve().is_relative_to(folder.resolve())


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number_or_word(value: Any) -> Any:
    """The value, with NaN and infinity as words, since JSON has neither."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_json(answer: Any) -> str:
    """An answer as JSON. Arrays are sent as bytes, as plotly.js reads them; no number is rounded."""
    return json.dumps(answer, default=_array, allow_nan=False, separators=(",", ":"))


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        kind = {"f": f"f{value.dtype.itemsize}"}.get(value.dtype.kind, "f8")
        content = np.ascontiguousarray(value, kind).astype(f"<{kind}", copy=False)
        packed = {"dtype": kind, "bdata": base64.b64encode(content.tobytes()).decode()}
        return packed | ({"shape": ", ".join(map(str, value.shape))} if value.ndim > 1 else {})
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent to a page")
