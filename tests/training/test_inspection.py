"""`training.inspect_every`: numbers and pictures of every layer, without changing a bit of the training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_tools import command
from run_tools import SMALL, config_of, metric, resume, train

from manual_backprop.common.batch import Batch
from manual_backprop.common.errors import InputError
from manual_backprop.common.interruption import Interruption
from manual_backprop.config.schema import ARCHITECTURES, CustomTransformerConfig
from manual_backprop.models.implementations import build_network
from manual_backprop.models.network import Network
from manual_backprop.ops import IGNORED
from manual_backprop.ops.numerics import no_record
from manual_backprop.study.paired_timing import Row
from manual_backprop.tools.cost import main
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.tracker import Tracked
from manual_backprop.training.cost.turns import verdict
from manual_backprop.training.inspection.inspector import UNWATCHED, Inspector, layer_of
from manual_backprop.training.inspection.pictures import PassSnapshot, draw_layers
from manual_backprop.training.runner import Runner

pytestmark = pytest.mark.usefixtures("here")
SHORT = ("training.max_steps=6", "training.save_every=3", "model.dropout=0.1")
LAYERS = ("embedding", *(f"blocks.{block}.{part}" for block in (0, 1) for part in ("attention", "feed_forward")))


@pytest.fixture(scope="module")
def inspected(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from run_tools import same_process

    with same_process():
        return train(tmp_path_factory.mktemp("inspected"), text, *SHORT, "training.inspect_every=2")


def seen(run: Path) -> dict[str, dict[int, float]]:
    return {
        name.removeprefix("inspect/"): dict(zip(series.steps, series.values, strict=True))
        for name, series in load_training_log(run).training.items()
        if name.startswith("inspect/")
    }


def network_of(architecture: str, implementation: str = "custom", **more: object) -> Network:
    sizes = {"vocab_size": 23, "d_model": 8, "n_blocks": 2, "n_heads": 2, "d_ffn": 12, "max_seq_len": 8}
    return build_network(implementation, CustomTransformerConfig(architecture=architecture, **(sizes | more)))  # type: ignore[arg-type]


def batch_of(network: Network, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(network.config.vocab_size, (3, 9), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def one_look(network: Network, *batches: Batch) -> dict[str, float]:
    inspector, optimizer = Inspector(network, 1, 9), network.adamw(0.1, (0.9, 0.99), 1e-8)
    network.zero_gradients()
    watch = inspector.watch(3)
    loss = torch.zeros(())
    for batch in batches:
        watch.batch(batch)
        loss = loss + network.loss_and_gradients(batch, denominator=24 * len(batches), step=3)
    watch.gradients()
    optimizer.step(loss, 1e-2, 1.0)
    watch.update()
    return {name.removeprefix("inspect/"): value for name, value in inspector.take().items()}


def test_metrics_and_pictures_of_a_run(inspected: Path) -> None:
    found = seen(inspected)
    expected = {f"{quantity}/{layer}" for quantity in ("gradient_norm", "update_ratio") for layer in LAYERS}
    expected |= {f"{quantity}/final_norm" for quantity in ("gradient_norm", "update_ratio")}
    expected |= {f"{name}/blocks.{block}.{part}" for block in (0, 1) for name, part in HIDDEN}
    assert set(found) == expected
    assert all(set(values) == {1, 2, 4, 6} for values in found.values())
    assert all(math.isfinite(value) for values in found.values() for value in values.values())
    whole = dict(enumerate(metric(inspected, "gradient_norm"), start=1))
    for step in (1, 2, 4, 6):  # the layers' norms are the whole gradient's
        parts = [values[step] for name, values in found.items() if name.startswith("gradient_norm/")]
        assert math.hypot(*parts) == pytest.approx(whole[step], rel=1e-5)
    pictures = sorted((inspected / "inspection").iterdir())
    assert [path.name for path in pictures] == ["attention.png", "histograms.png", "layers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    listed = [name for name, folder in Tracked.read(inspected).artifacts if folder == "inspection"]
    assert sorted(listed) == [f"inspection/{path.name}" for path in pictures]


HIDDEN = (("attention_entropy", "attention"), ("dead_units", "feed_forward"))


@pytest.mark.parametrize("implementation", ["custom", "torch", "baseline"])
def test_no_bit_of_the_training_changes(text: Path, tmp_path: Path, implementation: str) -> None:
    losses, parameters = [], []
    for every in ("null", "1"):
        options = (f"implementation={implementation}", "model.dropout=0.1", f"training.inspect_every={every}")
        runner = Runner(config_of(text, *options), tmp_path / "outputs", Interruption())
        losses.append([runner.train_step()[0].item() for _ in range(4)])
        parameters.append(runner.model.network.export_parameters())
        assert bool(runner.inspector.take()) == (every == "1")
    assert losses[0] == losses[1]
    assert all(torch.equal(values, parameters[1][name]) for name, values in parameters[0].items())


def test_nothing_is_done_when_it_is_off() -> None:
    network = network_of("gpt2")
    inspector = Inspector(network, None, 9)
    assert all(inspector.watch(step) is UNWATCHED for step in (1, 2, 9))
    inspector.watch(1).gradients()
    inspector.watch(1).update()
    assert network.recorder is no_record
    assert inspector.take() == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_by_hand_and_by_autograd_show_the_same(architecture: str) -> None:
    batches = [batch_of(network_of(architecture), seed) for seed in (0, 1)]
    by_hand, mirrored, baseline = (
        one_look(network_of(architecture, implementation, precision="fp64"), *batches)
        for implementation in ("custom", "torch", "baseline")
    )
    assert by_hand == pytest.approx(mirrored, rel=1e-9)
    assert {name.partition("/")[0] for name in baseline} == {"gradient_norm", "update_ratio"}
    assert baseline == pytest.approx({name: by_hand[name] for name in baseline}, rel=1e-5)


def test_entropy_of_attention_that_sees_everything_alike() -> None:
    network = network_of("gpt2")
    for kind in ("weight", "bias"):
        network.parameters[f"blocks.1.attention.query.{kind}"].zero_()
    found = one_look(network, batch_of(network))
    alike = sum(math.log(row) for row in range(1, 9)) / 8  # row t sees t positions
    assert found["attention_entropy/blocks.1.attention"] == pytest.approx(alike, rel=1e-5)
    assert found["attention_entropy/blocks.0.attention"] != pytest.approx(alike, rel=1e-9)


def test_units_that_no_token_wakes_are_dead() -> None:
    network = network_of("vaswani")
    network.parameters["blocks.0.feed_forward.hidden.bias"][:3] = -100.0
    awake = torch.tensor([100.0] * 9)
    network.parameters["blocks.0.feed_forward.hidden.bias"][3:] = awake
    found = one_look(network, batch_of(network, 0), batch_of(network, 1))
    assert found["dead_units/blocks.0.feed_forward"] == pytest.approx(3 / 12)


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_padding_has_no_part(kernels: str) -> None:
    """Rows of several lengths in one batch are the same rows one by one."""
    from manual_backprop.data.tokens.batches import Documents

    lengths = np.array([8, 3, 5])
    tokens = np.random.default_rng(1).integers(1, 23, int((lengths + 1).sum()))
    documents = Documents(tokens, np.concatenate([[0], np.cumsum(lengths + 1)]))
    together = documents.batch(np.arange(3), lengths)
    alone = [documents.batch(np.array([n]), lengths[n : n + 1]) for n in range(3)]
    padded, single = (
        one_look(network_of("gpt2", precision="fp64", kernels=kernels), *batches) for batches in ([together], alone)
    )
    for name in [name for name in padded if name.startswith(("attention_entropy/", "dead_units/"))]:
        assert padded[name] == pytest.approx(single[name], rel=1e-12), name
    assert any(name.startswith("attention_entropy/") for name in padded)


def test_a_unit_that_only_padding_wakes_is_dead() -> None:
    network = network_of("gpt2")
    watch = Inspector(network, 1, 9).watch(3)
    watch.batch(Batch(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[4, 5, IGNORED]])))
    activated = torch.tensor([[[1.0, 0.0, -2.0], [0.5, 0.0, 0.0], [math.nan, 100.0, 1e9]]])
    watch("blocks.0.feed_forward.activated", activated)
    watch("blocks.0.attention.probabilities", torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [math.nan, 0, 0]]]]))
    watch("logits", torch.full((1, 3, 23), math.nan))  # told without being wanted
    watch.gradients()
    assert watch.found["dead_units/blocks.0.feed_forward"] == pytest.approx(1 / 3)
    assert watch.found["attention_entropy/blocks.0.attention"] == pytest.approx(math.log(2) / 2)
    assert {name.partition("/")[0] for name in watch.found} == {"gradient_norm", "dead_units", "attention_entropy"}


@pytest.mark.parametrize("options", [("batching=padded",), ("batching.mask_documents=true",)], ids=" ".join)
def test_the_snapshot_is_of_a_row_as_it_is_evaluated(options: tuple[str, ...], tmp_path: Path) -> None:
    """No attention between documents if the network was trained so, and none to padding."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "ab" * (n % 3 + 1)}) + "\n" for n in range(80)))
    runner = Runner(config_of(rows, "dataset=jsonl", *options), tmp_path / "outputs", Interruption())
    network = runner.model.network
    row = runner.task.example(network.device)
    snapshot = PassSnapshot(network, row)
    evaluated = next(runner.task.evaluation_batches(runner.task.corpus.split("validation"), "cpu"))  # type: ignore
    assert torch.equal(row.tokens, evaluated.tokens[:1, : row.tokens.shape[1]])
    assert snapshot.places == row.tokens.shape[1] > 1
    seen = torch.from_numpy(snapshot.attention()[0][0])
    apart = row.segments[0][:, None] != row.segments[0] if row.segments is not None else torch.zeros(len(seen), 1) > 0
    assert bool(apart.any()) == (row.segments is not None)
    assert not seen[apart.expand_as(seen)].any()
    assert seen.sum(-1) == pytest.approx(np.ones(len(seen)), rel=1e-5)


