"""The baseline has the numbers of the hand-written network, PyTorch's optimizer, and the same training loop."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_tools import run_compiling
from run_tools import assert_same_tensors, metric, resume, stumbling, train

from manual_backprop import BaselineTransformer, CustomTransformer, CustomTransformerConfig
from manual_backprop.common.batch import Batch
from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import ARCHITECTURES
from manual_backprop.models.network import parameter_shapes
from manual_backprop.models.wrappers.language_model import LanguageModel
from manual_backprop.study.gradient_check import ENOUGH_TO_ROUND, ODD, check_network_precision, draw_batch, odd_cases
from manual_backprop.study.gradient_check.measure import AUTOGRAD_BAR, error_of, errors_of
from manual_backprop.study.gradient_check.network_case import counted, wholly_zero
from manual_backprop.study.gradient_check.network_check import networks, step_of
from manual_backprop.tracking.run_directory import read_run

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    pytest.param(replace(config, dropout=0.0), batch, scale, id=f"{architecture}-{name}")
    for architecture in ARCHITECTURES
    for name, config, batch, scale in odd_cases(architecture)
]


@pytest.mark.parametrize(("config", "batch", "scale"), CASES)
def test_logits_loss_and_gradients_are_those_by_hand(config, batch: Batch, scale: str) -> None:
    by_hand, baseline = networks(config, scale, "baseline")
    loss, want = step_of(by_hand, batch)
    got_loss, got = step_of(baseline, batch)
    assert error_of(got_loss, loss) <= AUTOGRAD_BAR
    assert max(errors_of(got, want, wholly_zero(config, batch)).values()) <= AUTOGRAD_BAR
    logits = by_hand.predict(batch.tokens, batch.segments)
    assert error_of(baseline.predict(batch.tokens, batch.segments), logits) <= AUTOGRAD_BAR
    assert error_of(baseline.forward(batch.tokens, batch.segments), logits) <= AUTOGRAD_BAR
    for network in (by_hand, baseline):
        network.zero_gradients()
    by_hand.forward(batch.tokens, batch.segments)
    dlogits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for network in (by_hand, baseline):
        network.backward(dlogits)
    assert max(errors_of(baseline.gradients, by_hand.gradients, wholly_zero(config, batch)).values()) <= AUTOGRAD_BAR


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_by_hand_is_as_exact_in_low_precision(architecture: str, precision: str) -> None:
    """The error by hand is at most twice the baseline's."""
    config = replace(ENOUGH_TO_ROUND, architecture=architecture, precision=precision)
    found = check_network_precision(config, "proof", peer="baseline")
    assert found
    assert not [f"{f.quantity}: {f.error:.2f}" for f in found if not f.ok]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_come_and_go_under_the_same_names_with_equal_values(architecture: str) -> None:
    config = replace(ODD, architecture=architecture, seed=8)
    by_hand, baseline = CustomTransformer(config), BaselineTransformer(config)
    exported, wanted = baseline.export_parameters(), by_hand.export_parameters()
    assert list(exported) == list(wanted) == list(parameter_shapes(config))
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted), "the same seed, the same weights"
    assert list(baseline.gradients) == list(wanted)
    other = CustomTransformer(replace(config, seed=9)).export_parameters()
    baseline.load_parameters(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in baseline.export_parameters().items())
    assert baseline.count_parameters() == by_hand.count_parameters()
    whole = baseline.module.decoder.blocks[0].attention.qkv.weight
    parts = [other[f"blocks.0.attention.{name}.weight"] for name in ("query", "key", "value")]
    assert torch.equal(whole, torch.cat(parts)), "one product serves the three"
    with pytest.raises(InputError, match="is missing"):
        baseline.load_parameters({})


def test_a_step_adds_and_zeroing_forgets() -> None:
    batch = draw_batch(ODD, 3, 7)
    network = BaselineTransformer(ODD)
    assert not any(gradient.any() for gradient in network.gradients.values())
    _, once = step_of(network, batch)
    network.loss_and_gradients(batch, denominator=counted(batch), step=None)
    twice = errors_of(network.gradients, {name: 2 * g for name, g in once.items()}, wholly_zero(ODD, batch))
    assert max(twice.values()) <= AUTOGRAD_BAR
    network.zero_gradients()
    assert not any(gradient.any() for gradient in network.gradients.values())


def test_backward_belongs_to_one_forward() -> None:
    network = BaselineTransformer(ODD)
    logits = network.forward(draw_batch(ODD, 2, 5).tokens)
    network.backward(torch.ones_like(logits))
    with pytest.raises(InputError, match="backward needs the forward"):
        network.backward(torch.ones_like(logits))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_a_function_of_seed_step_and_row(architecture: str) -> None:
    config = replace(ODD, architecture=architecture, dropout=0.3)
    batch, network = draw_batch(config, 2, 7), BaselineTransformer(config)
    later = replace(batch, first_row=5)
    steps = [(batch, 1), (batch, 1), (batch, 2), (later, 1), (batch, None), (batch, None)]
    losses = [float(network.loss_and_gradients(one, denominator=9, step=step)) for one, step in steps]
    assert losses[0] == losses[1]
    assert losses[4] == losses[5]
    assert len(set(losses)) == 4
    assert torch.equal(network.forward(batch.tokens), network.predict(batch.tokens))


def test_a_language_model() -> None:
    """Training and generating from outside, as with the others."""
    models = [LanguageModel(network(ODD)) for network in (CustomTransformer, BaselineTransformer)]
    tokens = draw_batch(ODD, 2, 8).tokens
    for _ in range(3):
        by_hand, baseline = (model.train_step(tokens, tokens, learning_rate=0.1, max_grad_norm=0.5) for model in models)
        assert baseline["status"] == "success"
        for name in ("loss", "grad_norm"):
            assert baseline[name] == pytest.approx(by_hand[name], rel=1e-10)
    first, second = (model.generate(tokens[:, :3], max_length=9, seed=1) for model in models)
    assert torch.equal(first, second)


