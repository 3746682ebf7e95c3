"""What a documented command must have done: for each of them a check of what it leaves behind and of what it says.

`CHECKS` is the table: a pattern of commands, and what the sentence beside them promises. Every command has at least one
check that is its own (`ANY_RUN` looks at whatever trains); test_documents_for_people.py fails while one has none.
`AFTER` says which command must have been given before.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_tools import ROOT

from manual_backprop.__main__ import GROUPS, example_of
from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint, verify
from manual_backprop.config.schema import HUB, model_sizes, shipped_folder
from manual_backprop.data.series.reader import SHIPPED
from manual_backprop.data.tokens.tokenizer import load_tokenizer
from manual_backprop.tracking import TrainingLog, flatten, load_training_log
from manual_backprop.tracking.run_directory import RUNS, SWEEPS, list_runs, read_run
from manual_backprop.training.sweeps.records import JobRecord, Records

PNG = b"\x89PNG"


@dataclass(frozen=True)
class Outcome:
    """Of a command that has ended, in the folder in which it was given."""

    words: list[str]  # -m module arguments, as they were run
    done: subprocess.CompletedProcess[str]
    place: Path
    before: dict[str, int]  # files, and when they were written [ns]

    @property
    def said(self) -> str:
        return self.done.stdout

    @property
    def given(self) -> dict[str, str]:
        """KEY=VALUE among its arguments."""
        pairs = (word.partition("=") for word in self.words[2:] if "=" in word)
        return {name: value for name, _, value in pairs}

    @property
    def written(self) -> set[str]:
        return {name for name, time in files_in(self.place).items() if self.before.get(name) != time}

    def new(self, folder: str = RUNS) -> list[Path]:
        """Run or sweep directories that were not there before."""
        old = {Path(name).parts[2] for name in self.before if Path(name).parts[:2] == ("outputs", folder)}
        return [path for path in list_runs(self.place / "outputs", folder) if path.name not in old]


def files_in(place: Path) -> dict[str, int]:
    return {str(path.relative_to(place)): path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


# Runs


def the_run(outcome: Outcome) -> Path:
    """The one that the command has made, or gone on with."""
    (path,) = outcome.new() or list_runs(outcome.place / "outputs")
    return path


def log_of(outcome: Outcome) -> TrainingLog:
    return load_training_log(the_run(outcome))


def check_finished(run: Path, steps: int, tracked: bool = True) -> None:
    """It has come to its end, with a sound checkpoint there, losses that can be, and all of it in MLflow."""
    content, log = read_run(run), load_training_log(run)
    assert content["status"] == "FINISHED"
    assert log.training["train/loss"].steps[-1] == log.validation["validation/loss"].steps[-1] == steps
    most = 3 * math.log(log.config["tokenizer"].get("vocab_size") or 50257)
    losses = [*log.training["train/loss"].values, *log.validation["validation/loss"].values]
    assert all(0 < loss < most for loss in losses), losses
    latest = CheckpointManager(run / "checkpoints").latest()
    assert latest is not None
    assert latest.name == f"step-{steps:06d}"
    verify(latest)
    assert tracked == bool((content["mlflow"] or {}).get("delivered"))


def check_a_run(outcome: Outcome) -> None:
    """It has the config that the command names, is checked in MLflow, and the summary says where it is."""
    run, given = the_run(outcome), outcome.given
    check_finished(run, int(given["training.max_steps"]), tracked="tracking" not in given)
    assert f"outputs/runs/{run.name}" in outcome.said
    assert "validation loss" in outcome.said
    config = load_training_log(run).config
    check_config(config, given)
    for name in ("run.log", "config_sources.json", "packages.txt", "gradient_check.txt", "training_progress.png"):
        assert (run / name).stat().st_size > 0, name


def check_config(config: dict[str, Any], given: dict[str, str]) -> None:
    flat = flatten(config)
    for key, value in given.items():
        if key == "model":
            sizes = {name: size for name, size in model_sizes()[value].items() if f"model.{name}" not in given}
            sizes = {name: size for name, size in sizes.items() if name != "vocab_size"}
            assert {name: config["model"][name] for name in sizes} == sizes
        elif key in flat and key != "init_from":  # which stands there as the checkpoint that it means
            assert as_written(flat[key]) == as_written(value), key
        elif f"{key}.name" in flat:
            assert flat[f"{key}.name"] == value


def as_written(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return {"null": None, "true": True, "false": False}.get(value, value)


def check_everything_is_touched(outcome: Outcome) -> None:
    """20 steps: evaluations, samples and checkpoints on the way; the loss falls; nothing goes to MLflow."""
    log = log_of(outcome)
    assert log.validation["validation/loss"].steps == [10, 20]
    first, *_, last = log.training["train/loss"].values
    assert last < first
    assert log.validation["validation/loss"].values[1] < log.validation["validation/loss"].values[0]
    assert {path.name for path in (log.path / "samples").iterdir()} == {"step-000010.txt", "step-000020.txt"}
    assert {path.name for path in CheckpointManager(log.path / "checkpoints").list()} == {"step-000010", "step-000020"}
    assert "mlflow.db" not in outcome.written


def check_one_batch_is_learned(outcome: Outcome) -> None:
    assert log_of(outcome).training["train/loss"].values[-1] < 0.1


def check_not_compiled(outcome: Outcome) -> None:
    assert read_run(the_run(outcome))["made_with"]["compiled"] is False


def check_characters(outcome: Outcome) -> None:
    """The tokens are the characters that the text has."""
    tokenizer = load_tokenizer(the_run(outcome))
    text = (outcome.place / "README.md").read_text(encoding="utf-8")
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(tokenizer.encode("Return the")) == "Return the"


def check_resumed(outcome: Outcome) -> None:
    """The same run goes on from its step 2, and no step is missing or twice."""
    assert not outcome.new()
    run, steps = the_run(outcome), int(outcome.given["training.max_steps"])
    (resume,) = read_run(run)["resumes"]
    assert resume["step"] == 2
    check_finished(run, steps)


def check_made_again(outcome: Outcome) -> None:
    (run,) = outcome.new()
    assert "The losses of 2 steps are bitwise the same." in outcome.said
    assert "nothing has changed since, as far as is known" in outcome.said
    first = list_runs(outcome.place / "outputs")[0]
    assert run != first
    assert (
        load_training_log(run).training["train/loss"].values == load_training_log(first).training["train/loss"].values
    )


def check_delivered(outcome: Outcome) -> None:
    (run,) = list_runs(outcome.place / "outputs")
    assert f"{run.relative_to(outcome.place)} is delivered to sqlite:///" in outcome.said
    assert "experiment manual_backprop" in outcome.said
    assert of_mlflow(outcome, "select status from runs") == [("FINISHED",)], "and not a second one"


def of_mlflow(outcome: Outcome, query: str) -> list[tuple]:
    with sqlite3.connect(outcome.place / "mlflow.db") as database:
        return database.execute(query).fetchall()


def check_inspected(outcome: Outcome) -> None:
    log, layers = log_of(outcome), log_of(outcome).config["model"]["n_blocks"]
    for quantity in ("gradient_norm", "update_ratio", "dead_units", "attention_entropy"):
        found = [name for name in log.training if name.startswith(f"inspect/{quantity}/")]
        assert len(found) >= layers, quantity
        assert all(log.training[name].steps == [1, 2] for name in found)
    for name in ("attention.png", "histograms.png", "layers.png"):
        assert (log.path / "inspection" / name).read_bytes().startswith(PNG)


def check_own_text(outcome: Outcome) -> None:
    """Every file of the folder is a document; the tokenizer is learned, and the tokens are kept."""
    assert list((outcome.place / "outputs" / "datasets").iterdir())
    assert load_tokenizer(the_run(outcome)).vocab_size <= 4096


def check_initial_weights(outcome: Outcome) -> None:
    """Sizes, architecture and tokenizer are those of the model that was imported, which is the first run's."""
    first, run = list_runs(outcome.place / "outputs")[0], the_run(outcome)
    assert run != first
    theirs, mine = (load_training_log(path).config for path in (first, run))
    assert Path(mine["init_from"]).is_relative_to(outcome.place / "imported")
    for name in ("d_model", "n_blocks", "n_heads", "d_ffn", "max_seq_len"):
        assert mine["model"][name] == theirs["model"][name]
    assert mine["architecture"]["name"] == theirs["architecture"]["name"]
    assert load_tokenizer(run).digest == load_tokenizer(first).digest


