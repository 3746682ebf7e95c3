"""What RUN may be, which checkpoint it means, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint
from manual_backprop.common.errors import CheckpointError, InputError
from manual_backprop.models.implementations import IMPLEMENTATIONS
from manual_backprop.models.wrappers.language_model import CustomTransformerWrapper
from manual_backprop.tracking.run_directory import SWEEPS, create_run_directory, update_run
from manual_backprop.trained_models.saved_model import find, load

pytestmark = pytest.mark.usefixtures("here")


def step(which: str | Path) -> str:
    return find(str(which)).checkpoint.name


def save_again(run: Path, new_step: int, metric: float | None = None, **changes: Any) -> Path:
    """The run's last checkpoint once more, as another step; `changes` of its state (None: without the key)."""
    last = load_checkpoint(run / "checkpoints" / "step-000008")
    state = {name: value for name, value in (last.state | changes).items() if value is not None}
    manager = CheckpointManager(run / "checkpoints", keep=None)
    return manager.save(new_step, last.tensors, state, metric, files=[run / "tokenizer.json"])


@pytest.mark.parametrize("name", ["last", "best", "id", "six", "mlflow", "path", "relative"])
def test_every_name_of_a_run(copy: Path, name: str) -> None:
    update_run(copy, lambda run: run.update(mlflow={"run_id": "0123456789abcdef0123456789abcdef"}))
    names = {
        "id": copy.name,
        "six": copy.name[-6:],
        "mlflow": "0123456789abcdef0123456789abcdef",
        "path": str(copy),
        "relative": f"outputs/runs/{copy.name}/",
    }
    found = find(names.get(name, name))
    assert found.checkpoint == copy / "checkpoints" / "step-000008"
    assert found.run == copy
    assert found.outputs == copy.parent.parent
    assert step(f"{names.get(name, name)}@4") == "step-000004"


def test_a_run_is_its_best_checkpoint(copy: Path) -> None:
    save_again(copy, 9, metric=99.0)
    assert step("last") == "step-000008"
    assert step("last@last") == "step-000009"
    assert step("last@best") == "step-000008"
    assert step(copy / "checkpoints" / "step-000009") == "step-000009"


def test_without_a_metric_it_is_the_latest(copy: Path) -> None:
    for path in (copy / "checkpoints").iterdir():
        if path.name != "step-000008":
            shutil.rmtree(path)
    save_again(copy, 9)
    shutil.rmtree(copy / "checkpoints" / "step-000008")
    assert step("last") == "step-000009"
    assert "validation loss not measured" in load("last").line
    with pytest.raises(InputError, match=r"no checkpoint of .* has a validation loss; use @last"):
        find("last@best")


def test_a_sweep_is_its_best_run(copy: Path) -> None:
    sweep = create_run_directory(copy.parent.parent, "rates", folder=SWEEPS)
    sweep.release()
    for name in (sweep.run_id, str(sweep.path)):
        with pytest.raises(InputError, match="is a sweep without a best run yet"):
            find(name)
    update_run(sweep.path, lambda run: run.update(best={"run_id": copy.name, "directory": str(copy)}))
    for name in (sweep.run_id, str(sweep.path)):
        assert find(name).run == copy
        assert step(f"{name}@4") == "step-000004"


def test_a_path_may_hold_an_at(copy: Path, tmp_path: Path) -> None:
    moved = tmp_path / "results@4"
    shutil.move(copy, moved)
    assert step(moved) == "step-000008"
    assert step(f"{moved}@4") == "step-000004"