def test_update_ratio() -> None:
    network = network_of("llama")
    before = network.parameters["final_norm.weight"].clone()
    found = one_look(network, batch_of(network))
    change = (network.parameters["final_norm.weight"] - before).norm() / before.norm()
    assert found["update_ratio/final_norm"] == pytest.approx(change.item(), rel=1e-6)


def test_a_resumed_run_has_the_pictures_of_all_its_steps(inspected: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(inspected.parent.parent, tmp_path / "outputs")) / "runs" / inspected.name
    before = (run / "inspection" / "layers.png").read_bytes()
    resume(tmp_path, f"resume={run}", "training.max_steps=8")
    assert set(seen(run)["gradient_norm/final_norm"]) == {1, 2, 4, 6, 8}
    assert (run / "inspection" / "layers.png").read_bytes() != before


def test_a_run_that_nobody_inspects_has_none(finished: Path, tmp_path: Path) -> None:
    assert not (finished / "inspection").exists()
    assert not seen(finished)
    assert not draw_layers(load_training_log(finished), tmp_path / "layers.png", "nothing")
    assert not (tmp_path / "layers.png").exists()


def test_layers() -> None:
    assert layer_of("blocks.11.attention_norm.bias") == "blocks.11.attention"
    assert layer_of("blocks.0.feed_forward.gate.weight") == "blocks.0.feed_forward"
    assert layer_of("position_embedding.weight") == layer_of("token_embedding.weight") == "embedding"
    assert layer_of("final_norm.weight") == "final_norm"


