"""The wrapper of a language model, for both architectures.

test_gradients.py proves the gradients; here is what the interface promises.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from manual_backprop import CustomTransformerConfig, CustomTransformerWrapper, TorchTransformer
from manual_backprop.checkpoints.checkpoint import CheckpointManager
from manual_backprop.common.batch import Batch
from manual_backprop.common.errors import CheckpointError, ConfigError, InputError, NotFiniteError
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.implementations import IMPLEMENTATIONS
from manual_backprop.models.recorder import Recorder
from manual_backprop.models.wrappers.language_model import LanguageModel

SIZES: dict[str, Any] = {"vocab_size": 19, "d_model": 12, "n_blocks": 2, "n_heads": 3, "d_ffn": 20, "max_seq_len": 10}
ARCHITECTURES = ("gpt2", "vaswani", "llama")


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def wrapper(architecture: str = "gpt2", **changes: Any) -> CustomTransformerWrapper:
    return CustomTransformerWrapper(**(SIZES | {"architecture": architecture} | changes))


def lively(model: LanguageModel) -> LanguageModel:
    """Larger random parameters: at the initial scale every prediction of gpt2 is nearly uniform."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.network.parameters.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator).mul_(0.4).to(parameter.dtype))
    return model


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def snapshot(model: LanguageModel) -> tuple[Tensor, Tensor, int]:
    return model.network.flat_parameters.buffer.clone(), model.network.flat_gradients.buffer.clone(), model.step


def assert_unchanged(model: LanguageModel, before: tuple[Tensor, Tensor, int]) -> None:
    parameters, gradients, step = snapshot(model)
    assert torch.equal(parameters, before[0])
    assert torch.equal(gradients, before[1])
    assert step == before[2]


# Forward


def test_forward_pass(architecture: str) -> None:
    model = wrapper(architecture)
    output = model.forward(random_ids(3, 7))
    assert output["logits"].shape == (3, 7, 19)
    assert output["logits"].dtype == torch.float32
    assert output["logits"].isfinite().all()
    assert output["loss"] is None
    assert torch.equal(model(random_ids(3, 7))["logits"], output["logits"])