# Sweeps


def the_sweep(outcome: Outcome) -> Path:
    (path,) = list_runs(outcome.place / "outputs", SWEEPS)
    return path


def jobs_of(outcome: Outcome) -> list[JobRecord]:
    return Records(the_sweep(outcome)).read_all()


def swept_by(outcome: Outcome) -> dict[str, list[str]]:
    """The keys of which the command, or its experiment, names several values."""
    found = {key: value.split(",") for key, value in outcome.given.items() if "," in value and "(" not in value}
    return found or {"implementation": ["custom", "torch"]}  # of experiments=manual_vs_autograd


def check_a_sweep(outcome: Outcome) -> None:
    """A child for each job, all FINISHED; a table, best first, and curves; in MLflow one child is the best."""
    sweep, jobs, swept = the_sweep(outcome), jobs_of(outcome), swept_by(outcome)
    search = "hydra/sweeper" in outcome.given
    assert len(jobs) == (2 if search else math.prod(map(len, swept.values())))
    assert len({job.title for job in jobs}) == len(jobs)
    assert {job.status for job in jobs} == {"FINISHED"}
    runs = {run.name: run for run in outcome.new()}
    assert sorted(Path(str(job.run_directory)).name for job in jobs) == sorted(runs)
    for run in runs.values():
        check_finished(run, 2)
    assert read_run(sweep)["status"] == "FINISHED"
    losses = [row["validation_loss"] for row in rows_of(sweep / "table.csv")]
    assert len(losses) == len(jobs)
    assert losses == sorted(losses, key=float)
    assert "overrides " in outcome.said
    assert outcome.said.count("FINISHED") >= len(jobs)
    assert (sweep / "curves.png").read_bytes().startswith(PNG)
    assert (sweep / "heat_map.png").exists() == (len(swept) == 2)
    (best,) = of_mlflow(outcome, "select run_uuid from tags where key = 'best' and value = 'true'")
    assert best[0] in [read_run(run)["mlflow"]["run_id"] for run in runs.values()]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def check_both_curves(outcome: Outcome) -> None:
    (difference,) = re.findall(r"largest difference of train/loss: (\S+) nats per token", outcome.said)
    assert float(difference) < 1e-4
    assert (the_sweep(outcome) / "comparison.png").read_bytes().startswith(PNG)


