"""Runs side by side: real run directories, written as runs write them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.common.pictures import LONGEST_LINE, new_figure, save_figure
from manual_backprop.compare import main
from manual_backprop.config.composition import is_choice
from manual_backprop.tracking import FAILED, FINISHED, TrainingLogger, create_run_directory, load_training_log
from manual_backprop.training.command_line import check
from manual_backprop.training.comparison.picture import draw_comparison, swept_number
from manual_backprop.training.comparison.runs import compare, difference_lines, should_coincide

PNG = b"\x89PNG\r\n\x1a\n"


@cache
def composed(*choices: str) -> DictConfig:
    return OmegaConf.create(check([*choices, "tracking=none"]).jobs[0].config.to_dict())


def write_run(root: Path, *overrides: str, losses: Sequence[float] = (5.0, 4.0), status: str = FINISHED) -> Path:
    """Writes a run with one step per loss; its validation loss is the last loss plus 0.5."""
    directory = create_run_directory(root / "outputs", "a run")
    choices = [one for one in overrides if is_choice(one.partition("=")[0])]
    values = [one for one in overrides if one not in choices]
    config = OmegaConf.merge(composed(*choices), OmegaConf.from_dotlist(values))
    OmegaConf.save(config, directory.path / "config.yaml")
    logger = TrainingLogger(directory.path)
    for step, loss in enumerate(losses, start=1):
        logger.log_step(step, {"train/loss": loss})
    logger.log_validation(len(losses), {"loss": losses[-1] + 0.5})
    logger.finish(status)
    directory.release()
    return directory.path


def test_what_else_a_task_measures_has_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The metric that chooses the best checkpoint stands beside the loss, which ranks runs that do not share it."""
    paths = [write_run(tmp_path, f"seed={seed}", losses=[5.0 - seed]) for seed in (1, 2)]
    logger = TrainingLogger(paths[0])
    logger.log_validation(1, {"exact_match": 0.875})
    logger.finish()
    for path, metric in zip(paths, ("validation/exact_match", "validation/loss"), strict=True):
        content = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps(content | {"best_metric": metric}))
    assert main([str(path) for path in paths]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()[:3]
    assert heading.split()[:6] == ["seed", "validation", "loss", "validation", "exact", "match"]
    assert (first.split()[:3], second.split()[:3]) == (["2", "3.5000", "-"], ["1", "4.5000", "0.875"])


@pytest.mark.parametrize(("highest", "order"), [(True, ["2", "3", "1"]), (False, ["1", "3", "2"])])
def test_runs_are_ranked_by_the_metric_of_their_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], highest: bool, order: list[str]
) -> None:
    paths = [write_run(tmp_path, f"training.max_steps={steps}", losses=[5.0 + steps]) for steps in (1, 2, 3)]
    for path, value in zip(paths, (0.5, 0.75, 0.625), strict=True):
        logger = TrainingLogger(path)
        logger.log_validation(1, {"exact_match": value})
        logger.finish()
        content = json.loads((path / "run.json").read_text())
        content |= {"best_metric": "validation/exact_match", "best_is_highest": highest}
        (path / "run.json").write_text(json.dumps(content))
    assert main([*map(str, paths), "--picture", str(tmp_path / "picture.png")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]] == order
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_what_sets_runs_apart_and_nothing_that_follows_from_it(tmp_path: Path) -> None:
    """Sizes follow from the model, and the activation from the architecture, so they are not listed."""
    paths = [
        write_run(tmp_path, "model=tiny", "architecture=gpt2"),
        write_run(tmp_path, "model=small", "architecture=gpt2", "run_name=another", "tags.note=x"),
        write_run(tmp_path, "model=small", "architecture=vaswani"),
    ]
    runs = compare([load_training_log(path) for path in paths])
    assert [run.label for run in runs] == [
        "model=tiny architecture=gpt2",
        "model=small architecture=gpt2",
        "model=small architecture=vaswani",
    ]


def test_a_size_of_ones_own_is_named_by_what_differs(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, "model=tiny", f"model.n_blocks={n}") for n in (1, 3)]
    assert [run.label for run in compare([load_training_log(path) for path in paths])] == [
        "model.n_blocks=1",
        "model.n_blocks=3",
    ]


def test_the_largest_difference_is_found_where_it_is(tmp_path: Path) -> None:
    """Steps that only one run has made are not compared."""
    one = write_run(tmp_path, "implementation=custom", losses=(6.0, 5.0, 4.0))
    two = write_run(tmp_path, "implementation=torch", losses=(6.0, 5.25, 4.125, 1.0))
    logs = [load_training_log(path) for path in (one, two)]
    assert difference_lines(logs) == [
        "largest difference of train/loss: 0.25 nats per token, after step 2 (3 steps compared)"
    ]


