"""The command that shows a model's parameters, FLOPs and memory."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from manual_backprop import summary
from manual_backprop.common import exit_codes
from manual_backprop.common.batch import Batch
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.models.flops import flops_per_token
from manual_backprop.models.implementations import build_network
from manual_backprop.models.network import parameter_shapes
from manual_backprop.trained_models.saved_model import load
from manual_backprop.training import model_summary

pytestmark = pytest.mark.usefixtures("here")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert summary.main(list(arguments)) is None
    return capsys.readouterr().out


def described(text: Path, *more: str) -> list[str]:
    from run_tools import SMALL

    named = {one.partition("=")[0] for one in more}
    return [*(one for one in SMALL if one.partition("=")[0] not in named), f"dataset.path='{text}'", *more]


def test_of_a_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = load("last")
    shown = said(capsys, "last", "--tflops", "1e-6", "--shapes")
    assert "one step" in shown
    assert shown.splitlines()[0] == saved.line
    total = saved.model.count_parameters()
    rows = dict(re.findall(r"^ (\S+(?: all)?) +.*?([\d,]+) +[\d.]+% *$", shown, flags=re.MULTILINE))
    assert int(rows["in all"].replace(",", "")) == total
    for name, shape in parameter_shapes(saved.model.config).items():
        if not name.startswith("blocks.1."):
            assert int(rows[name].replace(",", "")) == math.prod(shape)
    blocks = [int(rows[name].replace(",", "")) for name in ("blocks.0", "blocks.1")]
    rest = sum(math.prod(s) for n, s in parameter_shapes(saved.model.config).items() if not n.startswith("blocks."))
    assert sum(blocks) + rest == total
    token = flops_per_token(saved.model.config, saved.model.config.max_seq_len)
    assert f"a token   {token:,} FLOPs" in shown
    seconds = 8 * 64 * token / 1e6  # 8 steps of 4 x 2 sequences of 8 tokens
    assert re.search(rf"a run     8 steps, \S+ FLOPs, {8 / (5400 // 8 - 1) * 8:.2f} epochs", shown)
    assert f"run time  {seconds:.0f} s at 1e-06 TFLOP/s (as given)" in shown


def test_a_run_may_have_any_name(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = copy.rename(copy.with_name("20260101-000000-rate=1-abcdef"))
    assert summary.names_a_run(named.name)
    assert summary.names_a_run(f"{named}@4")
    assert not summary.names_a_run("model=tiny")


def test_of_a_command_line(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate is measured if it is not given; the text is not prepared, and nothing is written. In bf16 weights and
    gradients have 2 bytes, the two moments 4 each."""
    sizes = ("model.d_model=64", "model.d_ffn=256", "model.max_seq_len=64", "training.batch_size=16")
    shown = said(capsys, *described(text, "architecture=llama", "model.n_kv_heads=1", "precision=bf16", *sizes))
    assert shown.startswith("custom (llama, bf16): ")
    assert "parameters, step 0, validation loss not measured (not trained)\n" in shown.splitlines(keepends=True)[0]
    assert re.search(r"blocks.0.attention.key.weight +32 x 64 +2,048 ", shown)
    assert re.search(r"an epoch  about [\d.]+ steps: about [\d,]+ tokens", shown)
    assert re.search(r"run time  at least [\d.]+ s at [\d.]+ TFLOP/s \(measured", shown)
    assert not Path("outputs").exists()
    parameters = int(re.search(r"([\d,]+) parameters", shown)[1].replace(",", ""))  # type: ignore[index]
    assert "memory at training.batch_size=16" in shown
    for name in ("custom", "torch", "baseline"):
        row = re.search(rf"^ {name}: .*$", shown, flags=re.MULTILINE)[0]  # type: ignore[index]
        numbers = [float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) MB", row)]
        weights, gradients, moments, working, total = numbers
        assert weights == gradients == round(2 * parameters / 1e6, 1)
        assert moments == round(8 * parameters / 1e6, 1)
        assert working > 2 * 16 * 64 * (2 * 4 * 64 + 2 * 256 + 257) / 1e6  # some D and F of each block, and the logits
        assert total == pytest.approx(weights + gradients + moments + working, abs=0.21)


