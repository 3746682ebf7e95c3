"""The layout of parameters: each has one place, those with weight decay first, groups side by side, entries padded."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.network import block_names, packed_names
from manual_backprop.optim.parameters import PADDING, Layout, copy_into, copy_on_cpu

NETWORKS = [
    pytest.param(
        CustomTransformer(
            CustomTransformerConfig(
                vocab_size=13,
                d_model=12,
                n_blocks=3,
                n_heads=2,
                d_ffn=7,
                max_seq_len=5,
                architecture=name,
                precision=precision,
            )
        ),
        id=f"{name}-{precision}",
    )
    for name in ("gpt2", "vaswani", "llama")
    for precision in ("fp64", "bf16", "bf16_mixed")
]


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_has_one_place(network: CustomTransformer) -> None:
    taken = torch.zeros(network.layout.size, dtype=torch.int)
    for name, view in network.parameters.items():
        start = network.layout.offsets[name]
        taken[start : start + view.numel()] += 1
        assert view.storage_offset() == start
        assert view.untyped_storage().data_ptr() == network.flat_parameters.buffer.untyped_storage().data_ptr()
    assert taken.max() == 1
    padding = taken == 0
    assert padding.sum() < PADDING * len(network.parameters)
    assert not network.flat_parameters.buffer[padding].any()


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_have_the_keys_and_places_of_parameters(network: CustomTransformer) -> None:
    assert list(network.gradients) == list(network.parameters)
    for name, gradient in network.gradients.items():
        assert gradient.shape == network.parameters[name].shape
        assert gradient.storage_offset() == network.parameters[name].storage_offset()


@pytest.mark.parametrize("network", NETWORKS)
def test_weight_decay_is_one_slice_with_all_matrices(network: CustomTransformer) -> None:
    decayed = network.flat_parameters.decayed_size
    for name, view in network.parameters.items():
        start, end = view.storage_offset(), view.storage_offset() + view.numel()
        assert end <= decayed if view.dim() >= 2 else start >= decayed, name


@pytest.mark.parametrize("network", NETWORKS)
def test_entries_start_at_multiples_of_64_bytes(network: CustomTransformer) -> None:
    packed = [names for block in block_names(network.config) for names in packed_names(network.config, block).values()]
    followers = {name for names in packed for name in names[1:]}  # without a gap behind the first
    for name, view in network.parameters.items():
        if name not in followers:
            assert view.storage_offset() * view.element_size() % 64 == 0, name


@pytest.mark.parametrize("network", NETWORKS)
def test_what_one_product_serves_is_one_tensor(network: CustomTransformer) -> None:
    for names in packed_names(network.config, "blocks.1").values():
        packed = network.flat_parameters.packed(names)
        assert torch.equal(packed, torch.cat([network.parameters[name] for name in names]))
        assert packed.data_ptr() == network.parameters[names[0]].data_ptr(), "a view, not a copy"


def test_what_does_not_lie_side_by_side_cannot_be_packed() -> None:
    flat = Layout({"a": (2, 3), "b": (4, 3)}).allocate(torch.float32, "cpu")
    with pytest.raises(AssertionError, match="b does not follow"):
        flat.packed(["a", "b"])


def test_views_write_into_the_buffer() -> None:
    flat = Layout({"a": (2, 3), "b": (5,)}).allocate(torch.float32, "cpu")
    flat.views["b"].fill_(2)
    assert float(flat.buffer.sum()) == 10
    assert flat.decayed_size == PADDING
    assert math.prod(flat.buffer.shape) == 2 * PADDING


def test_copying_is_all_or_nothing() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for source, said in (
        ({"a": torch.ones(2)}, "parameter b is missing"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "parameter c is unknown here"),
        ({"a": torch.ones(2), "b": torch.ones(4)}, r"parameter b has shape \(4,\), expected \(3,\)"),
    ):
        with pytest.raises(InputError, match=said):
            copy_into(target, source)
        assert not target["a"].any()
    copy_into(target, {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3)})
    assert target["a"].dtype == torch.float32
    assert float(target["a"].sum() + target["b"].sum()) == 5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_copy_on_the_cpu_is_made_once(device: str) -> None:
    """The GPU tensor is a fake tensor, whose operations are recorded."""

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(str(function))
            return function(*args, **(kwargs or {}))

    operations: list[str] = []
    with FakeTensorMode() if device == "cuda" else nullcontext():
        x = torch.empty(6)[2:4] if device == "cpu" else torch.empty(2, device=device)
        with Operations():
            copied = copy_on_cpu(x)
    assert [name for name in operations if "copy" in name or "clone" in name] == ["aten._to_copy.default"]
    assert copied.device.type == "cpu"
    if device == "cpu":
        assert copied.untyped_storage().nbytes() == 8
        x.fill_(3)
        assert not torch.equal(copied, x)


@pytest.mark.parametrize(
    "wrapped", ["_orig_mod.{}", "module.{}", "model.{}", "_orig_mod.module.{}", "module._orig_mod.{}"]
)
def test_the_names_of_a_wrapped_module_are_understood(wrapped: str) -> None:
    target = {"blocks.0.weight": torch.zeros(2), "head.weight": torch.zeros(3)}
    copy_into(target, {wrapped.format(name): torch.ones_like(tensor) for name, tensor in target.items()})
    assert all(bool(tensor.all()) for tensor in target.values())
    parts = {"blocks._orig_mod.0.weight": torch.zeros(2), "_orig_mod.head.weight": torch.zeros(3)}
    copy_into(target, parts)
    assert not any(bool(tensor.any()) for tensor in target.values())
    with pytest.raises(InputError, match="is missing"):
        copy_into(target, {"other.blocks.0.weight": torch.zeros(2), "other.head.weight": torch.zeros(3)})