def test_a_value_that_is_not_finite_is_no_small_difference(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, losses=(6.0, last)) for last in (5.0, math.nan)]
    training, validation = difference_lines([load_training_log(path) for path in paths])
    assert training.startswith("largest difference of train/loss: inf nats per token, after step 2 ")
    assert validation.startswith("largest difference of validation/loss: inf nats per token, after step 2 ")


@pytest.mark.parametrize(
    ("other", "expected"),
    [("implementation=torch", True), ("device.threads=2", True), ("seed=1", False), ("precision=bf16", False)],
)
def test_which_runs_should_coincide(tmp_path: Path, other: str, expected: bool) -> None:
    paths = [write_run(tmp_path), write_run(tmp_path, other)]
    assert should_coincide(compare([load_training_log(path) for path in paths])) is expected


def test_the_axis_is_the_number_with_the_most_values(tmp_path: Path) -> None:
    rates = [write_run(tmp_path, f"optimizer.learning_rate={rate}", f"seed={rate}") for rate in (1, 2, 3)]
    more = [write_run(tmp_path, f"optimizer.learning_rate={rate}", f"seed={rate + 1}") for rate in (1, 2, 3)]
    assert swept_number(compare([load_training_log(path) for path in rates + more])) == "optimizer.learning_rate"
    seeds = [write_run(tmp_path, f"seed={seed}") for seed in range(4)]
    assert swept_number(compare([load_training_log(path) for path in seeds])) is None


@pytest.mark.parametrize(
    "swept",
    [
        [("implementation=custom",), ("implementation=torch",)],
        [("seed=1",), ("seed=2",)],
        [
            (f"optimizer.learning_rate={rate}", f"model={m}")
            for rate in ("1e-3", "1e-2", "1e-1")
            for m in ("tiny", "small")
        ],
        [(f"optimizer.learning_rate={n / 99}", f"model.dropout={n / 100}", f"seed={n}") for n in range(1, 13)],
        [()],
    ],
    ids=["coincide", "curves", "over a number", "a search", "one run"],
)
def test_each_kind_of_picture_is_drawn(tmp_path: Path, swept: Sequence[tuple[str, ...]]) -> None:
    paths = [write_run(tmp_path, *overrides, losses=(5, 4 + n / 8)) for n, overrides in enumerate(swept)]
    paths.append(write_run(tmp_path, *swept[-1], losses=(6, math.inf), status=FAILED))
    draw_comparison(compare([load_training_log(path) for path in paths]), tmp_path / "picture.png", "title")
    written = (tmp_path / "picture.png").read_bytes()
    assert written.startswith(PNG)
    assert 8_000 < len(written) < 100_000


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The best run comes first, a failed one last. A run is named by its directory or its id."""
    monkeypatch.chdir(tmp_path)
    failed = write_run(tmp_path, "optimizer.learning_rate=1", losses=(5.0, 1.0), status=FAILED)
    worse = write_run(tmp_path, "optimizer.learning_rate=0.1", losses=(5.0, 4.5))
    better = write_run(tmp_path, "optimizer.learning_rate=0.01", losses=(5.0, 4.0))
    assert main([str(failed), worse.name, better.name[-6:], "--picture", "picture.png"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["optimizer.learning_rate", "validation", "loss", "steps", "status", "run"]
    assert [line.split()[:4] for line in printed[1:4]] == [
        ["0.01", "4.5000", "2", "FINISHED"],
        ["0.1", "5.0000", "2", "FINISHED"],
        ["1", "-", "2", "FAILED"],
    ]
    assert printed[1].split()[-1] == f"outputs/runs/{better.name}"
    assert "largest difference of train/loss: 3.5 nats per token, after step 2" in "\n".join(printed)
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing-of-this-name"], "there is no run 'nothing-of-this-name'"),
        (["{run}", "--picture", "picture.pdf"], "must end in .png"),
        (["{run}", "{root}"], "expected the directory of a run"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path)
    given = [argument.format(run=run, root=tmp_path) for argument in arguments]
    assert exit_code_of(lambda: main(given)) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs"]


def test_text_in_a_picture_is_text(tmp_path: Path) -> None:
    """It is not read as a formula, has no control characters and is cut if too long; the numbers of a logarithmic axis
    remain formulas."""
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot([1, 2], [1, 1000], label="$x_{$")
    axes.set_yscale("log")
    axes.set_xticks([1, 2], ["a$b$", r"\frac{$"])
    axes.legend()
    axes.set_title("cost in $ and \x1b \u2028 " + "x" * 300)
    save_figure(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)
    title = axes.get_title()
    assert title.startswith("cost in $ and \\x1b \\u2028 x")
    assert len(title) == LONGEST_LINE
    assert [label.get_parse_math() for label in axes.get_xticklabels()] == [False, False]
    assert all(label.get_parse_math() for label in axes.get_yticklabels())
    assert axes.get_xticklabels()[0].get_text() == "a$b$"
