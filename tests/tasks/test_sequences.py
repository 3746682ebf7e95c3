"""task=reversal, copy and sort: their rows, their batches, and a run, from its first step to what is asked of it."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_tools import metric, newest, resume

from manual_backprop import evaluate, generate
from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint
from manual_backprop.common.batch import IGNORED, Batch, PairBatch
from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.config.schema import CustomTransformerConfig, TaskConfig
from manual_backprop.data.tokens.order import Padded
from manual_backprop.models.wrappers.building import build_wrapper
from manual_backprop.tasks.sequence_pictures import CrossAttention, diagonal_shares, draw_cross_attention
from manual_backprop.tasks.sequence_rows import SPLITS, Rows, Vocabulary, draw_rows, split_of
from manual_backprop.tracking.run_directory import read_run
from manual_backprop.training.command_line import check
from manual_backprop.training.plan import Planner
from manual_backprop.training.runner import run_job

REVERSAL = TaskConfig("reversal", 2, 5, 7, training_rows=3000, validation_rows=50, test_rows=300)
SMALL = ("task=copy", "network=decoder", "model=tiny", "model.d_model=16", "model.d_ffn=32", "model.n_blocks=1")
SMALL += ("model.max_seq_len=9", "task.min_length=1", "task.max_length=4", "task.symbols=5", "task.training_rows=160")
SMALL += ("task.validation_rows=40", "task.test_rows=30", "training=smoke", "training.batch_size=8", "tracking=none")
SMALL += ("training.gradient_accumulation_steps=1", "training.eval_every=5", "training.save_every=5", "device=cpu")
SMALL += ("training.keep_checkpoints=9", "kernels.compile=never", "training.log_every=5", "device.threads=1")


def train(root: Path, *overrides: str) -> Path:
    run_job(check([*SMALL, *overrides]).jobs[0].config, root)
    return newest(root)


# Rows


def as_tuples(rows: Rows) -> set[tuple[int, ...]]:
    return set(map(tuple, rows.sources(np.arange(len(rows)))))


def test_no_row_of_the_test_is_trained_on_by_any_run() -> None:
    """A hash of the row alone decides: other seeds, lengths and tasks draw other rows, and hold out the same ones."""
    test = as_tuples(draw_rows(REVERSAL, "test", 0, "decoder"))
    longer = replace(REVERSAL, name="sort", min_length=1, max_length=9)
    for config, seed in ((REVERSAL, 0), (REVERSAL, 1), (longer, 0)):
        train, validation = (as_tuples(draw_rows(config, split, seed, "decoder")) for split in SPLITS[:2])
        assert len(train) > 1000
        assert not test & train
        assert not validation & (test | train)
    assert as_tuples(draw_rows(REVERSAL, "test", 1, "decoder")) != test


def test_rows_are_a_function_of_the_seed() -> None:
    one, same, other = (draw_rows(REVERSAL, "training", seed, "decoder") for seed in (3, 3, 4))
    assert np.array_equal(one.source, same.source)
    assert not np.array_equal(one.source, other.source)
    assert set(one.source_lengths) == {2, 3, 4, 5}
    assert set(one.source[one.source_lengths == 5].flatten()) == set(range(7))
    few = draw_rows(replace(REVERSAL, training_rows=10), "training", 3, "decoder")
    assert few.sources(np.arange(10)) == one.sources(np.arange(10))
    share = np.bincount(split_of(one.source, one.source_lengths), minlength=3)
    assert share.tolist() == [3000, 0, 0]


@pytest.mark.parametrize(("name", "wanted"), [("reversal", [2, 0, 4]), ("copy", [4, 0, 2]), ("sort", [0, 2, 4])])
@pytest.mark.parametrize("network", ["decoder", "encoder_decoder"])
def test_what_becomes_of_a_row_and_its_batch(name: str, wanted: list[int], network: str) -> None:
    """With 5 symbols: 5 padding, 6 beginning, 7 end, 8 separator; a shorter row beside it is padded."""
    words = Vocabulary(5, network)
    assert (words.padding, words.beginning, words.end, words.separator) == (5, 6, 7, 8)
    assert words.size == (9 if network == "decoder" else 8)
    rows = Rows(np.array([[4, 0, 2, 9], [3, 9, 9, 9]]), np.array([3, 1]), name, words)
    assert rows.targets(np.array([0, 1])) == [wanted, [3]]
    batch = rows.batch(np.array([0, 1]), np.array([4, 2]), first_row=6)
    no = IGNORED
    assert batch.first_row == 6
    if network == "decoder":
        assert isinstance(batch, Batch)
        assert batch.tokens.tolist() == [[4, 0, 2, 8, *wanted], [3, 8, 3, 5, 5, 5, 5]]
        assert batch.targets.tolist() == [[no, no, no, *wanted, 7], [no, 3, 7, no, no, no, no]]
        return
    assert isinstance(batch, PairBatch)
    assert (batch.source.tolist(), batch.source_lengths.tolist()) == ([[4, 0, 2], [3, 5, 5]], [3, 1])
    assert batch.tokens.tolist() == [[6, *wanted], [6, 3, 5, 5]]
    assert batch.targets.tolist() == [[*wanted, 7], [3, 7, no, no]]


def test_an_epoch_meets_every_row_once_and_counts_its_targets() -> None:
    rows = draw_rows(replace(REVERSAL, training_rows=101), "training", 0, "encoder_decoder")
    order = Padded(rows, 99, seed=0, batch_size=4, accumulation_steps=2)
    met: list[Sequence[int]] = []
    for step in range(round(order.steps(1))):
        tokens, batches = order.batches(step)
        seen = list(batches)
        assert tokens == sum(int((batch.targets != IGNORED).sum()) for batch in seen)
        for batch in seen:
            met += [row[:n] for row, n in zip(batch.source.tolist(), batch.source_lengths.tolist(), strict=True)]
    assert sorted(met) == sorted(rows.sources(np.arange(101)))


# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("copy"), "training.max_steps=60", "training.eval_every=20")


@pytest.fixture
def in_its_folder(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parents[2])


@pytest.mark.usefixtures("in_its_folder")
def test_what_a_run_leaves(finished: Path) -> None:
    exact, accuracy = metric(finished, "validation/exact_match"), metric(finished, "validation/accuracy")
    assert len(exact) == 3
    assert exact[-1] < accuracy[-1]  # by itself a model has to be right to the end
    assert accuracy[-1] > 0.3 > 1 / 6
    assert metric(finished, "epoch") == [step / 20 for step in range(5, 61, 5)]
    assert metric(finished, "test/exact_match")
    checkpoints = CheckpointManager(finished / "checkpoints")
    best = checkpoints.best()
    assert best is not None
    saved = load_checkpoint(best)
    assert (saved.metric, saved.metric_name) == (max(exact), "validation/exact_match")
    assert (finished / "training_progress.png").read_bytes().startswith(b"\x89PNG")
    shown = (finished / "samples/step-000060.txt").read_text().splitlines()
    assert len(shown) == 10
    for line in shown:
        source, written, verdict, expected = re.fullmatch(
            r"([\d ]+) -> (.*?)  ([\u2713\u2717])(?:  expected ([\d ]+))?", line
        ).groups()  # type: ignore[union-attr]
        assert (verdict == "\u2713") == (written == source) == (expected is None)
    log = (finished / "run.log").read_text()
    assert re.search(r"epoch 3/3 \| train loss \d\.\d+ \| validation loss \d\.\d+ \| exact match \d+\.\d%", log)


@pytest.mark.usefixtures("in_its_folder")
def test_a_finished_run_is_asked(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["last@last", "--predictions", "3"])
    page = capsys.readouterr().out
    assert f"exact match  {metric(finished, 'validation/exact_match')[-1]:.2%}" in page
    assert f"accuracy     {metric(finished, 'validation/accuracy')[-1]:.2%}" in page
    assert page.count(" -> ") == 3
    evaluate.main(["last@last", "--split", "test"])
    assert f"{metric(finished, 'test/exact_match')[-1]:.2%}" in capsys.readouterr().out
    assert metric(finished, "evaluation/test_exact_match") == metric(finished, "test/exact_match")
    generate.main(["last", "--source", "1 2, 3"])
    assert re.search(r"\n1 2 3 -> .*[\u2713\u2717]", greedy := capsys.readouterr().out)
    generate.main(["last", "--source", "1 2 3", "--beams", "1"])
    assert capsys.readouterr().out == greedy
    for arguments, words in (
        (["--source", "1 5"], "'5': is not a symbol of this run; a source consists of the numbers 0 to 4"),
        (["--source", "1 1 1 1 1"], "of at most 4"),
        (["--source", " "], "an empty source"),
        (["--prompt", "x"], 'generate .* --source "1 2 3 4"'),
        (["--prompt", "x", "--source", "1"], "give --prompt TEXT, or --source"),
    ):
        with pytest.raises(InputError, match=words):
            generate.main(["last", *arguments])
    with pytest.raises(InputError, match="--tokens: is not available for task=copy; available: --predictions"):
        evaluate.main(["last", "--tokens", "3"])


@pytest.mark.usefixtures("in_its_folder")
def test_a_plan_of_rows() -> None:
    plan = Planner().plan(check([*SMALL, "training.num_epochs=2", "training.max_steps=null"]).jobs[0].config)
    assert (plan.max_steps, plan.preview.steps_per_epoch, plan.network.vocab_size) == (40, 20, 9)
    assert plan.preview.examples == (
        "rows",
        "copy of 1 to 4 of 5 symbols: 160 rows for training, 40 for validation, 30 for the test",
    )


def test_an_encoder_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual network of these tasks: trained, looked into, resumed bit for bit, loaded and asked."""
    monkeypatch.chdir(tmp_path)
    usual = ("task=reversal", "network=null", "training.inspect_every=10", "model.max_seq_len=5", "model.n_heads=2")
    small = [one for one in SMALL if one.partition("=")[0] not in {key.partition("=")[0] for key in usual}]
    run_job(check([*small, *usual, "training.max_steps=20"]).jobs[0].config, tmp_path)
    whole = newest(tmp_path)
    assert (whole / "cross_attention.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "inspection/attention.png").is_file()
    assert 0 < metric(whole, "test/cross_attention_share")[0] < 1
    assert "attends most to the anti-diagonal for" in capsys.readouterr().out
    assert metric(whole, "inspect/attention_entropy/decoder.blocks.0.cross_attention")
    assert metric(whole, "inspect/attention_entropy/encoder.blocks.0.attention")
    generate.main(["last", "--source", "1 2 3", "--beams", "2", "--length-penalty", "1"])
    assert re.search(r"\n1 2 3 -> .*[\u2713\u2717]", capsys.readouterr().out)
    evaluate.main(["last@last", "--predictions", "2", "--split", "test"])
    assert f"exact match  {metric(whole, 'test/exact_match')[0]:.2%}" in capsys.readouterr().out


# Early stopping and schedule=plateau

LOWERS = ("schedule=plateau", "schedule.warmup_steps=2", "schedule.patience=1", "schedule.factor=0.25")


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit_with_what_evaluations_have_shown(tmp_path: Path) -> None:
    steps, rates = "training.max_steps=40", []
    for name, until in (("whole", 40), ("parts", 15)):
        (tmp_path / name).mkdir()
        run = train(tmp_path / name, *LOWERS, f"training.max_steps={until}", "optimizer.learning_rate=1e-6")
    resume(tmp_path / "parts", f"resume={run}", steps)
    states = []
    for name in ("whole", "parts"):
        run = newest(tmp_path / name)
        saved = load_checkpoint(run / "checkpoints/step-000040")
        states.append((saved.tensors, saved.state["improvement"]))
        rates.append(metric(run, "learning_rate"))
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 2  # at such a rate nothing improves
    assert states[0][1] == states[1][1]
    for group, tensors in states[0][0].items():
        assert all(torch.equal(tensor, states[1][0][group][name]) for name, tensor in tensors.items())


def test_a_run_that_does_not_improve_stops_early_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stops = ("training.patience=2", "training.max_steps=40", "optimizer.learning_rate=1e-9", "training.eval_batches=1")
    run = train(tmp_path, *stops)
    record = read_run(run)
    assert (record["status"], record["stopped_early"]) == ("FINISHED", 15)
    assert load_checkpoint(run / "checkpoints/step-000015").step == 15
    assert "of 40, stopped early" in (page := capsys.readouterr().out)
    assert "stopped early after step 15: 2 evaluations without a better validation/exact_match than 0.0000" in page
    assert "training.patience=null" in page
    assert "of 40 rows" in (run / "run.log").read_text().split("step 15:")[1]  # the last is over the whole split
    with pytest.raises(InputError, match=r"has stopped early, after 15 steps.*training\.patience=null, to continue"):
        resume(tmp_path, f"resume={run}")
    resume(tmp_path, f"resume={run}", "training.patience=null", "training.max_steps=20")
    assert read_run(run)["status"] == "FINISHED"
    assert read_run(run)["stopped_early"] is None


# What makes no sense is refused


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        (
            ["task=reversal", "dataset=python_docs", "tokenizer=byte", "batching=packed"],
            [
                "dataset=python_docs: task=reversal makes its own",
                "tokenizer=byte: task",
                "batching=packed: task=reversal never packs",
            ],
        ),
        (["task=reversal", "model.max_seq_len=16"], ["takes 17 positions with network=encoder_decoder"]),
        (
            ["task=sort", "network=decoder", "model.max_seq_len=32"],
            ["use model.max_seq_len=33, or task.max_length=15"],
        ),
        (["task=copy", "network=encoder"], ["network=encoder: task=copy needs network=encoder_decoder or decoder"]),
        (["network=encoder_decoder"], ["task=language_model needs network=decoder"]),
        (["task=copy", "task.min_length=9", "task.max_length=8"], ["must be at most task.max_length=8"]),
        (["task=copy", "task.symbols=2", "task.max_length=5"], ["only 48 different rows"]),
        (["task=copy", "model.vocab_size=99"], ["task=copy has 13 tokens"]),
        (["task=copy", "dataset.subset_size=9"], ["did you mean task.training_rows?"]),
        (["dataset=none", "tokenizer=none"], ["use dataset=python_docs", "use tokenizer=bpe"]),
        (["task.symbols=4"], ["only task=reversal or copy or sort has this key"]),
        (["task=revresal"], ["did you mean reversal?"]),
        (["schedule=noam", "schedule.warmup_steps=850"], ["must be less than training.max_steps=850"]),
        (["schedule=noam", "optimizer.learning_rate=1e-4"], ["did you mean schedule.peak=0.0001?"]),
        (["schedule=plateau", "training.patience=2"], ["ends the run before schedule.patience=2"]),
    ],
)
def test_refusals(overrides: list[str], sentences: list[str]) -> None:
    """Each in one sentence, all in one report."""
    with pytest.raises(ConfigError) as caught:
        check([*overrides, "tracking=none"])
    for sentence in sentences:
        assert any(sentence in violation for violation in caught.value.violations), caught.value.violations


