"""Makes a project as a user has one, with the code of the checkout that is given, and packs it: see README.md.

    python tests/old_runs/make.py CHECKOUT PLACE

PLACE, which must not exist, is where the project is made; its path stands in the files. The archive and what the same
code says of the project (`expected.json`) are written beside this file. Standard library only, and no module of this
package: the code that is asked is the checkout's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

TINY = "model=tiny model.d_model=16 model.n_heads=2 model.d_ffn=24 model.max_seq_len=8 model.learning_rate=3e-3"
SHORT = "training=smoke training.log_every=1 training.sample_length=4 training.eval_every=3 training.save_every=3"
HERE = "device=cpu device.threads=1 kernels.compile=never"
COMMON = f"{TINY} {SHORT} {HERE} dataset=text dataset.path=text.txt"
STEPS = "training.max_steps=6"
BYTES = f"{COMMON} tokenizer=byte"
RUNS = {
    "finished": f"{BYTES} {STEPS} seed=3",
    "bf16": f"{COMMON} tokenizer=bpe tokenizer.vocab_size=270 {STEPS} architecture=llama model.n_kv_heads=1 "
    "precision=bf16 model.dropout=0.2 seed=4",
    "killed": f"{BYTES} model.dropout=0.1 training.max_steps=100000 training.eval_every=100000 "
    "training.save_every=100000 schedule=constant schedule.warmup_ratio=0",
}
SWEEP = f"{BYTES} training.max_steps=150 training.eval_every=150 training.save_every=150 tags.kind=sweep"
SWEPT = "optimizer.learning_rate=1e-3,2e-3,4e-3"
PROMPT = ("--prompt", "the cat", "--max-length", "12", "--temperature", "0")
MORE = 4  # steps that the killed run makes when it goes on
# Made for people; what reads a run needs none of them, and they would be most of the archive.
LEFT_OUT = (".png", ".lock")


class Project:
    def __init__(self, checkout: Path, place: Path):
        self.place = place
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(place.parent), "LANG": "C.UTF-8", "USER": "user"}
        self.environment |= {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", f"manual_backprop.{module}", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, cwd=self.place, env=self.environment, text=True, stdout=pipe, stderr=pipe)

    def command(self, module: str, *arguments: str) -> str:
        """What it prints."""
        process = self.start(module, *arguments)
        out, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{module} {' '.join(arguments)}\n{out}{errors}")
        return out

    def run(self, name: str) -> Path:
        """The run of this name."""
        (path,) = self.place.glob(f"outputs/runs/*-{name}-??????")
        return path

    def steps(self, name: str) -> int:
        files = list(self.place.glob(f"outputs/runs/*-{name}-??????/metrics.jsonl"))
        return files[0].read_bytes().count(b'"train/loss"') if files else 0

    def steps_of_job(self, number: int) -> int:
        for file in self.place.glob("outputs/runs/*/run.json"):
            origin = json.loads(file.read_text(encoding="utf-8")).get("sweep") or {}
            metrics = file.with_name("metrics.jsonl")
            if origin.get("job") == number and metrics.exists():
                return metrics.read_bytes().count(b'"train/loss"')
        return 0

    def jobs(self) -> list[dict[str, Any]]:
        files = sorted(self.place.glob("outputs/sweeps/*/jobs/*.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def values(run: Path, name: str) -> dict[int, float]:
    """A metric of a run, by step; of a step that was made twice the last."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines[1:]]
    return {entry["step"]: entry["metrics"][name] for entry in entries if name in entry["metrics"]}