def test_forward_with_labels(architecture: str) -> None:
    """The loss is that of transformers: logits at t predict the label at t + 1; the mean over labels that are not
    -100."""
    model = lively(wrapper(architecture, precision="fp64"))
    input_ids, labels = random_ids(3, 7), random_ids(3, 7, seed=1)
    labels[0, :4] = -100
    labels[2, 6] = -100
    output = model.forward(input_ids, labels=labels)
    want = F.cross_entropy(output["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert output["loss"].item() == pytest.approx(want.item(), rel=1e-13)


def test_first_label_never_counts(architecture: str) -> None:
    model, ids = wrapper(architecture), random_ids(2, 6)
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 19
    assert torch.equal(model.forward(ids, labels=ids)["loss"], model.forward(ids, labels=changed)["loss"])


def test_all_labels_ignored(architecture: str) -> None:
    model, ids = wrapper(architecture), random_ids(2, 6)
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 3  # the first label has no logits before it
    assert model.forward(ids, labels=labels)["loss"].item() == 0
    before = model.network.export_parameters()
    assert model.train_step(ids, labels, learning_rate=1.0) == {"loss": 0.0, "grad_norm": 0.0, "status": "success"}
    assert all(torch.equal(before[name], value) for name, value in model.network.parameters.items())
    assert model.forward(ids[:, :1], labels=ids[:, :1])["loss"].item() == 0


def test_labels_are_not_changed(architecture: str) -> None:
    model, ids = wrapper(architecture), random_ids(2, 6)
    labels = ids.clone()
    model.forward(ids, labels=labels)
    model.train_step(ids, labels, learning_rate=0.1)
    assert torch.equal(ids, random_ids(2, 6))
    assert torch.equal(labels, ids)


def test_int32_ids_and_labels(architecture: str) -> None:
    model, ids = wrapper(architecture), random_ids(2, 6)
    narrow = model.forward(ids.int(), labels=ids.int())
    assert torch.equal(narrow["loss"], model.forward(ids, labels=ids)["loss"])
    assert model.train_step(ids.int(), ids.int(), 0.1)["status"] == "success"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(architecture: str, side: str) -> None:
    """Real tokens' logits do not depend on what stands in the padding, and are those of the text without padding."""
    model = lively(wrapper(architecture, precision="fp64"))
    real = slice(3, 8) if side == "left" else slice(0, 5)
    ids, mask = random_ids(2, 8), torch.zeros(2, 8, dtype=torch.long)
    mask[0, real] = 1
    mask[1] = 1
    with_padding = model.forward(ids, attention_mask=mask)["logits"]
    other = torch.where(mask == 1, ids, (ids + 5) % 19)
    assert torch.equal(model.forward(other, attention_mask=mask)["logits"][0, real], with_padding[0, real])
    assert torch.equal(model.forward(ids, attention_mask=mask.bool())["logits"], with_padding)
    torch.testing.assert_close(with_padding[1:], model.forward(ids[1:])["logits"], rtol=1e-12, atol=1e-12)

    if side == "left":  # padding moves the real tokens to later positions: take the positions out
        if architecture == "gpt2":
            model.network.parameters["position_embedding.weight"].zero_()
        else:
            model.network.position_table.zero_()
        with_padding = model.forward(ids, attention_mask=mask)["logits"]
    alone = model.forward(ids[:1, real])["logits"]
    torch.testing.assert_close(with_padding[:1, real], alone, rtol=1e-12, atol=1e-12)


def test_padding_leaves_no_gradient(architecture: str) -> None:
    """A step on padded text with -100 in the padding is the step on the text alone."""
    steps = []
    for padding in (0, 3):
        model = lively(wrapper(architecture, precision="fp64"))
        ids = F.pad(random_ids(2, 6), (0, padding), value=4)
        labels, mask = F.pad(random_ids(2, 6), (0, padding), value=-100), F.pad(torch.ones(2, 6), (0, padding))
        result = model.train_step(ids, labels, learning_rate=0.5, attention_mask=mask.long())
        steps.append((result["loss"], result["grad_norm"], model.network.flat_parameters.buffer.clone()))
    assert steps[0][:2] == pytest.approx(steps[1][:2], rel=1e-12)
    torch.testing.assert_close(steps[0][2], steps[1][2], rtol=1e-12, atol=1e-12)


# Training


def test_train_step(architecture: str) -> None:
    """Clipped gradient descent gives the same as autograd and three lines of PyTorch."""
    model = lively(wrapper(architecture, precision="fp64"))
    ids, before = random_ids(3, 8), model.network.export_parameters()
    mirror = TorchTransformer(model.config)
    mirror.load_parameters(before)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    loss = mirror.loss_and_gradients(Batch(ids, targets), denominator=21, step=None)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in mirror.gradients.values()))
    assert norm > 1

    result = model.train_step(ids, labels=ids, learning_rate=0.3, max_grad_norm=1.0)

    assert result["status"] == "success"
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert result["grad_norm"] == pytest.approx(norm, rel=1e-12)
    assert all(type(result[name]) is float for name in ("loss", "grad_norm"))
    for name, parameter in model.network.parameters.items():
        want = before[name] - 0.3 * mirror.gradients[name] / norm
        torch.testing.assert_close(parameter, want, rtol=1e-11, atol=1e-13, msg=name)


def test_clipping_begins_at_its_limit() -> None:
    """A gradient just below max_grad_norm is left alone, one just above it is scaled to it; None never scales."""
    ids = random_ids(3, 8)
    norm = lively(wrapper(precision="fp64")).train_step(ids, ids, learning_rate=0.0)["grad_norm"]
    for limit, length in ((None, norm), (1.01 * norm, norm), (0.99 * norm, 0.99 * norm), (0.01, 0.01)):
        model = lively(wrapper(precision="fp64"))
        before = model.network.flat_parameters.buffer.clone()
        result = model.train_step(ids, ids, learning_rate=1.0, max_grad_norm=limit)
        assert result["grad_norm"] == pytest.approx(norm, rel=1e-12)  # before clipping
        moved = torch.linalg.vector_norm(before - model.network.flat_parameters.buffer).item()
        assert moved == pytest.approx(length, rel=1e-9)


def test_any_network_is_a_language_model(architecture: str) -> None:
    config = CustomTransformerConfig(**SIZES, architecture=architecture, precision="fp64", dropout=0.2)
    models = [LanguageModel(network(config)) for network in (CustomTransformer, TorchTransformer)]
    ids = random_ids(2, 9)
    for _ in range(3):
        by_hand, by_autograd = (model.train_step(ids, ids, learning_rate=0.1) for model in models)
        assert by_hand["status"] == by_autograd["status"] == "success"
        assert by_hand["loss"] == pytest.approx(by_autograd["loss"], rel=1e-12)
        assert by_hand["grad_norm"] == pytest.approx(by_autograd["grad_norm"], rel=1e-12)
    drawn = [model.generate(ids, max_length=5, seed=1) for model in models]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
def test_loss_decreases_on_fixed_batch(architecture: str, precision: str) -> None:
    model = wrapper(architecture, d_model=32, n_heads=4, d_ffn=64, precision=precision)
    ids = random_ids(4, 10)
    losses = [model.train_step(ids, labels=ids, learning_rate=0.5)["loss"] for _ in range(50)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "bf16_mixed"])