def check_searched(outcome: Outcome) -> None:
    rates = [float(job.title.partition("=")[2]) for job in jobs_of(outcome)]
    assert len(set(rates)) == 2
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)


def check_only_the_rest_is_run(outcome: Outcome) -> None:
    """What had finished stays as it is, and the table is of all."""
    jobs = jobs_of(outcome)
    assert {job.status for job in jobs} == {"FINISHED"}
    assert outcome.said.count(" starts: ") == 1
    assert len(outcome.new()) == 1
    assert len(rows_of(the_sweep(outcome) / "table.csv")) == len(jobs) > 1


def leave_a_job_waiting(place: Path) -> None:
    """As if the sweep had been stopped before its last job."""
    (sweep,) = list_runs(place / "outputs", SWEEPS)
    *_, last = Records(sweep).read_all()
    Records(sweep).write(JobRecord(last.number, last.overrides, last.swept))


# What looks at a run


def check_line_of_the_model(outcome: Outcome) -> None:
    """Which model it is: the first line."""
    line = outcome.said.splitlines()[0]
    assert re.match(r"custom \(gpt2, fp32\): [\d,]+ parameters, step \d, validation loss \d\.\d+ \(", line), line


def check_compared(outcome: Outcome) -> None:
    head, row = outcome.said.splitlines()[:2]
    assert re.split(" {2,}", head.strip()) == ["validation loss", "steps", "status", "run"]
    loss = load_training_log(list_runs(outcome.place / "outputs")[-1]).validation["validation/loss"].values[-1]
    assert row.split()[:3] == [f"{loss:.4f}", "2", "FINISHED"]


def check_table_of_runs(outcome: Outcome) -> None:
    (row,) = rows_of(outcome.place / "runs.csv")
    run = list_runs(outcome.place / "outputs")[-1]
    assert (row["run"], row["status"], row["steps"]) == (run.name, "FINISHED", "2")
    assert row["model.n_blocks from"] == "model=tiny"


def check_page_of_runs(outcome: Outcome) -> None:
    """One file, with the run's curves and plotly's script inside."""
    (name,) = (name for name in outcome.written if name.endswith(".html"))
    page = (outcome.place / name).read_text(encoding="utf-8")
    assert list_runs(outcome.place / "outputs")[-1].name in page
    assert "plotly.js v" in page
    assert "<script src=" not in page
    assert f"wrote {name} " in outcome.said


