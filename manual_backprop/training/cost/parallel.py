"""Whether MLflow receives everything from eight parallel runs on a new store, in several rounds.

Each round is a sweep of tiny runs in an empty folder (hydra-joblib-launcher, all jobs at once). Then the content of
MLflow is compared with the files of the runs.

Example: python -m manual_backprop.tools.cost parallel --rounds 1 --jobs 4

Exit codes: 0 everything arrived, 1 something did not, 2 wrong arguments.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.uris import sqlite_uri
from ...config.arguments import Parser, whole

if TYPE_CHECKING:
    from mlflow import MlflowClient

SENTENCE = "the cat saw {} mice and the owl saw {}. "
OVERRIDES = (
    *("model=tiny", "model.d_model=16", "model.n_heads=2", "model.d_ffn=24", "model.max_seq_len=8", "tokenizer=byte"),
    *("training=smoke", "training.log_every=1", "training.sample_length=4", "training.max_steps=8", "device=cpu"),
    *("dataset=text", "dataset.path=text.txt", "hydra/launcher=parallel"),
)


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--rounds", type=whole(1), default=10, metavar="R", help="number of rounds, each on a new store (%(default)s)")
    add("--jobs", type=whole(1), default=8, metavar="N", help="runs at once (%(default)s)")


def measure(options: Namespace, folder: Path) -> bool:
    failed = 0
    for number in range(options.rounds):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found = one_round(Path(place), options.jobs)
        failed += bool(found)
        result = "\n  ".join(["something is missing:", *found]) if found else "everything arrived"
        print(f"round {number + 1} of {options.rounds}, {time.monotonic() - start:.0f} s: {result}", flush=True)
    print(f"{options.rounds - failed} of {options.rounds} rounds of {options.jobs} parallel runs were complete")
    return not failed


def one_round(root: Path, n_jobs: int) -> list[str]:
    """Runs a sweep of `n_jobs` parallel runs in the folder `root`. Returns a sentence for everything that is
    missing."""
    from ...tracking.run_directory import SWEEPS, list_runs
    from ..sweeps.records import FINISHED, Records

    (root / "text.txt").write_text("".join(SENTENCE.format(n % 7, n * n % 11) for n in range(200)), encoding="utf-8")
    seeds = ",".join(map(str, range(n_jobs)))
    command = [sys.executable, "-m", "manual_backprop.run", "-m", *OVERRIDES]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [*command, f"hydra.launcher.n_jobs={n_jobs}", f"seed={seeds}"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    found = []
    if done.returncode:
        found.append(f"the sweep ended with exit code {done.returncode}: {done.stderr.strip()[-1000:]}")
    sweeps = list_runs(root / "outputs", SWEEPS)
    records = Records(sweeps[0]).read_all() if sweeps else []
    finished = [record for record in records if record.status == FINISHED]
    if len(finished) != n_jobs:
        found.append(f"{len(finished)} of {n_jobs} jobs finished")
    from mlflow import MlflowClient

    client = MlflowClient(sqlite_uri(root / "mlflow.db"))
    for record in finished:
        found += _missing(client, Path(str(record.run_directory)))
    return found


def _missing(client: MlflowClient, run: Path) -> list[str]:
    """What is in a run's files but not in MLflow, a sentence each."""
    from ...tracking import load_training_log
    from ...tracking.run_directory import read_run

    known = read_run(run)["mlflow"] or {}
    if not known.get("delivered"):
        return [f"{run.name} is not delivered"]
    logged, log = client.get_run(known["run_id"]), load_training_log(run)
    found = []
    if logged.info.status != "FINISHED":
        found.append(f"{run.name} is {logged.info.status} in MLflow")
    if "mlflow.parentRunId" not in logged.data.tags:
        found.append(f"{run.name} has no parent in MLflow")
    for name, series in (log.training | log.validation).items():
        stored = {point.step: point.value for point in client.get_metric_history(known["run_id"], name)}
        written = dict(zip(series.steps, series.values, strict=True))
        if stored.keys() != written.keys() or any(
            not math.isclose(stored[step], value, rel_tol=1e-12) for step, value in written.items()
        ):
            found.append(f"{run.name}: {name} has {len(stored)} points in MLflow and {len(written)} in its own file")
    return found