def test_no_nan_gradients(architecture: str, precision: str) -> None:
    model, ids = wrapper(architecture, precision=precision, dropout=0.1), random_ids(4, 10)
    for _ in range(5):
        model.train_step(ids, labels=ids, learning_rate=0.1)
        for name, gradient in model.network.gradients.items():
            assert gradient.isfinite().all(), name
            # a key bias shifts all scores of a query alike, which softmax does not see
            assert gradient.any() or name.endswith("key.bias"), name


def test_dropout_only_in_training(architecture: str) -> None:
    with_dropout, without = wrapper(architecture, dropout=0.5), wrapper(architecture)
    ids = random_ids(2, 6)
    assert torch.equal(with_dropout.forward(ids)["logits"], without.forward(ids)["logits"])
    assert with_dropout.train_step(ids, ids, 0.0)["loss"] != without.train_step(ids, ids, 0.0)["loss"]
    losses = {with_dropout.train_step(ids, ids, 0.0)["loss"] for _ in range(3)}
    assert len(losses) == 3  # other masks in each step


def planted(model: CustomTransformerWrapper) -> None:
    model.network.parameters["blocks.1.feed_forward.hidden.weight"][0, 0] = math.inf


def diverged(model: CustomTransformerWrapper) -> None:
    result = model.train_step(random_ids(2, 6), random_ids(2, 6), learning_rate=1e30, max_grad_norm=None)
    assert result["status"] == "success"  # this step was finite; the next one will not be


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
@pytest.mark.parametrize("cause", [planted, diverged])
def test_non_finite_step_is_skipped(architecture: str, precision: str, cause: Callable[..., None]) -> None:
    model, ids = wrapper(architecture, precision=precision), random_ids(2, 6)
    cause(model)
    before = model.network.export_parameters()
    result = model.train_step(ids, ids, learning_rate=0.1)
    assert result["status"] == "skipped"
    assert not math.isfinite(result["loss"]) or not math.isfinite(result["grad_norm"])
    for name, parameter in model.network.parameters.items():
        assert torch.equal(parameter, before[name]), name


def test_a_skipped_step_costs_no_healthy_one(architecture: str) -> None:
    model, untouched, ids = wrapper(architecture), wrapper(architecture), random_ids(2, 6)
    name = "blocks.0.attention_norm.weight"
    healthy = model.network.parameters[name].clone()
    model.network.parameters[name][0] = math.nan
    assert model.train_step(ids, ids, 0.1)["status"] == "skipped"
    model.network.parameters[name].copy_(healthy)
    results = [each.train_step(ids, ids, 0.1) for each in (model, untouched)]
    assert results[0] == results[1]
    assert torch.equal(model.network.flat_parameters.buffer, untouched.network.flat_parameters.buffer)


# No autograd anywhere


