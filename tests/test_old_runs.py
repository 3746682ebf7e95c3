"""A project that an older version has written still works: every command that reads runs, with the files in
`old_runs/`.

The project was written in another folder, as if a user has moved it: run directories are found at their current place,
and nothing in them is rewritten. MLflow's database has absolute paths of artifacts, which MLflow does not move; the
test does it as a user has to (`move_artifacts`).
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from run_tools import metric, newest, resume, same_process, small, train

from manual_backprop import compare, convert, evaluate, generate, load_pretokenized, sync
from manual_backprop import run as run_command
from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint, read_state
from manual_backprop.common.errors import ConfigError
from manual_backprop.config import validation
from manual_backprop.config.rules import Number
from manual_backprop.config.schema import RunConfig, option_name, setting, shipped_folder
from manual_backprop.config.validation import groups, keys, validate, with_defaults
from manual_backprop.models.wrappers.language_model import CustomTransformerWrapper
from manual_backprop.rerun import rerun
from manual_backprop.tracking import flatten, load_training_log
from manual_backprop.tracking.environment import code_version
from manual_backprop.tracking.mlflow_model import write_model
from manual_backprop.tracking.run_directory import SWEEPS, list_runs, read_run
from manual_backprop.trained_models.saved_model import load
from manual_backprop.training.command_line import check
from manual_backprop.training.resume import config_of_run
from manual_backprop.training.sweeps import job as sweep_job
from manual_backprop.training.sweeps import sweep as sweep_module
from manual_backprop.training.sweeps.records import JobRecord, Records, measured, run_of_job

OLD = Path(__file__).parent / "old_runs"
THEN: dict[str, Any] = json.loads((OLD / "557d51a.json").read_text(encoding="utf-8"))
COMMIT = THEN["commit"][:12]
PROMPT = ("--prompt", "the cat", "--max-length", "12", "--temperature", "0")
# Bits are the same only for one version on one machine; losses are the same for every version and machine.
FP32, BF16 = 1e-4, 2e-2
MASKS = 5e-2  # tolerance with dropout, whose masks have changed since (CHANGELOG.md)

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD / "557d51a.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def project(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the project, without MLflow."""
    left_out = shutil.ignore_patterns("mlflow.db", "artifacts")
    shutil.copytree(unpacked, tmp_path, ignore=left_out, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def in_mlflow(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The whole project with its store; tests share it one after another."""
    folder = tmp_path_factory.mktemp("in_mlflow")
    shutil.copytree(unpacked, folder, dirs_exist_ok=True)
    move_artifacts(folder / "mlflow.db", THEN["place"], str(folder))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield folder


def move_artifacts(store: Path, before: str, after: str) -> None:
    """Updates the paths of artifacts, as a user does after moving a project: MLflow reads them from its database."""
    with sqlite3.connect(store) as database:
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("logged_models", "artifact_location"),
        ):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (before, after))
    database.close()


def emptied(store: Path) -> Path:
    """Empties a copied store and returns it: creating one with MLflow takes seconds."""
    with sqlite3.connect(store) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table in tables - {"alembic_version", "workspaces"}:
            database.execute(f"DELETE FROM {table}")
    database.close()
    return store


def run_of(project: Path, name: str) -> Path:
    (run,) = project.glob(f"outputs/runs/*-{name}-??????")
    return run


def newest_checkpoint(run: Path) -> Path:
    return CheckpointManager(run / "checkpoints").list()[-1]


def printed(capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], int | None], *arguments: str) -> str:
    assert not main(arguments)
    return capsys.readouterr().out


def logged(run: Path, name: str) -> dict[int, float]:
    """A metric by step; of a step that was made twice the last value."""
    series = (log := load_training_log(run)).training.get(name) or log.validation[name]
    return dict(zip(series.steps, series.values, strict=True))


# What the fixture is


def test_the_old_project_is_small_and_names_nobody(unpacked: Path) -> None:
    assert sum(file.stat().st_size for file in OLD.iterdir()) < 2_000_000
    assert {read_run(run_of(unpacked, name))["status"] for name in ("finished", "bf16")} == {"FINISHED"}
    assert read_run(run_of(unpacked, "killed"))["status"] == "KILLED"
    assert run_of(unpacked, "finished").name.encode() in (unpacked / "mlflow.db").read_bytes()


# Models


@pytest.mark.parametrize("name", ["finished", "exported"])
def test_the_text_is_the_same(project: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    which = run_of(project, name).name if name == "finished" else name
    first, text = printed(capsys, generate.main, which, *PROMPT).split("\n", 1)
    assert text == THEN[name]["text"]
    if name == "finished":
        assert first == THEN[name]["line"]


def test_an_export_is_imported(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not convert.main(["from-hf", "exported", "imported"])
    capsys.readouterr()
    assert printed(capsys, generate.main, "imported", *PROMPT).split("\n", 1)[1] == THEN["exported"]["text"]


def test_a_network_that_has_more_settings_now(project: Path) -> None:
    """Old state lacks them: they have their defaults."""
    checkpoint = load_checkpoint(newest_checkpoint(run_of(project, "finished")))
    old = {"vocab_size", "d_model", "n_blocks", "n_heads", "d_ffn", "max_seq_len"}
    network = {name: value for name, value in checkpoint.state["network"].items() if name in old}
    folder = CheckpointManager(project / "older", keep=None)
    path = folder.save(checkpoint.step, checkpoint.tensors, checkpoint.state | {"network": network})
    config = CustomTransformerWrapper.from_checkpoint(path).config
    assert (config.precision, config.dropout, config.label_smoothing) == ("fp32", 0.0, 0.0)


# Going on


def test_a_killed_run_goes_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, then = run_of(project, "killed"), THEN["killed"]
    last = then["steps"] + len(then["losses"])
    loss = resume(project, f"resume={run.name}", f"training.max_steps={last}", "tracking=none")
    assert loss == pytest.approx(then["validation"], rel=MASKS)
    assert metric(run, "train/loss")[then["steps"] :] == pytest.approx(then["losses"], rel=MASKS)
    record = read_run(run)
    assert record["status"] == "FINISHED"
    said = f"code: unknown version, commit {COMMIT} then, {code_version()['version']}, commit "
    (line,) = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert line.startswith("Another version resumes this run; bitwise the same results need the same version: ")
    (entry,) = record["resumes"]
    assert entry["previous_status"] == "KILLED"
    assert any(sentence.startswith(said) for sentence in entry["changed"]["made_with"])

    state = load_checkpoint(run / "checkpoints" / f"step-{last:06d}").state
    assert {name: state["made_with"][name] for name in code_version()} == code_version()
    resume(project, f"resume={run.name}", f"training.max_steps={last + 1}", "tracking=none")
    assert "version" not in capsys.readouterr().err, "it is this one's now"


@pytest.mark.parametrize(("name", "tolerance"), [("finished", FP32), ("bf16", MASKS)])
def test_a_run_is_rerun(project: Path, capsys: pytest.CaptureFixture[str], name: str, tolerance: float) -> None:
    then = run_of(project, name)
    rerun(then.name, ["tracking=none"], project)
    again = newest(project)
    said = capsys.readouterr().out
    now = code_version()
    assert f"  changed since: code: unknown version, commit {COMMIT} then, {now['version']}, commit " in said
    drifts = [line for line in said.splitlines() if line.startswith("  changed since: ")]
    named = {line.removeprefix("  changed since: ").partition(":")[0] for line in drifts}
    assert not named & keys().keys(), "what did not exist then has its default"
    assert metric(again, "train/loss") == pytest.approx(metric(then, "train/loss"), rel=tolerance)
    assert metric(again, "validation/loss") == pytest.approx(metric(then, "validation/loss"), rel=tolerance)
    record = read_run(again)
    assert {name: record["made_with"][name] for name in now} == now
    assert record["code"] == now["code"]


def test_prepared_tokens_are_trained_on(project: Path) -> None:
    tokens = load_pretokenized(project / "prepared", "train")
    assert tokens.tokenizer.decode(tokens[: int(tokens.offsets[1]) - 1].tolist()) == "the cat saw 0 mice of 0."
    data = ("dataset=pretokenized", f"dataset.path='{project / 'prepared'}'", "tokenizer=pretokenized")
    same = ("kernels.compile=never", "training.max_steps=6", "training.eval_every=3")
    config = check(small(*data, *same)).jobs[0].config
    with same_process():
        from manual_backprop.training.runner import run_job

        assert run_job(config, project) == pytest.approx(THEN["prepared"]["validation"], rel=FP32)
    assert metric(newest(project), "train/loss") == pytest.approx(THEN["prepared"]["losses"], rel=FP32)


# Side by side


def test_old_runs_are_compared_with_each_other_and_with_new_ones(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [run_of(project, name).name for name in ("finished", "bf16", "killed")]
    lines = printed(capsys, compare.main, *names).splitlines()
    for name, status in zip(names, ("FINISHED", "FINISHED", "KILLED"), strict=True):
        (line,) = [line for line in lines if line.endswith(name)]
        assert status in line
        if status == "FINISHED":
            assert f"{metric(project / 'outputs/runs' / name, 'validation/loss')[-1]:.4f}" in line
    (sweep,) = list_runs(project / "outputs", SWEEPS)
    found = printed(capsys, compare.main, str(sweep)).splitlines()
    assert [line.split()[0] for line in found[:3]] == ["optimizer.learning_rate", "0.001", "0.002"]


def test_a_group_that_did_not_exist_then_sets_nothing_apart(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(project, "finished")
    older = Path(shutil.copytree(run, run.with_name("older")))
    without(older / "config.yaml", "batching", "sweep", "training.recompute")
    header = printed(capsys, compare.main, str(run), str(older)).splitlines()[0]
    assert header.split() == ["validation", "loss", "steps", "status", "run"]


# In MLflow


def mlflow_run(project: Path, name: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient().get_run(read_run(run_of(project, name))["mlflow"]["run_id"])


def test_the_served_model_is_loaded(in_mlflow: Path) -> None:
    import mlflow

    run = mlflow_run(in_mlflow, "finished")
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    params = {"max_length": 12, "temperature": 0.0}
    assert model.predict(["the cat"], params=params) == THEN["served"]["texts"]


def test_the_loader_that_a_model_names_stays(unpacked: Path, tmp_path: Path) -> None:
    """Even if the code moves: MLflow imports the recorded name, and new models record the same name."""
    found = [json.loads(file.read_text()) for file in unpacked.glob("outputs/artifacts/models/*/artifacts/MLmodel")]
    loaders = {one["flavors"]["python_function"]["loader_module"] for one in found}
    assert loaders == {"manual_backprop.served_model"}
    checkpoint = newest_checkpoint(run_of(unpacked, "finished"))
    loader = import_module(*loaders)
    (text,) = loader._load_pyfunc(str(checkpoint)).predict("the cat", {"max_length": 12, "temperature": 0.0})
    assert [text] == THEN["served"]["texts"]
    write_model(tmp_path / "model", checkpoint, "r", "m")
    written = json.loads((tmp_path / "model" / "MLmodel").read_text())
    assert {written["flavors"]["python_function"]["loader_module"]} == loaders


@pytest.mark.parametrize(("name", "tolerance"), [("finished", FP32), ("bf16", BF16)])
def test_an_evaluation_is_added(
    in_mlflow: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, tolerance: float
) -> None:
    monkeypatch.chdir(in_mlflow)
    run = run_of(in_mlflow, name)
    said = printed(capsys, evaluate.main, run.name)
    assert said.splitlines()[0] == THEN[name]["line"]
    (loss,) = logged(run, "evaluation/validation_loss").values()
    assert loss == pytest.approx(THEN[name]["evaluation"], rel=tolerance)
    assert "in metrics.jsonl and MLflow" in said
    assert mlflow_run(in_mlflow, name).data.metrics["evaluation/validation_loss"] == loss


def test_everything_is_delivered_again_and_nothing_twice(
    in_mlflow: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(in_mlflow)
    client = MlflowClient()
    names = ("finished", "killed")

    def in_store() -> tuple[int, int, list[int]]:
        (experiment,) = client.search_experiments(filter_string="name = 'manual_backprop'")
        runs = client.search_runs([experiment.experiment_id])
        models = client.search_logged_models([experiment.experiment_id])
        ids = [mlflow_run(in_mlflow, name).info.run_id for name in names]
        return len(runs), len(models), [len(client.get_metric_history(one, "train/loss")) for one in ids]

    before = in_store()
    printed(capsys, sync.main, *(run_of(in_mlflow, name).name for name in names))
    assert in_store() == before
    for name, status in zip(names, ("FINISHED", "KILLED"), strict=True):
        run = mlflow_run(in_mlflow, name)
        assert run.info.status == status
        assert run.data.tags["run_directory"] == str(run_of(in_mlflow, name)), "where it lies now"


def test_an_old_run_comes_into_a_new_store(
    unpacked: Path, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    store = emptied(Path(shutil.copy(unpacked / "mlflow.db", project)))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = run_of(project, "finished")
    printed(capsys, sync.main, run.name)
    client = MlflowClient(f"sqlite:///{store}")
    delivered = client.get_run(read_run(run)["mlflow"]["run_id"])
    points = client.get_metric_history(delivered.info.run_id, "train/loss")
    assert {point.step: point.value for point in points} == logged(run, "train/loss")
    assert delivered.info.status == "FINISHED"
    assert delivered.data.params["model.d_model"] == "16"
    assert len(delivered.outputs.model_outputs) == 1


@pytest.mark.slow
def test_a_sweep_goes_on(in_mlflow: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: test_sweeps.py tests jobs in their own processes, which costs seconds."""

    def run_job_here(order: Any, record: JobRecord, records: Records, preload: Sequence[str]) -> JobRecord:
        answer = sweep_job._outcome(order)
        run = run_of_job(order.root / "outputs", order.sweep, order.number)
        records.write(ended := measured(replace(record, **answer), run))
        return ended

    monkeypatch.chdir(in_mlflow)
    monkeypatch.setattr(sweep_module, "run_job_in_process", run_job_here)
    (sweep,) = list_runs(in_mlflow / "outputs", SWEEPS)
    before = Records(sweep).read_all()
    assert [record.status for record in before] == ["FINISHED", "KILLED", "WAITING"]
    assert not run_command.main(["sweep.resume=last"])
    captured = capsys.readouterr()
    assert f"1 finished jobs were run by another version: code: unknown version, commit {COMMIT} then" in captured.err
    after = Records(sweep).read_all()
    assert [record.status for record in after] == ["FINISHED"] * 3
    assert [record.validation_loss for record in after] == pytest.approx(THEN["sweep"]["losses"], rel=FP32)
    assert after[0] == before[0], "it is not run again"
    assert after[1].run_directory == before[1].run_directory, "it goes on"
    assert read_run(Path(str(after[1].run_directory)))["resumes"][0]["previous_status"] == "KILLED"
    best = min(after, key=lambda record: record.validation_loss or 0)
    assert read_run(sweep)["best"]["directory"] == best.run_directory
    from mlflow import MlflowClient

    client = MlflowClient()
    parent = client.get_run(read_run(sweep)["mlflow"]["run_id"])
    assert parent.info.status == "FINISHED"
    found = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert sorted(one.info.status for one in found) == ["FINISHED"] * 3
    assert [one.data.tags.get("best") == "true" for one in found].count(True) == 1


# A config that is older than a group or a key


def without(file: Path, *names: str) -> dict[str, Any]:
    """Removes these groups and keys from the config. Returns the rest."""
    config = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(config, dict)
    left = stripped({str(key): value for key, value in config.items()}, names)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(left)))
    return left