def check_page_of_a_model(outcome: Outcome) -> None:
    page = (outcome.place / "model.html").read_text(encoding="utf-8")
    assert '"text":"Return the"' in page
    assert '"name":"blocks.0.attention"' in page


def check_forecasts(outcome: Outcome) -> None:
    """RMSE and MASE of the test part beside simple methods, and the picture."""
    run = the_run(outcome)
    assert re.search(r"test +RMSE [\d.]+, MASE [\d.]+ of \d+ windows", outcome.said)
    assert re.search(r"RMSE of simple methods: (ridge [\d.]+; )?.*persistence [\d.]+", " ".join(outcome.said.split()))
    assert (run / "forecasts.png").read_bytes().startswith(PNG)


def check_forecasts_compared(outcome: Outcome) -> None:
    assert re.search(r"^test: 432 windows of co2: 104 -> 26 steps of 7 days *$", outcome.said, flags=re.M)
    assert re.search(r"^ *RMSE, step 26 +([\d.]+ +){5}[\d.]+ *$", outcome.said, flags=re.M)
    assert outcome.said.count("26 steps ahead: co2 3") == 4


def check_forecast_lines(outcome: Outcome) -> None:
    lines = [json.loads(line) for line in outcome.said.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 27))
    assert lines[0]["time"] == "2002-01-05"
    assert all(360 < line["forecast"]["co2"] < 380 for line in lines)


def write_history(place: Path) -> None:
    shutil.copy2(SHIPPED["co2"], place / "history.csv")


def check_reversal(outcome: Outcome) -> None:
    """Epochs, ten predictions with their verdicts, the test rows, and where the target looks."""
    run = list_runs(outcome.place / "outputs")[-1]
    assert re.search(r"epoch 1/1 \| train loss .* \| validation loss .* \| exact match ", outcome.said)
    samples = (run / "samples/step-000002.txt").read_text(encoding="utf-8").splitlines()
    assert sum("\u2713" in line or "\u2717" in line for line in samples) == 10
    assert (run / "cross_attention.png").read_bytes().startswith(PNG)
    assert load_training_log(run).validation["validation/exact_match"].steps == [2]


def check_sorted_by_a_decoder(outcome: Outcome) -> None:
    config = load_training_log(list_runs(outcome.place / "outputs")[-1]).config
    assert (config["network"], config["task"]["name"]) == ("decoder", "sort")


def check_labels(outcome: Outcome) -> None:
    """Accuracy and macro F1 of both splits beside simple methods, predictions with their verdicts, and the picture."""
    run = the_run(outcome)
    words = " ".join(outcome.said.split())
    for split in ("validation", "test"):
        assert {f"{split}/{name}" for name in ("accuracy", "f1", "majority_accuracy", "tfidf_f1")} <= {
            *load_training_log(run).validation,
            *load_training_log(run).training,
        }
    assert words.count("TF-IDF with logistic regression") >= 2
    assert re.search(r"\w+ \d+% [\u2713\u2717]", outcome.said)
    assert (run / "confusion.png").read_bytes().startswith(PNG)
    assert len(json.loads((run / "labels.json").read_text())["labels"]) == 8


def check_own_labels(outcome: Outcome) -> None:
    run = the_run(outcome)
    assert json.loads((run / "labels.json").read_text()) == {"labels": ["even", "odd"]}
    assert "texts of 2 labels for training" in (run / "run.log").read_text()


def check_labelled(outcome: Outcome) -> None:
    (line,) = outcome.said.splitlines()
    answer = json.loads(line)
    assert answer["text"] == "Run the event loop until it is stopped."
    assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].__getitem__)
    assert len(answer["probabilities"]) == 8


def check_labels_compared(outcome: Outcome) -> None:
    assert re.search(r"test: \d+ texts", outcome.said)
    assert all(re.search(rf"^ *{name} .*\d\.\d+%", outcome.said, flags=re.M) for name in ("model", "majority", "tfidf"))
    assert sum("\u2713" in line or "\u2717" in line for line in outcome.said.splitlines()) == 6


def check_dates(outcome: Outcome) -> None:
    """Predictions with their verdicts, exact match in each language, chrF, the test days, and where it looks."""
    run = the_run(outcome)
    log = load_training_log(run)
    assert re.search(r" -> .*[\u2713\u2717]", outcome.said)
    names = ("exact_match", "chrf", "exact_match_de", "exact_match_fr", "exact_match_ja")
    assert all(f"validation/{name}" in log.validation for name in names)
    assert {"test/exact_match", "test/chrf"} <= set(log.training)
    assert (run / "cross_attention.png").read_bytes().startswith(PNG)