# What it costs


@pytest.mark.slow
def test_the_measurement_of_what_it_costs(text: Path, tmp_path: Path) -> None:
    """By the command, with a few steps: too few for a meaningful result."""
    small = [*(one for one in SMALL if not one.startswith("tracking")), f"dataset.path={text}"]
    given = ("inspection", *small, "--every", "2", "--looks", "1", "--rounds", "1")
    done = command(*given, cwd=tmp_path, module="manual_backprop.tools.cost")
    assert done.returncode == (0 if "\nok:" in done.stdout else 1), done.stderr
    assert "training.inspect_every=2: 2 turns of 2 steps each" in done.stdout
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="--every: must be a whole number of at least 1"):
        main(["inspection", "--every", "0"])
    with pytest.raises(InputError, match="did you mean"):
        main(["inspection", "model=tny"])


def test_verdicts_on_what_it_costs() -> None:
    def rows(seconds: float) -> list[Row]:
        return [Row("without", [1.0] * 4), Row("with", [seconds] * 4), Row("without again", [1.0, 1.001, 0.999, 1.0])]

    assert verdict("inspection", rows(1.03), 0.05)[0]
    passed, words = verdict("inspection", rows(1.08), 0.05)
    assert not passed
    assert words.startswith("FAILED: inspection costs +8.00%")
    noisy = [*rows(0.9)[:2], Row("without again", [0.7, 1.0, 0.8, 1.3])]
    assert verdict("inspection", noisy, 0.05)[1].startswith("NOT SHOWN")