def test_rows_that_no_hash_puts_into_a_split() -> None:
    with pytest.raises(InputError, match=r"is in the test split; use longer rows, or more task\.symbols"):
        draw_rows(TaskConfig("copy", 1, 1, 2, 9, 9, 9), "test", 0, "decoder")


# Where a target looks


def test_the_share_of_symbols_at_which_a_head_looks() -> None:
    """Two rows of 3 and 1 symbols: head 0 looks at the anti-diagonal but once, head 1 at the first position."""
    places = np.array([[2, 1, 0], [0, 0, 0]])
    probabilities = np.zeros((2, 2, 4, 3))
    for row in range(2):
        for target in range(4):
            probabilities[row, 0, target, places[row, target] if target < 3 else 0] = 0.6
            probabilities[row, 1, target, 0] = 0.6
    probabilities[0, 0, 1] = (0.9, 0.1, 0)
    assert diagonal_shares(probabilities, np.array([3, 1]), places).tolist() == [3 / 4, 2 / 4]


def test_the_picture_of_cross_attention(tmp_path: Path) -> None:
    maps = np.stack([np.flipud(np.eye(3))] * 5)[None]
    seen = CrossAttention(maps, ["1", "2", "3"], ["3", "2", "1"], 1.0, "head 0 of block 0 looks")
    assert draw_cross_attention(seen, path := tmp_path / "cross_attention.png", "reversal")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_predictions_of_a_checkpoint_are_those_of_other_rows(finished: Path) -> None:
    """Of another seed's rows nothing is measured: the state says which rows a checkpoint has learned."""
    state = json.loads((finished / "checkpoints/step-000060/state.json").read_text())
    assert state["higher_is_better"] is True
    assert len(state["state"]["dataset_digest"]) == 64