class NothingRequiresGrad(TorchFunctionMode):
    """Checks every tensor that any torch function returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.seen += 1
                assert not value.requires_grad, function
                assert value.grad_fn is None, function
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_nothing_by_hand_requires_grad(architecture: str, precision: str) -> None:
    with torch.enable_grad(), NothingRequiresGrad() as mode:
        model, ids = wrapper(architecture, precision=precision, dropout=0.1), random_ids(2, 6)
        network = model.network
        network.recorder = Recorder()
        made = [model.forward(ids, labels=ids)["logits"], model.forward(ids, labels=ids)["loss"]]
        model.train_step(ids, labels=ids, learning_rate=0.1)
        made += [network.loss_and_gradients(Batch(ids, ids), denominator=12, step=1), network.forward(ids)]
        network.backward(torch.ones_like(made[-1]))
        network.update_parameters(0.1)
        made += [model.generate(ids, max_length=3), *network.recorder.tensors.values()]
        made += [*network.parameters.values(), *network.gradients.values(), *network.export_parameters().values()]
    assert mode.seen > 500
    assert len(network.recorder.tensors) > 30
    for tensor in made:
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
        assert tensor.grad is None


def test_the_check_for_autograd_sees_autograd(architecture: str) -> None:
    mirror = TorchTransformer(wrapper(architecture).config)
    with pytest.raises(AssertionError, match="requires_grad"), NothingRequiresGrad():
        mirror.forward(random_ids(2, 6))


# Configuration


def test_defaults() -> None:
    config = CustomTransformerConfig()
    names = ("vocab_size", "d_model", "n_blocks", "n_heads", "d_ffn", "max_seq_len")
    assert tuple(getattr(config, name) for name in names) == (128, 128, 8, 4, 128, 128)
    model = CustomTransformerWrapper()
    assert tuple(getattr(model.config, name) for name in names) == (50257, 256, 4, 4, 512, 256)


def test_config_answers() -> None:
    config = CustomTransformerConfig(precision="bf16", device="cpu")
    assert config.get("d_model") == 128
    assert config.get("no_such_key", 5) == 5
    assert config.get("no_such_key") is None
    assert config.get_device() == torch.device("cpu")
    dtypes = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "bf16_mixed": torch.float32}
    for precision, dtype in dtypes.items():
        model = wrapper(precision=precision)
        assert model.config.get_dtype() == dtype
        assert {parameter.dtype for parameter in model.network.parameters.values()} == {dtype}


def test_config_object_or_keywords(architecture: str) -> None:
    config = CustomTransformerConfig(**SIZES, architecture=architecture)
    by_object, by_keywords = CustomTransformerWrapper(config), wrapper(architecture)
    assert by_object.config == by_keywords.config
    assert torch.equal(by_object.network.flat_parameters.buffer, by_keywords.network.flat_parameters.buffer)


def test_a_config_may_be_a_mapping(architecture: str) -> None:
    """The config, every network and the wrapper accept any kind of mapping, with the same result as keywords."""
    sizes = SIZES | {"architecture": architecture}
    config = CustomTransformerConfig(**sizes)
    read_only = MappingProxyType(sizes)
    assert CustomTransformerConfig(sizes) == CustomTransformerConfig(read_only) == config
    assert replace(CustomTransformerConfig(sizes), seed=1) == replace(config, seed=1)
    for network in IMPLEMENTATIONS.values():
        assert network(read_only).config == config
    assert CustomTransformerWrapper(sizes).config == config
    assert CustomTransformer({"d_model": 64, "vocab_size": 9}).config == CustomTransformerConfig(9, 64)


@pytest.mark.parametrize("make", [CustomTransformerConfig, CustomTransformer, CustomTransformerWrapper])
def test_a_mapping_with_unknown_keys_is_refused_with_the_nearest_names(make: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        make({"d_modle": 64, "n_layer": 2, "wings": 2, 3: 4, "d_ffn": 8})
    assert refused.value.violations[:2] == [
        "d_modle: a network has no such key; did you mean d_model?",
        "n_layer: a network has no such key; did you mean n_blocks?",
    ]
    assert [words.partition(":")[0] for words in refused.value.violations[2:]] == ["wings", "3"]
    with pytest.raises(ConfigError, match="wings: a network has no such key; it has vocab_size, d_model"):
        make({"wings": 2})


def test_a_mapping_has_everything_in_it() -> None:
    with pytest.raises(ConfigError, match="n_blocks, seed: given together with a mapping"):
        CustomTransformerConfig({"d_model": 64}, n_blocks=2, seed=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="n_blocks: given together with a config"):
        CustomTransformerWrapper({"d_model": 64}, n_blocks=2)
    with pytest.raises(ConfigError, match="d_model='wide': must be a whole number"):
        CustomTransformer({"d_model": "wide"})
    with pytest.raises(ConfigError, match="5: expected a CustomTransformerConfig, or a mapping"):
        CustomTransformer(5)  # type: ignore[arg-type]


def test_config_object_and_keywords() -> None:
    """Neither may be ignored in silence."""
    for extra in ({"d_model": 24}, {"precision": "bf16"}):
        with pytest.raises(ConfigError, match=next(iter(extra))):
            CustomTransformerWrapper(CustomTransformerConfig(**SIZES), **extra)


def test_get_model_info(architecture: str) -> None:
    model = wrapper(architecture)
    info = model.get_model_info()
    assert info["model_type"] == "custom_transformer"
    assert {name: info[name] for name in SIZES} == SIZES
    assert info["architecture"] == architecture
    d, f, v = 12, 20, 19
    block = 4 * (d * d + d) + 2 * 2 * d + 2 * d * f + f + d
    want = 2 * block + (v * d + 10 * d + 2 * d if architecture == "gpt2" else 2 * v * d)
    if architecture == "llama":
        want = 2 * (4 * d * d + 2 * d + 3 * d * f) + d + 2 * v * d
    assert info["parameters"] == model.count_parameters() == want
    json.dumps(info)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": 13}, "d_model=13: must be divisible by n_heads=3.*d_model=12 or 15"),
        ({"n_blocks": 0}, "n_blocks=0: must be a whole number of at least 1"),
        ({"vocab_size": 2.5}, "vocab_size=2.5"),
        ({"dropout": 1.0}, "dropout=1.0: must be a probability"),
        ({"architecture": "bert"}, "architecture='bert': must be one of gpt2, vaswani"),
        ({"precision": "fp16"}, "precision='fp16': must be one of"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"n_layers": 2}, "n_layers: a network has no such key; did you mean n_blocks"),
    ],
)
def test_config_that_no_network_has(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        wrapper(**changes)


# What cannot be read


def ids_with(value: int) -> Tensor:
    ids = random_ids(2, 6)
    ids[1, 2] = value
    return ids


GOOD = random_ids(2, 6)
BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "id outside": ({"input_ids": ids_with(19)}, r"token id 19 at \(1, 2\) is outside the vocabulary of 19"),
    "negative id": ({"input_ids": ids_with(-1)}, r"token id -1 at \(1, 2\)"),
    "-100 among the ids": ({"input_ids": ids_with(-100)}, r"token id -100 at \(1, 2\)"),
    "label outside": ({"labels": ids_with(19)}, r"label 19 at \(1, 2\)"),
    "negative label": ({"labels": ids_with(-1)}, "label -1 at .*or -100 for one that does not count"),
    "too long": (
        {"input_ids": random_ids(2, 11), "labels": random_ids(2, 11)},
        "11 tokens, but max_seq_len is 10: shorten it",
    ),
    "float ids": ({"input_ids": GOOD.float()}, "tokens are torch.float32; expected whole numbers"),
    "bool ids": ({"input_ids": GOOD.bool()}, "tokens are torch.bool; expected whole numbers"),
    "float labels": ({"labels": GOOD.float()}, "labels are torch.float32; expected whole numbers"),
    "one row without batch": ({"input_ids": GOOD[0], "labels": GOOD[0]}, r"shape \(6,\); expected \(batch, sequence\)"),
    "three dimensions": ({"input_ids": GOOD[None], "labels": GOOD[None]}, r"shape \(1, 2, 6\); expected \(batch"),
    "empty": ({"input_ids": GOOD[:, :0], "labels": GOOD[:, :0]}, r"shape \(2, 0\)"),
    "no rows": ({"input_ids": GOOD[:0], "labels": GOOD[:0]}, r"shape \(0, 6\)"),
    "short labels": ({"labels": GOOD[:, :5]}, r"labels has shape \(2, 5\); expected that of input_ids, \(2, 6\)"),
    "short mask": ({"attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\)"),
    "learning rate is not a number": ({"learning_rate": math.nan}, "learning_rate=nan"),
    "infinite learning rate": ({"learning_rate": math.inf}, "learning_rate=inf"),
    "negative learning rate": ({"learning_rate": -0.1}, "learning_rate=-0.1"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_changes_nothing(architecture: str, case: str) -> None:
    model = wrapper(architecture)
    model.train_step(GOOD, GOOD, learning_rate=0.1)  # leaves gradients that a failing call could disturb
    before = snapshot(model)
    arguments, words = BAD_INPUTS[case]
    with pytest.raises(InputError, match=words):
        model.train_step(**({"input_ids": GOOD, "labels": GOOD, "learning_rate": 0.1} | arguments))
    assert_unchanged(model, before)
    if "learning_rate" not in arguments:
        with pytest.raises(InputError, match=words):
            model.forward(**({"input_ids": GOOD, "labels": GOOD} | arguments))
        assert_unchanged(model, before)


@pytest.mark.parametrize("network", [CustomTransformer, TorchTransformer])
def test_bad_batch_changes_nothing(architecture: str, network: Any) -> None:
    model = LanguageModel(network(CustomTransformerConfig(**SIZES, architecture=architecture)))
    model.train_step(GOOD, GOOD, learning_rate=0.1)
    before = snapshot(model)
    for tokens, targets, words in (
        (ids_with(19), GOOD, "token id 19"),
        (GOOD, ids_with(-1), "target -1"),
        (random_ids(1, 11), random_ids(1, 11), "sequence has 11 tokens"),
    ):
        with pytest.raises(InputError, match=words):
            model.network.loss_and_gradients(Batch(tokens, targets), denominator=12, step=1)
    with pytest.raises(InputError, match="backward needs the forward it belongs to"):
        model.network.backward(torch.zeros(2, 6, 19))
    assert_unchanged(model, before)


# Checkpoints


def test_checkpoint_round_trip(architecture: str, tmp_path: Path) -> None:
    """A model from a checkpoint is the same model: the same logits, and the same steps from there on."""
    ids = random_ids(3, 9)
    model = wrapper(architecture, dropout=0.2)
    for _ in range(3):
        model.train_step(ids, ids, learning_rate=0.3)
    path = model.save_checkpoint(tmp_path)
    assert path.name == "step-000003"

    other = wrapper(architecture, dropout=0.2, seed=0)
    lively(other)
    other.load_checkpoint(tmp_path)
    copies = [other, CustomTransformerWrapper.from_checkpoint(path), CustomTransformerWrapper.from_checkpoint(tmp_path)]
    for copy in copies:
        assert torch.equal(copy.network.flat_parameters.buffer, model.network.flat_parameters.buffer)
        assert torch.equal(copy.forward(ids)["logits"], model.forward(ids)["logits"])
    after = model.train_step(ids, ids, learning_rate=0.3)
    for copy in copies:
        assert copy.train_step(ids, ids, learning_rate=0.3) == after
        assert torch.equal(copy.network.flat_parameters.buffer, model.network.flat_parameters.buffer)


@pytest.mark.parametrize("precision", ["fp64", "bf16", "bf16_mixed"])
def test_checkpoint_keeps_every_bit(architecture: str, precision: str, tmp_path: Path) -> None:
    model = lively(wrapper(architecture, precision=precision))
    model.save_checkpoint(tmp_path)
    copy = CustomTransformerWrapper.from_checkpoint(tmp_path)
    assert copy.config.precision == precision
    for name, parameter in model.network.parameters.items():
        assert torch.equal(copy.network.parameters[name], parameter), name


def test_from_checkpoint_in_another_precision(architecture: str, tmp_path: Path) -> None:
    model = lively(wrapper(architecture, precision="fp32"))
    model.save_checkpoint(tmp_path)
    wide = CustomTransformerWrapper.from_checkpoint(tmp_path, precision="fp64", device="cpu")
    narrow = CustomTransformerWrapper.from_checkpoint(tmp_path, precision="bf16", device="cpu")
    for name, parameter in model.network.parameters.items():
        assert torch.equal(wide.network.parameters[name], parameter.double())
        assert torch.equal(narrow.network.parameters[name], parameter.bfloat16())
    logits = wide.forward(random_ids(2, 6))["logits"]
    assert logits.dtype == torch.float64
    torch.testing.assert_close(model.forward(random_ids(2, 6))["logits"].double(), logits, rtol=1e-4, atol=1e-4)


def test_damaged_checkpoint_changes_nothing(architecture: str, tmp_path: Path) -> None:
    model = wrapper(architecture)
    path = lively(wrapper(architecture)).save_checkpoint(tmp_path)
    file = path / "parameters.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"parameters.safetensors is damaged"):
        model.load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"parameters.safetensors is damaged"):
        CustomTransformerWrapper.from_checkpoint(path)
    assert_unchanged(model, before)


def test_foreign_checkpoint_changes_nothing(architecture: str, tmp_path: Path) -> None:
    model = wrapper(architecture)
    before = snapshot(model)
    other_architecture = next(name for name in ARCHITECTURES if name != architecture)
    for number, (changes, words) in enumerate(
        (
            ({"d_model": 18}, "d_model is 18 there and 12 here"),
            ({"vocab_size": 20}, "vocab_size is 20 there and 19 here"),
            ({"architecture": other_architecture}, f"architecture is {other_architecture} there"),
            ({"n_kv_heads": 1} if architecture == "llama" else {"activation": "gelu"}, "is (gelu|1) there"),
            ({"norm_epsilon": 0.02}, r"norm_epsilon is 0.02 there and 1e-0[56] here"),
            *([({"rotary_base": 500.0}, r"rotary_base is 500.0 there and 10000.0 here")] * (architecture == "llama")),
        )
    ):
        wrapper(**({"architecture": architecture} | changes)).save_checkpoint(tmp_path / str(number))
        with pytest.raises(CheckpointError, match=words):
            model.load_checkpoint(tmp_path / str(number))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        model.load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        model.load_checkpoint(tmp_path / "step-000007")
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "holds no network"),
        ({"network": [1]}, "holds no network"),
        ({"network": {"d_model": 12, "wings": 2}}, "written by another version.*wings"),
        ({"network": SIZES | {"d_model": 13}}, "describes no network that can be built: d_model=13"),
        ({"network": SIZES | {"d_model": "12"}}, "describes no network that can be built: d_model='12'"),
        ({"network": SIZES | {"n_blocks": 3}}, "blocks.2"),
    ],
)
def test_checkpoint_of_something_else(state: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Intact by its manifest, but not usable for a model."""
    model = wrapper()
    CheckpointManager(tmp_path).save(1, {"parameters": model.network.parameters}, state)
    with pytest.raises(InputError, match=words):
        CustomTransformerWrapper.from_checkpoint(tmp_path)