@pytest.mark.parametrize("implementation", ["custom", "torch", "baseline"])
def test_shapes_of_one_step(text: Path, capsys: pytest.CaptureFixture[str], implementation: str) -> None:
    from rich.console import Console

    subject = model_summary.described(described(text, f"implementation={implementation}"))
    model_summary.show_step(Console(width=110), subject)
    shown = capsys.readouterr().out
    rows = re.findall(r"^ (\S+) +([\d x]+?) +(float32) +([\d,]+) +(yes|NO) *$", shown, flags=re.MULTILINE)
    found = {name: (shape, int(size.replace(",", "")), finite) for name, shape, _, size, finite in rows}
    assert found["token_embedding.dweight"] == ("257 x 16", 257 * 16 * 4, "yes")
    assert ("blocks.1.attention.probabilities" in found) == (implementation != "baseline")
    assert ("records no activations" in shown) == (implementation == "baseline")
    if implementation != "baseline":
        assert found["blocks.1.attention.dscores"] == ("4 x 2 x 8 x 8", 4 * 2 * 8 * 8 * 4, "yes")
        assert found["logits"] == ("4 x 8 x 257", 4 * 8 * 257 * 4, "yes")
    loss, ignorant = re.search(r"loss ([\d.]+); ln V = ([\d.]+), where", shown).groups()  # type: ignore[union-attr]
    assert float(ignorant) == pytest.approx(math.log(257), abs=1e-4)
    assert abs(float(loss) - float(ignorant)) < 1
    assert f"{len(rows)} tensors, " in shown
    assert "all of them finite" in shown


def test_what_is_not_finite_is_named() -> None:
    network = build_network("custom", CustomTransformerConfig(vocab_size=9, d_model=4, n_blocks=2, n_heads=1, d_ffn=4))
    network.parameters["blocks.1.feed_forward.hidden.bias"][2] = math.nan
    tokens = torch.tensor([[1, 2, 3]])
    loss, seen = model_summary.one_step(network, Batch(tokens, tokens), 3)
    finite = {one.name: one.finite for one in seen}
    assert math.isnan(loss)
    assert finite["blocks.1.residual"]
    assert not finite["blocks.1.feed_forward.hidden"]
    assert not finite["blocks.0.attention.query.dweight"]
    assert {f"{name.rpartition('.')[0]}.d{name.rpartition('.')[2]}" for name in network.parameters} <= set(finite)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wings"], "there is no run 'wings'"),
        (["last", "model=tiny"], "last: give either one RUN or overrides KEY=VALUE"),
        (["model=tinny"], "tinny"),
        (["model.d_model=7"], "model.d_model=7: must be divisible by"),
        (["model=tiny,small"], "several values are a sweep"),
        (["--tflops", "0"], "--tflops: must be a number, more than 0"),
        (["--shape"], "--shape: there is no such option; did you mean --shapes?"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert exit_codes.exit_code_of(lambda: summary.main(arguments)) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) <= 2


@pytest.mark.parametrize("command", ["evaluate", "generate", "chat", "summary"])
def test_help_is_a_page(capsys: pytest.CaptureFixture[str], command: str) -> None:
    from importlib import import_module

    from manual_backprop.__main__ import COMMANDS

    assert command in COMMANDS
    with pytest.raises(SystemExit) as caught:
        import_module(f"manual_backprop.{command}").main(["--help"])
    page = capsys.readouterr().out
    assert caught.value.code == 0
    assert len(page.splitlines()) > 25
    assert max(map(len, page.splitlines())) <= 120
    for words in (f"python -m manual_backprop.{command}", "RUN is last (the newest run)", "Examples", "Exit codes"):
        assert words in page