def stripped(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    left = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for name in names:
        group, _, key = name.partition(".")
        if key:
            del left[group][key]
        else:
            del left[group]
    return left


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    """The config of an empty command line."""
    return check([]).jobs[0].config.to_dict()


@pytest.mark.parametrize("group", sorted(set(groups()) - {"model", "dataset"}))
def test_a_group_that_did_not_exist_then(defaults: dict[str, Any], group: str) -> None:
    assert with_defaults(stripped(defaults, [group])) == defaults
    assert validate(with_defaults(stripped(defaults, [group]))).to_dict() == defaults


def test_a_key_that_did_not_exist_then(defaults: dict[str, Any]) -> None:
    there = [name for name in keys() if name in flatten(defaults) and not name.endswith(".name")]
    for name in there:
        if not name.startswith("model.") or name == "model.n_kv_heads":  # the others are not guessed
            assert validate(with_defaults(stripped(defaults, [name]))).to_dict() == defaults, name
    assert {"seed", "kernels.compile", "optimizer.learning_rate", "training.recompute"} <= set(there)


@pytest.mark.parametrize("name", ["model.d_model", "model", "dataset"])
def test_what_every_run_had_is_not_guessed(defaults: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: is missing"):
        validate(with_defaults(stripped(defaults, [name])))
    assert with_defaults({}) == {}


def test_a_run_without_them_goes_on(project: Path) -> None:
    """A run whose config and checkpoint lack these keys is still the same run."""
    names = ("batching", "sweep", "dataset.on_bad_row", "training.recompute", "model.n_kv_heads")
    run = run_of(project, "killed")
    without(run / "config.yaml", *names)
    step = THEN["killed"]["steps"]
    path = run / "checkpoints" / f"step-{step:06d}"
    saved = load_checkpoint(path)
    shutil.rmtree(path)
    state = saved.state | {"config": stripped(saved.state["config"], names)}
    CheckpointManager(path.parent).save(step, saved.tensors, state, files=[run / "tokenizer.json"])
    resume(project, f"resume={run.name}", f"training.max_steps={step + 1}", "tracking=none")
    assert metric(run, "train/loss")[step] == pytest.approx(THEN["killed"]["losses"][0], rel=MASKS)
    assert config_of_run(run).batching.name == "packed"
    assert read_run(run)["resumes"][0]["changed"].keys() == {"training.max_steps", "made_with"}


@dataclass(frozen=True)
class RuleConfig:
    name: str = option_name("backprop", "another")
    strength: float = setting(Number(above=0), "of the rule")


@dataclass(frozen=True, kw_only=True)
class LaterConfig(RunConfig):
    """A config with an additional group, for this test."""

    learning: RuleConfig


def test_a_group_of_a_later_version(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = Path(shutil.copytree(shipped_folder("conf"), tmp_path / "conf"))
    config = (conf / "config.yaml").read_text()
    (conf / "config.yaml").write_text(
        config.replace("  - sweep: default\n", "  - sweep: default\n  - learning: backprop\n")
    )
    (conf / "learning").mkdir()
    (conf / "learning" / "backprop.yaml").write_text("name: backprop\nstrength: ${optimizer.weight_decay}\n")
    caches = (validation.groups, validation.keys, validation._shipped, validation._default_options)
    try:
        monkeypatch.setattr(validation, "RunConfig", LaterConfig)
        monkeypatch.setattr(validation, "shipped_folder", lambda name: tmp_path / name)
        for cache in caches:
            cache.cache_clear()
        later: Any = config_of_run(run_of(unpacked, "finished"))
        assert later.learning == RuleConfig("backprop", later.optimizer.weight_decay)
        assert {key.name for key in fields(later)} == {key.name for key in fields(RunConfig)} | {"learning"}
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()


# Names on disk


def test_the_names_on_disk_are_those_of_then(project: Path, text: Path) -> None:
    """The files of a new run have all names of an old run's files, and maybe more."""
    old = run_of(project, "finished")
    new = train(project, text, "training.max_steps=1", "kernels.compile=never")
    for then, now in (
        (read_run(old), read_run(new)),
        (read_run(old)["made_with"], read_run(new)["made_with"]),
        *zip(*(state_parts(run) for run in (old, new)), strict=True),
    ):
        assert then.keys() <= now.keys() | {"mlflow"}
    names = {path.name for path in old.iterdir() if path.suffix != ".png"} - {"samples", "source.diff"}
    assert names <= {path.name for path in new.iterdir()} | {"config_sources.json"}
    assert load(new.name).model is not None


def state_parts(run: Path) -> list[dict[str, Any]]:
    content = read_state(newest_checkpoint(run))
    return [content, content["state"], content["state"]["made_with"], content["state"]["network"]]
