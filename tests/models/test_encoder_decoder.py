"""The interface of the encoder-decoder: teacher forcing, decoding, checkpoints; and that of an encoder.

test_gradients.py proves the gradients; here is what the interface promises.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manual_backprop import CustomTransformerConfig, CustomTransformerWrapper, EncoderDecoderWrapper, EncoderWrapper
from manual_backprop.common.batch import PairBatch
from manual_backprop.common.errors import CheckpointError, ConfigError, InputError
from manual_backprop.models.decoding.generation import Drawing, beam_search, one_by_one
from manual_backprop.models.decoding.incremental import IncrementalDecoder
from manual_backprop.models.huggingface.layouts import layout_of
from manual_backprop.models.implementations import IMPLEMENTATIONS
from manual_backprop.trained_models.saved_model import load

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {"vocab_size": 13, "d_model": 24, "n_blocks": 2, "n_heads": 4, "d_ffn": 20, "max_seq_len": 11}
SIZES |= {"n_encoder_blocks": 1, "precision": "fp64"}
CASES = [("gpt2", None), ("vaswani", None), ("llama", 2)]
SOURCES, TARGETS = [[1, 2, 3, 4], [5], [], [3, 3, 0]], [[4, 3, 2, 1], [5, 6, 7, 8, 9, 0], [], [1]]
PADDING, BEGIN, END = 10, 11, 12


def model_of(
    architecture: str = "gpt2", n_kv_heads: int | None = None, implementation: str = "custom", **more: Any
) -> EncoderDecoderWrapper:
    """A model with larger parameters than the initial ones, so that its outputs vary."""
    fields = SIZES | {"architecture": architecture, "n_kv_heads": n_kv_heads} | more
    model = EncoderDecoderWrapper(implementation=implementation, **fields)
    generator = torch.Generator().manual_seed(5)
    model.network.load_parameters(
        {
            name: value + 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in model.network.export_parameters().items()
        }
    )
    return model


class Whole:
    """Decodes without a cache: it reads the whole source and target for every token."""

    def __init__(self, model: EncoderDecoderWrapper, sources: list[list[int]]):
        self.model = model
        batch = model.batch(sources, [[]] * len(sources))
        self.source, self.lengths = batch.source, batch.source_lengths
        self.read_so_far: Tensor | None = None
        self.logits: list[Tensor] = []

    def read(self, tokens: Tensor) -> Tensor:
        self.read_so_far = tokens if self.read_so_far is None else torch.cat((self.read_so_far, tokens), dim=1)
        rows = self.read_so_far
        each = len(rows) // len(self.source)
        source, lengths = (part.repeat_interleave(each, dim=0) for part in (self.source, self.lengths))
        self.logits.append(self.model.network.predict(PairBatch(source, lengths, rows, rows))[:, -1])
        return self.logits[-1]

    def select(self, rows: Tensor) -> None:
        assert self.read_so_far is not None
        self.read_so_far = self.read_so_far[rows]


class Kept(IncrementalDecoder):
    def read(self, tokens: Tensor) -> Tensor:
        self.logits = [*getattr(self, "logits", []), super().read(tokens)]
        return self.logits[-1]


def both(model: EncoderDecoderWrapper, sources: list[list[int]]) -> tuple[Kept, Whole, Tensor]:
    """A decoder with a cache, one without, and the beginning tokens."""
    whole = Whole(model, sources)
    memory = model.network.encode(whole.source, whole.lengths)
    kept = Kept(model.network, len(sources), memory, whole.lengths)
    return kept, whole, torch.full((len(sources), 1), model.bos_token_id)


# Loss


def test_a_target_is_read_behind_its_beginning_and_said_with_its_end() -> None:
    model = model_of()
    assert (model.padding_token_id, model.bos_token_id, model.eos_token_id) == (PADDING, BEGIN, END)
    batch = model.batch([[1, 2, 3], [4]], [[3, 2, 1], [4]])
    assert batch.source.tolist() == [[1, 2, 3], [4, PADDING, PADDING]]
    assert batch.source_lengths.tolist() == [3, 1]
    assert batch.tokens.tolist() == [[BEGIN, 3, 2, 1], [BEGIN, 4, PADDING, PADDING]]
    assert batch.targets.tolist() == [[3, 2, 1, END], [4, END, -100, -100]]
    padded = torch.tensor([[1, 2, 3], [4, 0, 9]]), torch.tensor([[3, 2, 1], [4, 11, 12]])
    lengths = torch.tensor([3, 1])
    same = model.batch(*padded, source_lengths=lengths, target_lengths=lengths)
    for name in ("source", "source_lengths", "tokens", "targets"):
        assert torch.equal(getattr(same, name), getattr(batch, name))


@pytest.mark.parametrize(("architecture", "n_kv_heads"), CASES)
def test_the_loss_is_the_mean_over_tokens_and_ends(architecture: str, n_kv_heads: int | None) -> None:
    model = model_of(architecture, n_kv_heads, label_smoothing=0.1)
    found = model.forward(SOURCES, TARGETS)
    targets = model.batch(SOURCES, TARGETS).targets
    assert found["logits"].shape == (4, 7, 13)
    want = F.cross_entropy(found["logits"].flatten(0, 1), targets.flatten())
    assert found["loss"].item() == pytest.approx(want.item(), rel=1e-13)
    assert torch.equal(model(SOURCES, TARGETS)["loss"], found["loss"])
    for row in range(4):
        alone = model.forward(SOURCES[row : row + 1], TARGETS[row : row + 1])["logits"]
        torch.testing.assert_close(alone[0], found["logits"][row, : alone.shape[1]], rtol=1e-12, atol=1e-12)


def test_training_lowers_the_loss_and_the_model_says_what_it_has_learned() -> None:
    model = EncoderDecoderWrapper(**SIZES | {"precision": "fp32"})
    sources, targets = [[1, 2, 3], [4, 5], [6, 2, 7]], [[3, 2, 1], [5, 4], [7, 2, 6]]
    losses = [model.train_step(sources, targets, learning_rate=0.3)["loss"] for _ in range(150)]
    assert losses[-1] < 0.1 * losses[0]
    assert model.step == 150
    want = [[*target, END, *[PADDING] * (3 - len(target))] for target in targets]
    for beams in (1, 3):
        assert model.generate(sources, beams=beams).tolist() == want


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_has_the_same_steps(implementation: str) -> None:
    model, by_hand = model_of(implementation=implementation), model_of()
    for _ in range(3):
        mine, theirs = (one.train_step(SOURCES, TARGETS, 0.1, max_grad_norm=0.5) for one in (model, by_hand))
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-10)
    assert torch.equal(model.generate(SOURCES, beams=2), by_hand.generate(SOURCES, beams=2))
    assert model.count_parameters() == by_hand.count_parameters()


def test_a_step_that_is_not_finite_is_skipped() -> None:
    model = model_of()
    next(iter(model.network.parameters.values())).fill_(math.inf)
    before = model.network.export_parameters()
    assert model.train_step(SOURCES, TARGETS, 0.1)["status"] == "skipped"
    assert all(torch.equal(before[name], value) for name, value in model.network.parameters.items())


# Decoding


@pytest.mark.parametrize(("architecture", "n_kv_heads"), CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kept_keys_and_values_change_nothing(implementation: str, architecture: str, n_kv_heads: int | None) -> None:
    """Logit for logit, greedy and with beams, for sources of different lengths, an empty one among them."""
    model = model_of(architecture, n_kv_heads, implementation)
    kept, whole, begin = both(model, SOURCES)
    drawn = [list(one_by_one(decoder, begin, 11, Drawing(), END, PADDING)) for decoder in (kept, whole)]
    assert torch.equal(torch.cat(drawn[0], 1), torch.cat(drawn[1], 1))
    assert torch.equal(torch.cat(drawn[0], 1), model.generate(SOURCES))
    assert len(torch.cat(drawn[0]).unique()) > 2, "a model that says the same all the time shows nothing"
    searching = both(model, SOURCES)
    found, want = (beam_search(decoder, begin, 9, 3, 0.6, END) for decoder in searching[:2])
    assert [row.tolist() for row in found] == [row.tolist() for row in want]
    for one, other in ((kept, whole), searching[:2]):
        for got, expected in zip(one.logits, other.logits, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("architecture", "n_kv_heads"), CASES)
def test_a_batch_is_its_rows(architecture: str, n_kv_heads: int | None, beams: int) -> None:
    model = model_of(architecture, n_kv_heads)
    together = model.generate(SOURCES, beams=beams)
    for row, source in enumerate(SOURCES):
        alone = model.generate([source], beams=beams)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
        assert bool((together[row, alone.shape[1] :] == PADDING).all())


def test_one_beam_is_greedy() -> None:
    model = model_of("llama", 2)
    _, whole, begin = both(model, SOURCES)
    greedy = model.generate(SOURCES)
    for row, tokens in zip(greedy.tolist(), beam_search(whole, begin, 11, 1, 2.0, END), strict=True):
        assert row == tokens.tolist() + [PADDING] * (len(row) - len(tokens))


def test_what_is_drawn_depends_on_the_seed() -> None:
    model = model_of()
    first, again, other = (model.generate(SOURCES, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(model.generate(SOURCES, temperature=1.0, top_k=1), model.generate(SOURCES))


@pytest.mark.parametrize("beams", [1, 2])
def test_behind_the_end_there_is_padding(beams: int) -> None:
    model = model_of()
    end = int(model.generate(SOURCES)[0, 1])
    rows = model.generate(SOURCES, beams=beams, eos_token_id=end).tolist()
    ended = [row for row in rows if end in row]
    assert ended
    for row in ended:
        assert set(row[row.index(end) + 1 :]) <= {PADDING}
    assert model.generate(SOURCES, max_new_tokens=0, beams=beams).shape == (4, 0)
    assert model.generate(SOURCES, max_new_tokens=3, beams=beams).shape[1] <= 3


# What cannot be read


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": [1, 2]}, "expected a list of lists of token ids"),
        ({"source": [[1.5]]}, "expected a list of lists of token ids"),
        ({"source": []}, "source is empty"),
        ({"source": ["12"]}, "expected a list of lists"),
        ({"source": [[13], [1], [1], [1]]}, r"source id 13 .* outside the vocabulary of 13"),
        ({"source": [[1]]}, "1 sources and 4 targets"),
        ({"source": torch.ones(4, 3)}, "source has shape .* torch.float32; expected whole numbers"),
        ({"source": torch.ones(4, 3).long(), "source_lengths": torch.tensor([1, 2, 3, 4])}, "whole numbers, 0 to 3"),
        ({"source": torch.ones(4, 3).long(), "source_lengths": torch.tensor([1, 2])}, "expected 4 whole numbers"),
        ({"source_lengths": torch.tensor([1, 2, 3, 4])}, "source_lengths: given together with a list"),
        ({"target": [[BEGIN], [1], [1], [1]]}, "holds 11, which is bos_token_id: give targets without beginning"),
        ({"target": [[1, END], [1], [1], [1]]}, "holds 12, which is eos_token_id"),
        ({"target": [[-1], [1], [1], [1]]}, "target -1"),
        ({"target": [[1] * 11, [1], [1], [1]]}, "12 tokens, but max_seq_len is 11"),
        ({"source": [[1] * 12, [1], [1], [1]]}, "12 tokens"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
    ],
)
def test_bad_input_changes_nothing(arguments: dict[str, Any], words: str) -> None:
    model = model_of()
    before = model.network.export_parameters()
    with pytest.raises(InputError, match=words):
        model.train_step(**({"source": SOURCES, "target": TARGETS, "learning_rate": 0.1} | arguments))
    assert all(torch.equal(before[name], value) for name, value in model.network.parameters.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"beams": 0}, "beams=0"),
        ({"beams": 2, "temperature": 0.5}, "beams=2 with temperature=0.5: beam search does not sample"),
        ({"length_penalty": -0.5}, "length_penalty=-0.5"),
        ({"max_new_tokens": 12}, "max_new_tokens=12: the decoder reads max_seq_len=11 tokens at most"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"eos_token_id": 13}, "token id 13"),
        ({"source": [[13]]}, "source id 13"),
    ],
)
def test_generation_refuses_what_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        model_of().generate(**({"source": SOURCES} | arguments))


def test_a_model_that_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="eos_token_id=13: must be a token id, 0 to 12"):
        EncoderDecoderWrapper(**SIZES, eos_token_id=13)
    with pytest.raises(ConfigError, match="padding_token_id=3, bos_token_id=3, eos_token_id=12: must be different"):
        EncoderDecoderWrapper(**SIZES, padding_token_id=3, bos_token_id=3)
    both = CustomTransformerConfig(**SIZES | {"vocab_size": "many", "padding_token_id": "none"})
    assert [line.partition(":")[0] for line in both.violations()] == ["vocab_size='many'", "padding_token_id='none'"]
    with pytest.raises(ConfigError, match="padding_token_id=-1: must be a token id"):
        EncoderDecoderWrapper(**SIZES | {"vocab_size": 2})
    with pytest.raises(ConfigError, match="d_modle: a network has no such key; did you mean d_model"):
        EncoderDecoderWrapper(d_modle=24)
    with pytest.raises(ConfigError, match="network=decoder: EncoderDecoderWrapper is made of network=encoder_decoder"):
        EncoderDecoderWrapper(CustomTransformerConfig())
    with pytest.raises(ConfigError, match="network=encoder_decoder: CustomTransformer is one of network=decoder"):
        CustomTransformerWrapper(CustomTransformerConfig({"network": "encoder_decoder"}))
    assert EncoderDecoderWrapper(SIZES).config == EncoderDecoderWrapper(**SIZES).config


# Checkpoints, and what it is


def test_a_checkpoint_is_the_model(tmp_path: Path) -> None:
    model = EncoderDecoderWrapper(**SIZES, bos_token_id=0, eos_token_id=9)
    sources, targets = [[1, 2], [3]], [[2, 1], [3]]
    for _ in range(2):
        model.train_step(sources, targets, 0.1)
    path = model.save_checkpoint(tmp_path)
    other = EncoderDecoderWrapper(**SIZES | {"seed": 9})
    other.load_checkpoint(path)
    for copy in (other, EncoderDecoderWrapper.from_checkpoint(tmp_path, device="cpu")):
        assert copy.step == 2
        assert copy.get_model_info() == model.get_model_info()
        assert (copy.bos_token_id, copy.eos_token_id, copy.padding_token_id) == (0, 9, 10)
        assert torch.equal(copy.forward(sources, targets)["logits"], model.forward(sources, targets)["logits"])
    info = model.get_model_info()
    assert info["network"] == "encoder_decoder"
    assert info["parameters"] == model.count_parameters() == sum(p.numel() for p in model.network.parameters.values())
    with pytest.raises(CheckpointError, match="n_encoder_blocks is 1 there and 2 here"):
        EncoderDecoderWrapper(**SIZES | {"n_encoder_blocks": 2}).load_checkpoint(path)
    with pytest.raises(CheckpointError, match="another network: network is encoder_decoder there and decoder here"):
        CustomTransformerWrapper.from_checkpoint(path)
    for changes in ({"d_modle": 4}, {"d_model": "wide"}, {"precision": "half"}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            EncoderDecoderWrapper.from_checkpoint(path, **changes)


@pytest.mark.parametrize("kind", ["encoder_decoder", "encoder"])
def test_a_checkpoint_is_found_by_its_path(kind: str, tmp_path: Path) -> None:
    """As `RUN` of every command, in the wrapper of its kind. transformers has no such network."""
    sizes = {**SIZES, "n_encoder_blocks": None}
    model = (
        EncoderDecoderWrapper(**sizes, bos_token_id=3) if kind != "encoder" else EncoderWrapper(**sizes, n_outputs=3)
    )
    saved = load(str(model.save_checkpoint(tmp_path)), device="cpu")
    assert type(saved.model) is type(model)
    assert saved.model.get_model_info() == model.get_model_info()
    assert f"{model.count_parameters():,} parameters" in saved.line
    with pytest.raises(InputError, match=f"network={kind} cannot be exported"):
        layout_of(saved.model.config)


# An encoder


def test_an_encoder_learns_classes_and_numbers(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 24, "max_seq_len": 6}
    inputs, classes = [[1, 2, 3], [4, 5], [6]], [0, 1, 2]
    model = EncoderWrapper(vocab_size=9, n_outputs=3, **sizes)
    losses = [model.train_step(inputs, classes, 0.3)["loss"] for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    assert model.predict(inputs).argmax(-1).tolist() == classes
    copy = EncoderWrapper.from_checkpoint(model.save_checkpoint(tmp_path), device="cpu")
    assert torch.equal(copy(inputs), model(inputs))
    numbers = EncoderWrapper(n_inputs=2, n_outputs=2, head_loss="squared_error", vocab_size=1, **sizes)
    tables = [torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[1.0, -1.0]])]
    wanted = torch.tensor([[1.0, math.nan], [-1.0, 2.0]])
    losses = [numbers.train_step(tables, wanted, 0.05)["loss"] for _ in range(150)]
    assert losses[-1] < 0.05 * losses[0]
    errors = (numbers.predict(tables) - wanted).abs()
    assert float(errors[~errors.isnan()].max()) < 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"inputs": [[9]]}, "token id 9"),
        ({"targets": [3]}, "class 3"),
        ({"targets": [0, 1]}, r"targets have shape \(2,\)"),
        ({"targets": [0.5]}, "expected whole numbers, a class"),
        ({"lengths": torch.tensor([1])}, "together with a list"),
    ],
)
def test_an_encoder_refuses_what_cannot_be_read(arguments: dict[str, Any], words: str) -> None:
    model = EncoderWrapper(vocab_size=9, n_outputs=3, d_model=16, n_blocks=1, n_heads=2, d_ffn=24, max_seq_len=6)
    with pytest.raises(InputError, match=words):
        model.train_step(**({"inputs": [[1]], "targets": [0], "learning_rate": 0.1} | arguments))