def check_own_pairs(outcome: Outcome) -> None:
    assert re.search(r"\d+ pairs for training, \d+ for validation, 300 tokens \(bpe\)", outcome.said)
    assert (list_runs(outcome.place / "outputs")[-1] / "tokenizer.json").is_file()


def check_translated(outcome: Outcome) -> None:
    """The model, and one line."""
    assert len(outcome.said.splitlines()) == 2


def check_translations(outcome: Outcome) -> None:
    assert re.search(r"test: \d+ pairs", outcome.said)
    assert sum("\u2713" in line or "\u2717" in line for line in outcome.said.splitlines()) == 5
    assert re.search(r"exact match +\d+\.\d\d% of the targets", outcome.said)
    assert re.search(r"chrF +\d", outcome.said)


def check_row(outcome: Outcome) -> None:
    """The row, what the model writes, and whether it is right."""
    assert re.match(r"1 2 3 4 -> .*  [\u2713\u2717]", outcome.said.splitlines()[1])


def check_rows(outcome: Outcome) -> None:
    """Free-running exact match beside teacher-forced accuracy, and ten rows."""
    assert re.search(r"exact match +\d+\.\d\d% .*free-running", outcome.said)
    assert re.search(r"accuracy +\d+\.\d\d% of [\d,]+ tokens", outcome.said)
    assert outcome.said.count(" -> ") == 10


def check_evaluated(outcome: Outcome) -> None:
    """The loss beside counting models, a sample, twenty tokens one by one; it is added to the run."""
    for name in ("model", "bigram", "unigram"):
        assert re.search(rf"^ *{name} +\d+\.\d{{4}} ", outcome.said, flags=re.M), name
    assert "--- sample 1 of " in outcome.said
    assert re.search(r"mean loss of these 20 tokens: \d+\.\d{4}", outcome.said)
    run = list_runs(outcome.place / "outputs")[-1]
    assert load_training_log(run).training["evaluation/validation_loss"].steps == [2]
    assert of_mlflow(outcome, "select step from metrics where key = 'evaluation/validation_loss'") == [(2,)]


def check_continued(outcome: Outcome) -> None:
    text = outcome.said.split("\n", 1)[1]
    assert text.startswith("Return the")
    assert len(text) > len("Return the\n")


def check_stopped(outcome: Outcome) -> None:
    assert "." not in outcome.said.split("\n", 1)[1], "it ends before the first full stop"


def check_chat(outcome: Outcome) -> None:
    """It says what can be typed, and leaves at the end of the input."""
    assert "Type the beginning of a text; help lists the commands, Ctrl-D quits." in outcome.said
    assert outcome.said.rstrip().endswith(">")


def check_summary(outcome: Outcome) -> None:
    """Parameters, FLOPs, memory, every tensor of a step."""
    for word in ("in all", " FLOPs", "MB", "blocks.0.attention.probabilities", "blocks.1.feed_forward.hidden.dweight"):
        assert word in outcome.said, word


def check_summary_of_gpt2(outcome: Outcome) -> None:
    assert "124,439,808" in outcome.said
    assert "400 TFLOP/s (as given)" in outcome.said
    assert not outcome.written


def check_verified(outcome: Outcome) -> None:
    """Every error beside its bar, of all ops and networks."""
    assert outcome.said.splitlines()[-1].startswith("ok: all ")
    assert not outcome.written


def check_every_op_and_parameter_is_in_the_table(outcome: Outcome) -> None:
    from manual_backprop.models.network import parameter_shapes
    from manual_backprop.study.gradient_check import ODD, ROWS

    named = {*ROWS, *parameter_shapes(ODD), "head.weight", "gpt2", "vaswani", "llama"}
    assert {name for name in named if name not in outcome.said} == set()
    assert "FAILED" not in outcome.said


def check_diagnosed(outcome: Outcome) -> None:
    """Seven checks, a curve of the rates; no run."""
    for number in range(1, 8):
        assert re.search(rf"^{number}  passed ", outcome.said, flags=re.M), number
    assert "ok: all 7 checks passed" in outcome.said
    assert not outcome.new()
    assert [name for name in outcome.written if name.endswith(".png")]