# The optimizer


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_of_the_optimizer(architecture: str, kind: str) -> None:
    """PyTorch's fused optimizer and the flat one have the same parameters and state, also after a non-finite step."""
    config = replace(ODD, architecture=architecture)
    pair = networks(config, "proof", "baseline")
    if kind == "adamw":
        optimizers = [network.adamw(0.1, (0.8, 0.95), 1e-6) for network in pair]
    else:
        optimizers = [network.sgd(0.1, 0.9) for network in pair]
    for step in range(6):
        batch, norms = draw_batch(config, 3, 7, seed=step), []
        for network, optimizer in zip(pair, optimizers, strict=True):
            network.zero_gradients()
            loss = network.loss_and_gradients(batch, denominator=counted(batch), step=step)
            for name, gradient in network.gradients.items():
                if name.endswith("key.bias"):
                    gradient.zero_()  # it is rounding, which Adam would make as large as the rate
            before = network.export_parameters(), optimizer.state()
            norms.append(float(optimizer.step(loss * (math.nan if step in (0, 3) else 1), 0.01, 0.7)))
            if step in (0, 3):
                after = network.export_parameters(), optimizer.state()
                for old, new in zip(before, after, strict=True):
                    assert all(torch.equal(old[name], new[name]) for name in old if name != "counts")
        assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    states = [optimizer.state() for optimizer in optimizers]
    assert list(states[0]) == list(states[1])
    assert states[0]["counts"].tolist() == states[1]["counts"].tolist() == [4, 2, 0, 1]
    for one, other in (states, [network.parameters for network in pair]):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-11, msg=name)


# Runs

EXACT = ("precision=fp64", "training.max_steps=6", "training.save_every=3", "training.eval_every=3")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.usefixtures("here")
def test_a_run_is_that_of_the_mirror(text: Path, tmp_path: Path, architecture: str) -> None:
    runs = [
        train(tmp_path / name, text, *EXACT, f"architecture={architecture}", f"implementation={name}")
        for name in ("torch", "baseline")
    ]
    for name in ("train/loss", "gradient_norm", "validation/loss"):
        want, got = (metric(run, name) for run in runs)
        assert len(want) >= 2
        assert got == pytest.approx(want, rel=1e-9)


@pytest.mark.usefixtures("here")
def test_a_resumed_run_is_the_run_that_was_not_interrupted(text: Path, tmp_path: Path) -> None:
    options = ("implementation=baseline", "model.dropout=0.1", "training.save_every=3", "precision=bf16")
    whole = train(tmp_path / "whole", text, *options, "training.max_steps=6")
    part = train(tmp_path / "part", text, *options, "training.max_steps=6")
    cut = part / "checkpoints" / "step-000003"
    resume(tmp_path / "part", f"resume={cut}", "training.max_steps=6")
    assert [each["step"] for each in read_run(part)["resumes"]] == [3], "or these are the tensors of before"
    assert_same_tensors(whole / "checkpoints" / "step-000006", part / "checkpoints" / "step-000006")


@pytest.mark.usefixtures("here")
def test_a_step_that_is_not_finite_is_masked(text: Path, tmp_path: Path) -> None:
    from run_tools import config_of

    from manual_backprop.common.interruption import Interruption
    from manual_backprop.training.runner import Runner

    config = config_of(text, "implementation=baseline", "training.max_steps=5", "training.non_finite=skip")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
        stumbling(runner, {2, 4}, gradient=True)
        assert math.isfinite(runner.run())
    assert runner.optimizer.counts.tolist()[:3] == [3, 2, 0]


# torch.compile

COMPILED = """
import torch, sys
from manual_backprop import BaselineTransformer, CustomTransformerConfig
from manual_backprop.study.gradient_check import draw_batch
from manual_backprop.study.gradient_check.measure import errors_of
from manual_backprop.study.gradient_check.network_case import wholly_zero
from manual_backprop.study.gradient_check.network_check import step_of
torch.set_num_threads(1)
sizes = dict(vocab_size=17, d_model=18, n_blocks=1, n_heads=3, d_ffn=22, max_seq_len=9, precision="fp64")
config = CustomTransformerConfig(**sizes, architecture="llama", n_kv_heads=1)
batch = draw_batch(config, 2, 7)
eager = BaselineTransformer(config)
network = BaselineTransformer(CustomTransformerConfig(**{**config.__dict__, "compile": "always"}))
_, want = step_of(eager, batch)
for _ in range(2):
    _, got = step_of(network, batch)
    assert max(errors_of(got, want, wholly_zero(config, batch)).values()) <= 1e-12
for T in (3, 4, 5, 6):
    network.predict(batch.tokens[:, :T])
print("compiled" if network.compiled else "eager", eager.compiled)
"""


@pytest.mark.parametrize(
    "compiler", [pytest.param("there", marks=pytest.mark.nightly), pytest.param("missing", marks=pytest.mark.slow)]
)
def test_compiled_or_not_the_numbers_are_the_same(compiler: str, tmp_path: Path) -> None:
    """If compiling fails, one line reports it and the step runs uncompiled."""
    output, said = run_compiling(COMPILED, compiler, tmp_path)
    if compiler == "missing":
        assert output.split() == ["eager", "False"]
        assert len(said) == 1
    else:
        assert output.split()[1] == "False"
        assert (output.split()[0] == "compiled") == (not said)


def test_compile_is_one_of_three_words() -> None:
    assert "compile='yes'" in " ".join(CustomTransformerConfig(compile="yes").violations())
