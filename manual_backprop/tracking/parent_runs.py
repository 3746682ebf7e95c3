"""Parent and child runs in MLflow: tags with MLflow's ids link a sweep and its runs.

MLflow's ids exist only after delivery. run.json names the other run by its directory (`sweep` of a run, `best` of a
sweep); once that one has been delivered, its run.json has the id. So every delivery looks for it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manual_backprop.common.errors import InputError
from manual_backprop.tracking.run_directory import RUNS, SWEEPS, read_run

PARENT_TAG = "mlflow.parentRunId"
BEST_RUN_TAG = "best_run_id"


def parent_and_child_tags(record: dict[str, Any], tracking_uri: str, outputs: Path) -> dict[str, str]:
    """The tags for the run whose run.json is `record`, in the store at `tracking_uri` (without credentials).

    The other run is in the same outputs directory, even if that was moved or copied.
    """
    tags = {}
    for tag, key, folder in ((PARENT_TAG, "sweep", SWEEPS), (BEST_RUN_TAG, "best", RUNS)):
        named = record.get(key)
        if named is not None and (run_id := _mlflow_id(outputs / folder / named["run_id"], tracking_uri)):
            tags[tag] = run_id
    return tags


def _mlflow_id(directory: Path, tracking_uri: str) -> str | None:
    try:
        known = read_run(directory).get("mlflow") or {}
    except InputError:  # it was removed
        return None
    return known.get("run_id") if known.get("tracking_uri") == tracking_uri else None