def make(project: Project) -> None:
    project.place.mkdir(parents=True)
    text = " ".join(f"the {('cat', 'dog', 'owl')[n * n % 3]} saw {n % 7} mice." for n in range(300))
    (project.place / "text.txt").write_text(text)
    documents = [f"the {('cat', 'dog', 'owl')[n * n % 3]} saw {n % 7} mice of {n % 11}." for n in range(120)]
    (project.place / "documents.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    for name in ("finished", "bf16"):
        project.command("run", *RUNS[name].split(), f"run_name={name}")
    killed = project.start("run", *RUNS["killed"].split(), "run_name=killed")
    while project.steps("killed") < 5:
        time.sleep(0.001)
    killed.send_signal(signal.SIGTERM)
    killed.communicate()
    assert killed.returncode == 128 + signal.SIGTERM
    project.command("convert", "to-hf", project.run("finished").name, "exported")
    tools = ("tools.tokenization", "pretokenize", "documents.jsonl", "byte", "--output", "prepared")
    project.command(*tools, "--workers", "1")
    sweep = project.start("run", "-m", *SWEEP.split(), SWEPT, "run_name=sweep")
    while project.steps_of_job(1) < 3:
        time.sleep(0.001)
    sweep.send_signal(signal.SIGTERM)
    sweep.communicate()
    statuses = [job["status"] for job in project.jobs()]
    assert statuses == ["FINISHED", "KILLED", "WAITING"], f"the signal came at another moment, once more: {statuses}"


def expected(project: Project) -> dict[str, Any]:
    """What the code that made the project makes of it. The project is another one afterwards."""
    finished, killed = project.run("finished"), project.run("killed")
    found: dict[str, Any] = {}
    for name in ("finished", "bf16"):
        run = project.run(name)
        printed = project.command("generate", run.name, *PROMPT)
        table = project.command("evaluate", run.name)
        log = values(run, "evaluation/validation_loss")
        found[name] = {"text": printed.split("\n", 1)[1], "evaluation": log[max(log)], "line": table.split("\n")[0]}
    found["exported"] = {"text": project.command("generate", "exported", *PROMPT).split("\n", 1)[1]}
    script = (
        "import json, mlflow, sys; model = mlflow.pyfunc.load_model(sys.argv[1]); "
        "print(json.dumps(model.predict(['the cat'], params={'max_length': 12, 'temperature': 0.0})))"
    )
    mlflow_id = json.loads((finished / "run.json").read_text())["mlflow"]["run_id"]
    words = [sys.executable, "-c", script, f"runs:/{mlflow_id}/model"]
    given = project.environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{project.place / 'mlflow.db'}"}
    done = subprocess.run(words, cwd=project.place, env=given, capture_output=True, text=True, check=True)
    found["served"] = {"texts": json.loads(done.stdout.splitlines()[-1])}
    first = max(values(killed, "train/loss"))
    project.command("run", f"resume={killed.name}", f"training.max_steps={first + MORE}")
    losses = values(killed, "train/loss")
    found["killed"] = {
        "steps": first,
        "losses": [losses[step] for step in range(first + 1, first + MORE + 1)],
        "validation": values(killed, "validation/loss")[first + MORE],
    }
    (sweep,) = project.place.glob("outputs/sweeps/*")
    project.command("run", f"sweep.resume={sweep.name}")
    found["sweep"] = {"losses": [job["validation_loss"] for job in project.jobs()]}
    data = "dataset=pretokenized dataset.path=prepared tokenizer=pretokenized tracking=none run_name=prepared"
    project.command("run", *f"{TINY} {SHORT} {HERE} {STEPS} {data}".split())
    prepared = project.run("prepared")
    found["prepared"] = {
        "losses": list(values(prepared, "train/loss").values()),
        "validation": values(prepared, "validation/loss")[6],
    }
    return found


def pack(place: Path, archive: Path) -> None:
    """Times and owners are no part of it; what is a hard link in the project is one in the archive."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return None if entry.name.endswith(LEFT_OUT) else entry

    with tarfile.open(archive, "w:xz", preset=9) as file:
        file.add(place, arcname=".", filter=plain)


def main(checkout: Path, place: Path) -> None:
    here = Path(__file__).parent
    project = Project(checkout.resolve(), place)
    make(project)
    asked = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    name = commit[:7]
    pack(place, here / f"{name}.tar.xz")
    found = {"commit": commit, "place": str(place)} | expected(project)
    (here / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