@pytest.mark.parametrize("network", ["decoder", "encoder_decoder"])
def test_label_smoothing_gives_padding_nothing(network: str) -> None:
    """The three implementations agree, and the logit of padding gets what softmax gives it alone."""
    rows = draw_rows(REVERSAL, "training", 0, network)
    batch = rows.batch(np.arange(5), rows.source_lengths[:5] + 1)
    sizes = {"d_model": 8, "n_blocks": 1, "n_heads": 2, "d_ffn": 12, "max_seq_len": 11, "precision": "fp64"}
    kind = {
        "vocab_size": rows.vocabulary.size,
        "network": network,
        "architecture": "llama",
        "label_smoothing": 0.3,
    }  # an untied head
    losses, gradients = [], []
    for implementation, kernels in (("custom", "reference"), ("custom", "fused"), ("torch", "reference")):
        config = CustomTransformerConfig(**sizes, **kind, kernels=kernels, padding_token_id=7)
        built = build_wrapper(implementation, config).network
        built.load_parameters(build_wrapper("custom", config).network.export_parameters())
        built.zero_gradients()
        losses.append(built.loss_and_gradients(batch, denominator=17, step=None))
        gradients.append(built.gradients["head.weight"][7].clone())
    plain = build_wrapper("custom", replace(config, label_smoothing=0.0)).network
    plain.zero_gradients()
    plain.loss_and_gradients(batch, denominator=17, step=None)
    for loss, gradient in zip(losses, gradients, strict=True):
        assert loss.item() == pytest.approx(losses[0].item(), rel=1e-13)
        assert torch.allclose(gradient, plain.gradients["head.weight"][7], rtol=1e-11, atol=1e-15)
    assert losses[0] != plain.loss_and_gradients(batch, denominator=17, step=None)
