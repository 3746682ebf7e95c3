"""diagnose: a sound config passes, and each fault that is planted fails its own check and no other."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_tools import command
from run_tools import config_of
from torch import Tensor

from manual_backprop.common.batch import Batch
from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import ARCHITECTURES, RunConfig
from manual_backprop.data.tokens.corpus import Corpus, prepare_corpus
from manual_backprop.data.tokens.order import Order
from manual_backprop.diagnose import config_described, main
from manual_backprop.models.network import Network
from manual_backprop.ops import IGNORED
from manual_backprop.study.diagnosis import FAILED, FOLLOWS, PASSED, Diagnosis, Finding
from manual_backprop.study.diagnosis.finding import CAUSES
from manual_backprop.study.diagnosis.loader import beginning
from manual_backprop.study.diagnosis.rates import RangeTest, draw_range_test, range_test
from manual_backprop.tasks import LanguageModelTask

pytestmark = pytest.mark.usefixtures("here")
PADDED = ("batching=padded",)
APART = ("batching.mask_documents=true",)
Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, in a file of lines."""
    path = tmp_path_factory.mktemp("sentences") / "documents.jsonl"
    draw = np.random.default_rng(0)
    words = ["cat", "dog", "owl", "saw", "ate", "the", "mice", "seven"]
    lines = (" ".join(words[n] for n in draw.integers(8, size=draw.integers(1, 9))) for _ in range(300))
    path.write_text("".join(f'{{"text": "{line}."}}\n' for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@functools.cache
def prepared(sentences: Path, cache: Path, *overrides: str) -> tuple[RunConfig, Corpus]:
    config = config_of(sentences, "dataset=jsonl", *overrides)
    return config, prepare_corpus(config.dataset, config.tokenizer, cache)


def diagnosis_of(sentences: Path, cache: Path, *overrides: str) -> Diagnosis:
    torch.set_num_threads(1)
    return Diagnosis(LanguageModelTask(*prepared(sentences, cache, *overrides), cache))


def statuses(findings: list[Finding]) -> dict[int, str]:
    return {finding.check: finding.status for finding in findings if finding.status != PASSED}


@pytest.mark.parametrize(
    "overrides",
    [
        *((f"architecture={name}",) for name in ARCHITECTURES),
        (*PADDED, "implementation=torch", "dataset.max_length=6"),
        (*APART, "implementation=baseline", "optimizer=sgd", "dataset.max_length=20"),
        ("model.max_seq_len=1", "architecture.activation=relu", "training.label_smoothing=0.1", "precision=bf16"),
    ],
)
def test_a_sound_config_passes(sentences: Path, cache: Path, overrides: tuple[str, ...]) -> None:
    findings = list(diagnosis_of(sentences, cache, *overrides).findings())
    assert [finding.check for finding in findings] == [1, 2, 3, 4, 5, 6, 7]
    assert not statuses(findings), findings


# Faults. Each is planted where a Diagnosis gets its parts from, as the Runner does.

PARTS = "manual_backprop.study.diagnosis.diagnosis."


def with_batches(change: Callable[[Batch], Batch], counted: bool = False) -> Plant:
    """A loader that changes its batches; `counted`: it counts the changed labels."""

    class Changed(Order):
        def __init__(self, order: Order):
            self.order, self.tokens_per_step = order, order.tokens_per_step

        def steps(self, epochs: float) -> float:
            return self.order.steps(epochs)

        def tokens_before(self, step: int) -> int:
            return self.order.tokens_before(step)

        def batches(self, step: int, device: Any = "cpu") -> tuple[int, Iterator[Batch]]:
            tokens, batches = self.order.batches(step, device)
            changed = [change(batch) for batch in batches]
            return sum(int((b.targets != IGNORED).sum()) for b in changed) if counted else tokens, iter(changed)

    def plant(patch: pytest.MonkeyPatch) -> None:
        order = LanguageModelTask.order
        patch.setattr(LanguageModelTask, "order", lambda task: Changed(order(task)))

    return plant


def with_order(epoch_order: Callable[[int, int, int], tuple[int, np.ndarray]]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        for module in ("batches", "order"):
            patch.setattr(f"manual_backprop.data.tokens.{module}.epoch_order", epoch_order)

    return plant


def with_network(change: Callable[[Network], None]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        from manual_backprop.models.implementations import build_network

        def build(*given: Any) -> Network:
            network = build_network(*given)
            change(network)
            return network

        patch.setattr(PARTS + "build_network", build)

    return plant


def with_gradients(change: Callable[[dict[str, Tensor]], None]) -> Plant:
    """A backward pass that changes the gradients."""

    def spoil(network: Network) -> None:
        right = network.loss_and_gradients

        def loss_and_gradients(batch: Batch, **named: Any) -> Tensor:
            loss = right(batch, **named)
            change(dict(network.gradients))
            return loss

        network.loss_and_gradients = loss_and_gradients  # type: ignore[method-assign]

    return with_network(spoil)


def with_optimizer(change: Callable[[Any], None]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        from manual_backprop.models.training_step import build_optimizer

        def build(*given: Any) -> Any:
            optimizer = build_optimizer(*given)
            change(optimizer)
            return optimizer

        patch.setattr(PARTS + "build_optimizer", build)

    return plant


def unshifted(batch: Batch) -> Batch:
    return replace(batch, targets=torch.where(batch.targets == IGNORED, IGNORED, batch.tokens))


def shifted_twice(batch: Batch) -> Batch:
    last = batch.targets[:, -1:]
    return replace(batch, targets=torch.cat((batch.targets[:, 1:], last), dim=1))


def padding_counts(batch: Batch) -> Batch:
    return replace(batch, targets=batch.targets.clamp(min=0))


def text_does_not_count(batch: Batch) -> Batch:
    targets = batch.targets.clone()
    targets[:, 0] = IGNORED
    return replace(batch, targets=targets)


def segments_late(batch: Batch) -> Batch:
    assert batch.segments is not None
    return replace(batch, segments=batch.segments.roll(1, dims=1))


def in_order(seed: int, epoch: int, count: int) -> tuple[int, np.ndarray]:
    return 0, np.arange(count)


def with_replacement(seed: int, epoch: int, count: int) -> tuple[int, np.ndarray]:
    return 0, np.random.default_rng([seed, epoch]).integers(count, size=count)


def the_same_each_epoch(seed: int, epoch: int, count: int) -> tuple[int, np.ndarray]:
    return 0, np.random.default_rng(seed).permutation(count)


def another_each_time(seed: int, epoch: int, count: int) -> tuple[int, np.ndarray]:
    return 0, np.random.default_rng().permutation(count)


def large_embedding(network: Network) -> None:
    network.parameters["token_embedding.weight"].mul_(6)


def never_computed(gradients: dict[str, Tensor]) -> None:
    gradients["blocks.1.feed_forward.hidden.bias"].zero_()


def not_finite(gradients: dict[str, Tensor]) -> None:
    gradients["blocks.0.attention.value.weight"][0, 0] = math.nan


def far_too_large(gradients: dict[str, Tensor]) -> None:
    gradients["blocks.0.attention_norm.bias"].mul_(1e7)


def uphill(gradients: dict[str, Tensor]) -> None:
    for gradient in gradients.values():
        gradient.neg_()


def anywhere(gradients: dict[str, Tensor]) -> None:
    """Gradients of the right size in a random direction."""
    generator = torch.Generator().manual_seed(0)
    for gradient in gradients.values():
        gradient.copy_(torch.randn(gradient.shape, generator=generator) * gradient.norm() / gradient.numel() ** 0.5)


def gains_and_biases_forgotten(optimizer: Any) -> None:
    """The parameters without weight decay are never updated."""
    right = optimizer._update_part

    def update_part(part: slice, *rest: Any) -> None:
        if part.start < optimizer.parameters.decayed_size:
            right(part, *rest)

    optimizer._update_part = update_part


def into_a_copy(optimizer: Any) -> None:
    optimizer.parameters = replace(optimizer.parameters, buffer=optimizer.parameters.buffer.clone())


def rate_forgotten(optimizer: Any) -> None:
    right = optimizer.step
    optimizer.step = lambda loss, rate, norm: right(loss, 3.0, norm)


def first_batch_for_ever(network: Network) -> None:
    """A cache that is never replaced: the loss is that of the current batch, the gradients are those of the first
    one."""
    right, kept = network.loss_and_gradients, []

    def loss_and_gradients(batch: Batch, **named: Any) -> Tensor:
        kept.append((batch, named))
        before = {name: gradient.clone() for name, gradient in network.gradients.items()}
        loss = right(batch, **named)
        for name, gradient in network.gradients.items():
            gradient.copy_(before[name])
        right(kept[0][0], **kept[0][1])
        return loss

    network.loss_and_gradients = loss_and_gradients  # type: ignore[method-assign]


FAULTS: list[tuple[str, Plant, int, tuple[str, ...]]] = [
    ("labels not shifted", with_batches(unshifted), 1, ()),
    ("labels not shifted, padded", with_batches(unshifted), 1, PADDED),
    ("labels shifted twice", with_batches(shifted_twice), 1, ()),
    ("initial embedding too large", with_network(large_embedding), 2, ()),
    ("a gradient never computed", with_gradients(never_computed), 3, ()),
    ("a gradient not finite", with_gradients(not_finite), 3, ()),
    ("a gradient far too large", with_gradients(far_too_large), 3, ()),
    ("gains and biases never updated", with_optimizer(gains_and_biases_forgotten), 4, ()),
    ("a copy updated", with_optimizer(into_a_copy), 4, ()),
    ("the rate forgotten", with_optimizer(rate_forgotten), 4, ()),
    ("gradients uphill", with_gradients(uphill), 5, ()),
    ("gradients anywhere", with_gradients(anywhere), 5, ()),
    ("a cache never renewed", with_network(first_batch_for_ever), 6, ()),
    ("not shuffled", with_order(in_order), 7, ()),
    ("drawn with replacement", with_order(with_replacement), 7, ()),
    ("every epoch the same", with_order(the_same_each_epoch), 7, ()),
    ("another batch each time", with_order(another_each_time), 7, PADDED),
    ("padding counts", with_batches(padding_counts), 7, PADDED),
    ("padding counts, in the sum too", with_batches(padding_counts, counted=True), 7, PADDED),
    ("text does not count", with_batches(text_does_not_count, counted=True), 7, ()),
    ("documents not kept apart", with_batches(lambda batch: replace(batch, segments=None)), 7, APART),
    ("documents parted one too late", with_batches(segments_late), 7, APART),
    ("rows numbered from 0 in each batch", with_batches(lambda batch: replace(batch, first_row=0)), 7, ()),
    ("rows lost", with_batches(lambda batch: Batch(batch.tokens[1:], batch.targets[1:]), counted=True), 7, ()),
]


@pytest.mark.parametrize(("plant", "check", "overrides"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_planted_fault_fails_its_own_check(
    sentences: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Plant,
    check: int,
    overrides: tuple[str, ...],
) -> None:
    plant(monkeypatch)
    findings = list(diagnosis_of(sentences, cache, *overrides).findings())
    found = statuses(findings)
    assert {one for one, status in found.items() if status == FAILED} == {check}, findings
    assert all(check in CAUSES[one] for one, status in found.items() if status == FOLLOWS), findings


def test_a_text_longer_than_what_is_looked_at(sentences: Path, cache: Path) -> None:
    corpus: Corpus = diagnosis_of(sentences, cache).task.corpus
    part = beginning(corpus, 1000, 8)
    assert 900 < len(part.train) <= 1000
    assert part.train_offsets[-1] == len(part.train)
    one = replace(corpus, train_offsets=np.array([0, len(corpus.train)]))
    assert len(beginning(one, 1000, 8).train) == 1000
    assert beginning(corpus, 10**9, 8) is corpus


# The learning rate


def test_range_test_picks_below_the_lowest_loss(tmp_path: Path) -> None:
    def bowl(_: int, rate: float) -> float:
        return 5 + math.log10(rate / 1e-2) ** 2 / 3

    test = range_test("adamw", bowl)
    assert test.picked == pytest.approx(5e-3, rel=0.3)
    assert test.suits(3e-3)
    assert not test.suits(1e-4)
    assert "TOO LOW" in test.about(1e-4)
    assert "TOO HIGH" in test.about(1.0)
    draw_range_test(test, 3e-3, tmp_path / "folder" / "curve.png", "$ a name")
    assert (tmp_path / "folder" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("loss", [lambda number: 5.0, lambda number: 5.0 + number, lambda number: math.nan])
def test_no_rate_helps(loss: Callable[[int], float], tmp_path: Path) -> None:
    test: RangeTest = range_test("sgd", lambda number, rate: loss(number))
    assert test.picked is None
    assert "at no rate" in test.about(0.1)
    draw_range_test(test, 0.1, tmp_path / "curve.png", "flat")


# The command


def test_the_command(sentences: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny = ("model=tiny", "model.d_model=16", "model.n_heads=2", "model.d_ffn=24", "model.max_seq_len=8")
    given = (*tiny, "dataset=jsonl", f"dataset.path={sentences}", "tokenizer=byte", "device.threads=1")
    assert main([*given, "optimizer.learning_rate=3e-2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("passed  ") == 7
    assert "ok: all 7 checks passed" in shown
    picture = Path(shown.partition("its curve: ")[2].partition("\n")[0])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"datasets", "diagnose"}
    assert main([*given, "optimizer.learning_rate=100"]) == 1
    shown = capsys.readouterr().out
    assert "TOO HIGH" in shown
    assert "FAILED: 4 (every parameter changes, by a sane ratio)" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=tny"], "tiny"),
        (["--plann"], "there is no such option"),
        (["seed=1,2"], "several values"),
        (["resume=last"], "resume"),
        (["model=tiny", "dataset=text", "dataset.path=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_input(arguments: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        main(arguments)
    assert str(caught.value).count("\n") <= 2
    assert not list((tmp_path / "outputs").glob("diagnose/*"))


def test_help_is_a_page(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path, module="manual_backprop.diagnose")
    assert done.returncode == 0
    assert all(f"\n  {check}  " in done.stdout for check in range(1, 8))
    assert "Exit codes" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_one_run_is_described() -> None:
    assert config_described(["model=tiny", "tracking=none"]).model.d_model == 64