def test_activation_by_name_or_by_architecture_is_the_same(tmp_path: Path) -> None:
    """A run's config names the activation; a wrapper leaves it to the architecture."""
    path = lively(wrapper(activation="gelu_tanh")).save_checkpoint(tmp_path)
    model = wrapper()
    model.load_checkpoint(path)
    assert torch.equal(
        model.network.flat_parameters.buffer, lively(wrapper(activation="gelu_tanh")).network.flat_parameters.buffer
    )


def test_checkpoint_can_move(tmp_path: Path) -> None:
    path = wrapper().save_checkpoint(tmp_path / "here")
    shutil.copytree(path, tmp_path / "there" / path.name)
    shutil.rmtree(tmp_path / "here")
    assert (
        CustomTransformerWrapper.from_checkpoint(tmp_path / "there").count_parameters() == wrapper().count_parameters()
    )


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_weights_move_both_ways(architecture: str, precision: str) -> None:
    """CustomTransformer -> TorchTransformer -> CustomTransformer keeps every bit, and neither shares memory."""
    config = CustomTransformerConfig(**SIZES, architecture=architecture, precision=precision)
    first, mirror, second = CustomTransformer(config), TorchTransformer(config), CustomTransformer(config)
    lively(LanguageModel(first))
    second.flat_parameters.buffer.fill_(1)
    mirror.load_parameters(first.export_parameters())
    second.load_parameters(mirror.export_parameters())
    assert list(first.parameters) == list(mirror.parameters)
    for name, parameter in first.parameters.items():
        assert torch.equal(mirror.parameters[name], parameter), name
        assert torch.equal(second.parameters[name], parameter), name
    ids = random_ids(2, 6)
    assert torch.equal(first.predict(ids), second.predict(ids))
    torch.testing.assert_close(
        first.predict(ids), mirror.predict(ids), **({"rtol": 0.1, "atol": 0.1} if precision == "bf16" else {})
    )
    mirror.flat_parameters.buffer.zero_()
    assert torch.equal(first.predict(ids), second.predict(ids))