def check_explained(page: str, network: str) -> Callable[[Outcome], None]:
    def check_page_is_written(outcome: Outcome) -> None:
        assert page in outcome.written
        assert f"wrote {page}: " in outcome.said
        text = (outcome.place / page).read_text(encoding="utf-8")
        assert network in text
        assert text.count("```python") > 10

    return check_page_is_written


def check_page_of_names(outcome: Outcome) -> None:
    """It is the page that lies here."""
    page = "docs/api.md"
    assert page in outcome.written
    assert outcome.said == f"wrote {page}\n"
    assert (outcome.place / page).read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")


def check_both_sides(outcome: Outcome) -> None:
    """Every pair beside its mirror, on both pages."""
    pages = {"docs/guide/side-by-side.md", "outputs/side-by-side.html"}
    assert outcome.written == pages
    for page in pages:
        assert f"wrote {page}: " in outcome.said
        text = (outcome.place / page).read_text(encoding="utf-8")
        assert "self_attention_backward" in text
        assert "SoftmaxBackward0" in text


# Data


def check_listed(outcome: Outcome) -> None:
    named = {line.split()[0] for line in outcome.said.splitlines()[1:]}
    assert named == set(HUB) - {"hub"}


def check_inspected_rows(outcome: Outcome) -> None:
    assert re.search(r"^train: 1 row, .*; columns: ", outcome.said, flags=re.M)
    assert "row 1, raw" in outcome.said
    assert "decoded" in outcome.said
    assert not outcome.written


def check_analyzed(outcome: Outcome) -> None:
    """Which vocab_size and max_seq_len to take, for both; a picture."""
    for name in ("python_docs", "docs"):
        assert re.search(rf"^{name}: recommended\n +vocab_size +\d+ .*\n +max_seq_len +\d+ ", outcome.said, flags=re.M)
    assert (outcome.place / "sizes.png").read_bytes().startswith(PNG)


def check_tokenizer(name: str, most: int) -> Callable[[Outcome], None]:
    def check_tokenizer_is_learned(outcome: Outcome) -> None:
        folder = outcome.place / "outputs" / "tokenizers" / name
        tokenizer = load_tokenizer(folder)
        assert 257 < tokenizer.vocab_size <= most
        assert tokenizer.decode(tokenizer.encode("Return the")) == "Return the"
        assert f"{name}: {tokenizer.vocab_size:,} tokens" in outcome.said

    return check_tokenizer_is_learned


def check_pretokenized(outcome: Outcome) -> None:
    assert {"prepared/manifest.json"} <= outcome.written
    for split in ("train", "validation"):
        assert re.search(rf"^  {split}: [\d,]+ tokens of [\d,]+ documents", outcome.said, flags=re.M)


def check_speed(outcome: Outcome) -> None:
    (speed,) = re.findall(r"^([\d.]+) MB/s on \d+ cores", outcome.said, flags=re.M)
    assert float(speed) > 0
    assert re.search(r"[\d,]+ documents, [\d,]+ tokens in ", outcome.said)


# To and from Hugging Face


def check_exported(outcome: Outcome) -> None:
    there = {"exported/config.json", "exported/model.safetensors", "exported/README.md", "exported/tokenizer.json"}
    assert there <= outcome.written
    assert 'Load it with AutoModelForCausalLM.from_pretrained("exported")' in outcome.said


def check_imported(outcome: Outcome) -> None:
    """With the weights of the run that was exported, bit for bit."""
    import torch

    found = CheckpointManager(outcome.place / "imported").latest()
    assert found is not None
    best = CheckpointManager(list_runs(outcome.place / "outputs")[-1] / "checkpoints").best()
    assert best is not None
    mine, its = (load_checkpoint(path).tensors["parameters"] for path in (found, best))
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in its)


# What ends at once


def check_commands_are_listed(outcome: Outcome) -> None:
    """In groups, each with an example."""
    for title, group in GROUPS.items():
        assert f"\n{title}\n" in outcome.said
        for name, (about, example) in group.items():
            lines = rf"^  {name} +{re.escape(about)}\n +{re.escape(example_of(name, example))}$"
            assert re.search(lines, outcome.said, flags=re.M), name