def test_a_checkpoint_that_was_set_aside_belongs_to_its_run(copy: Path) -> None:
    aside = copy / "checkpoints" / "superseded" / "step-000004"
    aside.parent.mkdir()
    shutil.move(copy / "checkpoints" / "step-000004", aside)
    assert find(str(aside)).run == copy


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("wings", "there is no run 'wings': expected last"),
        ("", "there is no run ''"),
        ("last@7", "has no checkpoint of step 7; there are: 4, 8"),
        ("last@first", "after @, give last, best or the number of a step, as in last@100"),
        (".", "is neither a run nor a checkpoint: it holds no run.json"),
        ("outputs/runs/{run}/checkpoints/step-000004@last", "is one checkpoint already; leave out @last"),
        ("outputs/runs/{run}/checkpoints/step-000005", "there is no checkpoint .*: step-000004, step-000008"),
        ("outputs/runs/{run}/run.json", "there is no run"),
    ],
)
def test_what_is_not_there(copy: Path, which: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find(which.format(run=copy.name))


def test_nothing_was_trained_here() -> None:
    with pytest.raises(InputError, match=r"last: there is no run in .*outputs/runs; train one \(python -m"):
        find("last")


def test_a_run_without_checkpoints(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint: nothing was saved, and the run is FINISHED"):
        find(copy.name)


# Loading


def test_the_line_that_every_command_prints_first(copy: Path) -> None:
    saved = load("last")
    assert saved.line.startswith(
        f"custom (gpt2, fp32): {saved.model.count_parameters():,} parameters, step 8, validation loss "
        f"{saved.metric:.4f} (outputs/runs/"
    )
    assert saved.model.step == 8


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_network_is_the_one_that_was_trained(copy: Path, implementation: str) -> None:
    config = load_checkpoint(copy / "checkpoints" / "step-000008").state["config"]
    save_again(copy, 9, config=config | {"implementation": {"name": implementation}})
    saved, by_hand = load("last@9"), load("last@8")
    assert type(saved.model.network) is IMPLEMENTATIONS[implementation]
    ids = torch.tensor([list(b"the cat")])
    torch.testing.assert_close(saved.model.forward(ids)["logits"], by_hand.model.forward(ids)["logits"])
    assert saved.tokenizer().decode(saved.tokenizer().encode("the cat")) == "the cat"


def test_one_flipped_bit_is_refused(copy: Path) -> None:
    file = copy / "checkpoints" / "step-000008" / "parameters.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"parameters.safetensors is damaged.*newest sound checkpoint is .*04"):
        load("last")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": None}, "holds no network"),
        ({"network": {"wings": 2}}, "written by another version"),
        ({"network": {"d_model": -1}}, "describes no network that can be built"),
        ({"network": {"d_model": 4, "n_heads": 2, "vocab_size": 257}}, "is inconsistent"),
        ({"config": {"implementation": {"name": "wings"}}}, "implementation=wings, which this version does not have"),
    ],
)
def test_what_another_program_wrote(copy: Path, changes: dict[str, Any], words: str) -> None:
    path = save_again(copy, 9, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        load("last@9")
    assert str(path) in str(caught.value)


def test_a_config_of_another_version_still_generates(copy: Path) -> None:
    save_again(copy, 9, config={"implementation": {"name": "custom"}, "wings": 2})
    saved = load("last@9")
    saved.model.generate(torch.tensor([[1, 2]]), max_length=2)
    with pytest.raises(InputError, match=r"The config in .* is not one of this version: wings=2"):
        saved.config()


def test_a_checkpoint_that_a_program_saved(tmp_path: Path) -> None:
    """It has no tokenizer and no config: it loads, and what needs them says so."""
    CustomTransformerWrapper(vocab_size=9, d_model=4, n_blocks=1, n_heads=1, d_ffn=4, max_seq_len=4).save_checkpoint(
        tmp_path / "mine"
    )
    for name in ("mine", "mine/step-000000", "mine@0"):
        saved = load(name)
        assert saved.found.run is None
        with pytest.raises(InputError, match=r"has no tokenizer.json: it was saved by a program"):
            saved.tokenizer()
        with pytest.raises(InputError, match="training data and settings are not recorded"):
            saved.config()


def test_a_tokenizer_that_is_too_large(copy: Path, tmp_path: Path) -> None:
    last = load_checkpoint(copy / "checkpoints" / "step-000008")
    small = CustomTransformerWrapper(vocab_size=9, d_model=4, n_blocks=1, n_heads=1, d_ffn=4, max_seq_len=4)
    state = json.loads(json.dumps(last.state)) | {"network": vars(small.config)}
    path = CheckpointManager(tmp_path / "mixed").save(
        1, {"parameters": small.network.parameters}, state, files=[copy / "tokenizer.json"]
    )
    with pytest.raises(CheckpointError, match="its tokenizer has 257 tokens, its network 9"):
        load(str(path)).tokenizer()