def test_foreign_weights_change_nothing(architecture: str) -> None:
    network = wrapper(architecture).network
    before = network.flat_parameters.buffer.clone()
    parameters = lively(wrapper(architecture)).network.export_parameters()
    wrong = {name: value for name, value in parameters.items() if name != "blocks.1.attention.key.weight"}
    with pytest.raises(InputError, match=r"blocks.1.attention.key.weight is missing"):
        network.load_parameters(wrong)
    with pytest.raises(InputError, match="wings is unknown here"):
        network.load_parameters(parameters | {"wings": torch.zeros(1)})
    with pytest.raises(InputError, match=r"has shape \(1, 12\), expected \(19, 12\)"):
        network.load_parameters(parameters | {"token_embedding.weight": torch.zeros(1, 12)})
    assert torch.equal(network.flat_parameters.buffer, before)


# Generation


def greedy_by_hand(model: LanguageModel, ids: Tensor, length: int) -> Tensor:
    """A fresh forward for each token. The window moves on by half when it is full."""
    start = max(0, ids.shape[1] - model.config.max_seq_len)
    for _ in range(length):
        if ids.shape[1] - start > model.config.max_seq_len:
            start += model.config.max_seq_len // 2
        ids = torch.cat((ids, model.forward(ids[:, start:])["logits"][:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


def test_generate_greedy(architecture: str) -> None:
    model, prompt = lively(wrapper(architecture)), random_ids(3, 4)
    drawn = model.generate(prompt, max_length=5, temperature=0)
    assert torch.equal(drawn, greedy_by_hand(model, prompt, 5))
    assert drawn.shape == (3, 9)
    assert drawn.dtype == torch.int64
    assert torch.equal(model.generate(prompt, max_length=5, top_k=1), drawn)
    assert torch.equal(model.generate(prompt, max_length=5, top_p=1e-9), drawn)


def test_generate_past_the_longest_sequence(architecture: str) -> None:
    """The window moves on correctly: the tokens are those of a forward of the window."""
    model, prompt = lively(wrapper(architecture)), random_ids(2, 7)
    assert torch.equal(model.generate(prompt, 15, temperature=0), greedy_by_hand(model, prompt, 15))
    long_prompt = random_ids(2, 23)
    assert torch.equal(model.generate(long_prompt, 4, temperature=0), greedy_by_hand(model, long_prompt, 4))


def test_generate_stops_at_end_token(architecture: str) -> None:
    model, prompt = lively(wrapper(architecture)), random_ids(1, 4)
    free = greedy_by_hand(model, prompt, 8)[0, 4:].tolist()
    end = free[3]
    expected = free[: free.index(end) + 1]
    drawn = model.generate(prompt, max_length=8, temperature=0, eos_token_id=end)
    assert drawn[0, 4:].tolist() == expected
    assert drawn[0, -1] == end


def test_generate_rows_end_at_different_times(architecture: str) -> None:
    model, prompt = lively(wrapper(architecture)), random_ids(16, 4)
    free = greedy_by_hand(model, prompt, 6)[:, 4:]
    end = int(free.flatten().mode().values)
    rows = [row.index(end) if end in row else 6 for row in free.tolist()]
    assert len(set(rows)) > 1
    drawn = model.generate(prompt, max_length=6, temperature=0, eos_token_id=end)[:, 4:]
    assert drawn.shape[1] == min(6, max(rows) + 1)
    for row, stop in enumerate(rows):
        assert drawn[row, :stop].tolist() == free[row, :stop].tolist()
        assert all(token == end for token in drawn[row, stop:].tolist())


def test_generate_seed(architecture: str) -> None:
    model, prompt = lively(wrapper(architecture)), random_ids(2, 4)
    state = torch.random.get_rng_state()
    first = model.generate(prompt, max_length=30, seed=5)
    assert torch.equal(model.generate(prompt, max_length=30, seed=5), first)
    assert not torch.equal(model.generate(prompt, max_length=30, seed=6), first)
    assert not torch.equal(model.generate(prompt, max_length=30), model.generate(prompt, max_length=30))
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's randomness is touched


def test_generate_nothing(architecture: str) -> None:
    prompt = random_ids(2, 4)
    assert torch.equal(wrapper(architecture).generate(prompt, max_length=0), prompt)


def test_stream_is_generate_token_by_token(architecture: str) -> None:
    model, prompt = lively(wrapper(architecture)), random_ids(2, 4)
    pieces = list(model.stream(prompt, max_length=6, seed=3))
    assert [piece.shape for piece in pieces] == [(2, 1)] * 6
    assert torch.equal(torch.cat([prompt, *pieces], dim=1), model.generate(prompt, max_length=6, seed=3))


def test_generate_does_not_disturb_training(architecture: str) -> None:
    model, ids = wrapper(architecture), random_ids(2, 6)
    model.train_step(ids, ids, 0.1)
    before = snapshot(model)
    model.generate(ids, max_length=3)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_length": -1}, "max_length=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"input_ids": GOOD[:, :0]}, r"\(2, 0\); expected \(batch, sequence\) with at least one token"),
        ({"input_ids": GOOD[0]}, r"shape \(6,\)"),
        ({"input_ids": ids_with(19)}, "token id 19"),
        ({"input_ids": ids_with(-1)}, "token id -1"),
        ({"input_ids": GOOD.float()}, "torch.float32; expected whole numbers"),
    ],
)
def test_generate_refuses_at_once(arguments: dict[str, Any], words: str) -> None:
    model = wrapper()
    with pytest.raises(InputError, match=words):
        model.stream(**({"input_ids": GOOD} | arguments))  # not at the first token
    with pytest.raises(InputError, match=words):
        model.generate(**({"input_ids": GOOD} | arguments))