def check_help(outcome: Outcome) -> None:
    """Every group with its options; keys, and how to see all of them."""
    from manual_backprop.config.validation import groups, keys

    for group in groups():
        for option in (shipped_folder("conf") / group).glob("*.yaml"):
            assert re.search(rf"\b{group}\b", outcome.said)
            assert option.stem in outcome.said, option
    shown = re.findall(r"^  ([a-z_]+(?:\.[a-z_]+)*) +\S", outcome.said.partition("\nMost used keys")[2], flags=re.M)
    assert len(shown) > 20
    assert set(shown[:20]) <= set(keys())
    assert "all other keys: --cfg job" in outcome.said


def check_plan(outcome: Outcome) -> None:
    """Each value with what has set it, parameters, memory, time."""
    assert re.search(r"^  model\.d_model +64 +model=tiny$", outcome.said, flags=re.M)
    assert re.search(r"^  seed +\d+ +default$", outcome.said, flags=re.M)
    for word in ("parameters", "FLOPs", "MB", "steps", "checkpoint"):
        assert word in outcome.said, word


RUN = r"python -m manual_backprop\.run"
TOOLS = r"python -m manual_backprop\.tools"
SWEEP = rf"{RUN} (-m|experiments=manual_vs_autograd)"
ANY_RUN = rf"{RUN}(?! -m| experiments=manual_vs_autograd| sweep\.resume=| resume=|.*(--help|plan=true))"
OF_TEXTS = r"(?!.* --(source|predictions))"

CHECKS: dict[str, Callable[[Outcome], None]] = {
    ANY_RUN: check_a_run,
    rf"{RUN} training=smoke tracking=none": check_everything_is_touched,
    rf"{RUN} experiments=NAME": check_one_batch_is_learned,
    rf"{RUN} .*kernels.compile=never": check_not_compiled,
    rf"{RUN} .*tokenizer=char model=tiny": check_characters,
    rf"{RUN} .*tokenizer.vocab_size=4096": check_own_text,
    rf"{RUN} experiments=reversal": check_reversal,
    rf"{RUN} experiments=co2": check_forecasts,
    r"python -m manual_backprop\.evaluate last .*--predictions 4": check_forecasts_compared,
    r"python -m manual_backprop\.predict last --file history\.csv": check_forecast_lines,
    rf"{RUN} task=sort": check_sorted_by_a_decoder,
    rf"{RUN} experiments=docstrings": check_labels,
    rf"{RUN} task=classification": check_own_labels,
    r"python -m manual_backprop\.evaluate last .*--predictions 6": check_labels_compared,
    r"python -m manual_backprop\.predict last --text": check_labelled,
    rf"{RUN} experiments=dates": check_dates,
    rf"{RUN} task=translation": check_own_pairs,
    rf"{RUN} resume=": check_resumed,
    rf"{RUN} training.inspect_every": check_inspected,
    rf"{RUN} init_from=imported": check_initial_weights,
    SWEEP: check_a_sweep,
    rf"{RUN} experiments=manual_vs_autograd": check_both_curves,
    rf"{RUN} .*sweeper=search": check_searched,
    rf"{RUN} sweep.resume=": check_only_the_rest_is_run,
    r"python -m manual_backprop\.rerun": check_made_again,
    r"python -m manual_backprop\.sync": check_delivered,
    r"python -m manual_backprop\.compare": check_compared,
    r"python -m manual_backprop\.compare last --csv": check_table_of_runs,
    r"python -m manual_backprop\.visualize last .*--export": check_page_of_runs,
    r"python -m manual_backprop\.visualize last --text": check_page_of_a_model,
    rf"python -m manual_backprop\.(evaluate|generate last|chat|summary last|convert to-hf){OF_TEXTS}": (
        check_line_of_the_model
    ),
    r"python -m manual_backprop\.evaluate(?!.* --predictions)": check_evaluated,
    r"python -m manual_backprop\.evaluate last .*--predictions 10": check_rows,
    r"python -m manual_backprop\.evaluate last .*--predictions 5": check_translations,
    r"python -m manual_backprop\.generate(?!.* --source)": check_continued,
    r"python -m manual_backprop\.generate last --source \"1": check_row,
    r"python -m manual_backprop\.generate last --source \"<de>": check_translated,
    r"python -m manual_backprop\.generate last .*--stop": check_stopped,
    r"python -m manual_backprop\.chat": check_chat,
    r"python -m manual_backprop\.summary last": check_summary,
    r"python -m manual_backprop\.summary model=gpt2": check_summary_of_gpt2,
    r"python -m manual_backprop\.verify": check_verified,
    r"python -m manual_backprop\.verify$": check_every_op_and_parameter_is_in_the_table,
    r"python -m manual_backprop\.diagnose": check_diagnosed,
    r"python -m manual_backprop\.explain$": check_explained("docs/one-step.md", "as in GPT-2"),
    r"python -m manual_backprop\.explain --task reversal": check_explained(
        "docs/one-step-encoder-decoder.md", "cross-attention from the target to the source"
    ),
    r"python -m manual_backprop\.explain --architecture llama": check_explained("llama-step.md", "as in LLaMA"),
    rf"{TOOLS}\.side_by_side": check_both_sides,
    rf"{TOOLS}\.download_dataset --list": check_listed,
    rf"{TOOLS}\.inspect": check_inspected_rows,
    rf"{TOOLS}\.tokenization analyze": check_analyzed,
    rf"{TOOLS}\.tokenization train registry": check_tokenizer("python_docs-1024", 1024),
    rf"{TOOLS}\.tokenization train file": check_tokenizer("README.md-512", 512),
    rf"{TOOLS}\.tokenization pretokenize": check_pretokenized,
    rf"{TOOLS}\.cost preparing": check_speed,
    rf"{TOOLS}\.api_page": check_page_of_names,
    r"python -m manual_backprop\.convert to-hf": check_exported,
    r"python -m manual_backprop\.convert from-hf": check_imported,
    r"python -m manual_backprop$": check_commands_are_listed,
    rf"{RUN} --help": check_help,
    rf"{RUN} .*plan=true": check_plan,
}

