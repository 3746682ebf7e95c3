"""The measurement of what loading costs: its verdicts, and a real one that is far too short to say anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_tools import command
from run_tools import config_of

from manual_backprop.common.errors import InputError
from manual_backprop.common.interruption import Interruption
from manual_backprop.study.paired_timing import Row
from manual_backprop.tools.cost import main
from manual_backprop.training.cost.loading import CachedOrder, verdict
from manual_backprop.training.runner import Runner


def test_verdicts() -> None:
    rows = [Row("made", [1.01] * 4), Row("given", [1.0] * 4), Row("given again", [1.0, 1.002, 0.998, 1.0])]
    words = (
        "packed: a step takes 1000.0 ms, loading its batch {}; in pairs +1.00% (+1.00% to +1.00%), noise floor 0.05%"
    )
    assert verdict("packed", rows, 0.02) == (True, words.format("20.00 ms, or 2.00%"))
    assert verdict("packed", rows, 0.03) == (False, words.format("30.00 ms, or 3.00%"))


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_given_step_is_the_same_step(batching: str, text: Path, tmp_path: Path) -> None:
    options = (f"batching={batching}", "training.max_steps=5", "training.gradient_accumulation_steps=2")
    runner = Runner(config_of(text, *options), tmp_path, Interruption())
    given = CachedOrder(runner.order, runner.model.network.device)
    given.prepare(3)
    (tokens, made), (count, batches) = (
        given.batches(3, runner.model.network.device),
        runner.order.batches(3, runner.model.network.device),
    )
    batches = list(batches)
    assert tokens == count
    assert len(made) == len(batches) > 0
    for mine, its in zip(made, batches, strict=True):
        assert torch.equal(mine.tokens, its.tokens)
        assert torch.equal(mine.targets, its.targets)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "tny"], "did you mean tiny"),
        (["--pairs", "2"], "--pairs: must be a whole number of at least 3, was '2'"),
        (["--rounds", "3"], "--rounds: there is no such option"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        main(["loading", *arguments])


@pytest.mark.slow
def test_a_measurement(tmp_path: Path) -> None:
    """By the command, with three pairs: too few for a meaningful result."""
    given = ("loading", "--model", "tiny", "--pairs", "3")
    done = command(*given, cwd=tmp_path, module="manual_backprop.tools.cost")
    assert done.returncode == (0 if "\nok:" in done.stdout else 1), done.stderr
    first, second, last = done.stdout.splitlines()
    assert first.startswith("packed: a step takes ")
    assert second.startswith("padded: a step takes ")
    assert last in ("ok: the bar is 2% of a step", "FAILED: the bar is 2% of a step")
    assert not list(tmp_path.iterdir())