def test_generate_from_diverged_parameters() -> None:
    model = wrapper()
    model.network.parameters["token_embedding.weight"][0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="not finite"):
        model.generate(GOOD, max_length=2)


def test_saving_keeps_what_was_saved_before(tmp_path: Path) -> None:
    model, ids = wrapper(), random_ids(2, 6)
    paths = []
    for _ in range(4):
        model.train_step(ids, labels=ids, learning_rate=0.01)
        paths.append(model.save_checkpoint(tmp_path))
    assert [path.name for path in paths if path.is_dir()] == [f"step-{step:06d}" for step in range(1, 5)]


@pytest.mark.parametrize("changes", [{"n_heads": 1}, {"activation": "relu"}, {"vocab_size": 12}])
def test_from_checkpoint_refuses_another_network(changes: dict[str, Any], tmp_path: Path) -> None:
    path = wrapper().save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"belongs to another network: {next(iter(changes))}"):
        CustomTransformerWrapper.from_checkpoint(path, **changes)


@pytest.mark.parametrize("longest", [0.0, -1.0, math.nan, math.inf])
def test_a_senseless_clip_is_refused(longest: float) -> None:
    model, ids = wrapper(), random_ids(2, 6)
    before = model.network.export_parameters()
    with pytest.raises(InputError, match="max_grad_norm"):
        model.train_step(ids, labels=ids, learning_rate=0.1, max_grad_norm=longest)
    assert all(torch.equal(before[name], value) for name, value in model.network.parameters.items())


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="input_ids is a list"):
        wrapper().forward([[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="labels are None"):
        wrapper().train_step(random_ids(1, 4), None, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a CustomTransformerConfig"):
        CustomTransformerWrapper(1000)  # type: ignore[arg-type]