# What must have been done before: another command, or a change of the folder. Without: one run of two steps is there.
AFTER: dict[str, str] = {
    'python -m manual_backprop.generate last --source "<de> Tuesday, March 3, 1998"': (
        "python -m manual_backprop.run experiments=dates"
    ),
    "python -m manual_backprop.evaluate last --split test --predictions 5": (
        "python -m manual_backprop.run experiments=dates"
    ),
    'python -m manual_backprop.generate last --source "1 2 3 4" --beams 4': (
        "python -m manual_backprop.run experiments=reversal"
    ),
    "python -m manual_backprop.evaluate last --split test --predictions 10": (
        "python -m manual_backprop.run experiments=reversal"
    ),
    "python -m manual_backprop.evaluate last --split test --predictions 6": (
        "python -m manual_backprop.run experiments=docstrings"
    ),
    'python -m manual_backprop.predict last --text "Run the event loop until it is stopped."': (
        "python -m manual_backprop.run experiments=docstrings"
    ),
    "python -m manual_backprop.evaluate last --split test --predictions 4": (
        "python -m manual_backprop.run experiments=co2"
    ),
    "python -m manual_backprop.predict last --file history.csv": "python -m manual_backprop.run experiments=co2",
    "python -m manual_backprop.run sweep.resume=last": (
        "python -m manual_backprop.run -m model=tiny,small optimizer.learning_rate=1e-3,3e-3"
    ),
    "python -m manual_backprop.run dataset=pretokenized dataset.path=prepared tokenizer=pretokenized": (
        "python -m manual_backprop.tools.tokenization pretokenize python_docs python_docs-1024 --output prepared"
    ),
    "python -m manual_backprop.tools.tokenization pretokenize python_docs python_docs-1024 --output prepared": (
        "python -m manual_backprop.tools.tokenization train registry python_docs 1024"
    ),
    "python -m manual_backprop.convert from-hf exported imported": (
        "python -m manual_backprop.convert to-hf last exported"
    ),
    'python -m manual_backprop.generate imported --prompt "Return the"': (
        "python -m manual_backprop.convert from-hf exported imported"
    ),
    "python -m manual_backprop.run init_from=imported dataset=text dataset.path=FILE optimizer.learning_rate=3e-5 "
    "training.max_steps=100": "python -m manual_backprop.convert from-hf exported imported",
}
PREPARED: dict[str, Callable[[Path], None]] = {
    "python -m manual_backprop.run sweep.resume=last": leave_a_job_waiting,
    "python -m manual_backprop.predict last --file history.csv": write_history,
}


def checks_of(command: str) -> Iterator[Callable[[Outcome], None]]:
    for pattern, check in CHECKS.items():
        if re.match(pattern, command):
            yield check


def words_of(command: str) -> list[str]:
    """As a list, whichever of its two names the command has."""
    words = shlex.split(command)
    return ["-m", "manual_backprop.run", *words[1:]] if words[0] == "manual-backprop" else words[1:]
