"""docs/guide/hyperparameters.md tells the truth: its keys exist, its numbers are the ledger's, and each trouble comes
with the first command of its section and goes with the last one.

The page is what is read. Each run is as short as it stands there, in this process.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from command_tools import ROOT

from manual_backprop.common.errors import NotFiniteError
from manual_backprop.config.validation import groups, keys
from manual_backprop.tracking import TrainingLog, load_training_log
from manual_backprop.tracking.run_directory import list_runs

PAGE = (ROOT / "docs" / "guide" / "hyperparameters.md").read_text(encoding="utf-8")
LEDGER = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")


# The table


def rows() -> list[list[str]]:
    """The cells of each row: key, what it does, usual values, measured here, rule of thumb."""
    lines = re.findall(r"^\| `.*\|$", PAGE, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def entry(name: str) -> str:
    """All that the ledger has about an experiment."""
    parts = re.split(r"^### [\d-]+: ", LEDGER, flags=re.MULTILINE)[1:]
    return "\n".join(part for part in parts if name in re.split(r"[,\n]", part, maxsplit=2)[:2])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip("`"))
def test_a_row_has_a_key_and_the_ledgers_numbers(row: list[str]) -> None:
    assert len(row) == 5
    key, _, _, measured, _ = row
    assert key.strip("`") in keys() or key.strip("`") in groups()
    if measured.startswith("not measured"):
        return
    text = entry(re.findall(r"`(\w+)`$", measured)[0])
    numbers = re.findall(r"(?<![\w.])\d[\d.,]*(?:e-?\d+)?(?<![.,])(?!\w)", measured.rpartition(":")[0])
    assert numbers
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text)] == []


def test_most_keys_of_learning_stand_in_the_table() -> None:
    there = {row[0].strip("`") for row in rows()}
    assert {f"optimizer.{name}" for name in ("learning_rate", "weight_decay", "betas", "epsilon", "momentum")} <= there
    assert {key for key in keys() if re.match(r"model\.(d_|n_b|n_h|drop|max_)", key)} <= there
    assert len(there) == len(rows()) > 25


# The troubles


@dataclass(frozen=True)
class Done:
    """Of a command that has ended."""

    said: str
    code: int | None  # of a diagnosis
    error: NotFiniteError | None
    log: TrainingLog | None  # of a run

    def losses(self, split: str = "train") -> list[float]:
        assert self.log is not None
        series = self.log.training["train/loss"] if split == "train" else self.log.validation[f"{split}/loss"]
        return list(series.values)

    @property
    def unigram(self) -> float:
        assert self.log is not None
        return self.log.validation["validation/unigram_loss"].values[-1]

    @property
    def gradient_norms(self) -> list[float]:
        assert self.log is not None
        return list(self.log.training["gradient_norm"].values)


def sections() -> dict[str, list[str]]:
    """The commands of each trouble."""
    parts = re.split(r"^### ", PAGE.partition("\n## Four troubles")[2].partition("\n## ")[0], flags=re.MULTILINE)[1:]
    blocks = {part.partition("\n")[0]: re.findall(r"```bash\n(.*?)```", part, flags=re.DOTALL) for part in parts}
    return {title: "".join(found).splitlines() for title, found in blocks.items()}


def it_does_not_fall(high: Done, asked: Done, mended: Done) -> None:
    """It ends where a model is that knows how often each token occurs and nothing else."""
    assert abs(high.losses("validation")[-1] - high.unigram) < 0.2
    assert (asked.code, "TOO HIGH" in asked.said) == (1, True)
    assert mended.losses("validation")[-1] < high.unigram - 0.3


def it_explodes(exploding: Done, mended: Done) -> None:
    assert exploding.error is not None
    assert "Try a smaller optimizer.learning_rate" in str(exploding.error)
    assert max(exploding.gradient_norms) > 10 * max(mended.gradient_norms)
    assert mended.losses()[-1] < mended.losses()[0] - 0.5


def it_is_slow(slow: Done, asked: Done, mended: Done) -> None:
    """It falls all the time, and has hardly come anywhere."""
    losses = slow.losses()
    assert losses[0] > losses[len(losses) // 2] > losses[-1]
    assert slow.losses("validation")[-1] > slow.unigram + 0.2
    assert (asked.code, "TOO LOW" in asked.said) == (0, True)
    assert mended.losses("validation")[-1] < slow.unigram - 0.3


def it_overfits(overfitting: Done, mended: Done) -> None:
    """The training loss falls to the end; the validation loss rises again from a step in the middle on."""
    falling, rising = overfitting.losses(), overfitting.losses("validation")
    assert falling[-1] < falling[0] - 3
    assert rising[-1] > min(rising) + 0.05
    assert 0 < rising.index(min(rising)) < len(rising) - 1
    assert mended.losses("validation")[-1] < rising[-1] - 0.05


CHECKS: dict[str, Callable[..., None]] = {
    "A loss that does not fall": it_does_not_fall,
    "A gradient that explodes": it_explodes,
    "Learning that is slow": it_is_slow,
    "Overfitting": it_overfits,
}
IN_CI = ("A gradient that explodes",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All commands are given here: what one has prepared, the next one finds."""
    from run_tools import same_process

    folder = tmp_path_factory.mktemp("troubles")
    with same_process(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["run"])
        yield folder


def given(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> Done:
    python, flag, module, *words = shlex.split(command)
    assert (python, flag) == ("python", "-m")
    before, code, error = list_runs(place / "outputs"), None, None
    try:
        code = import_module(module).main([*words, "device.threads=1"])
    except NotFiniteError as found:
        error = found
    new = [path for path in list_runs(place / "outputs") if path not in before]
    return Done(capsys.readouterr().out, code, error, load_training_log(new[0]) if new else None)


def test_each_trouble_has_a_check() -> None:
    assert sections().keys() == CHECKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[] if title in IN_CI else [pytest.mark.nightly]) for title in CHECKS]
)
def test_a_trouble_is_seen_and_mended(title: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CHECKS[title](*(given(command, place, capsys) for command in sections()[title]))
