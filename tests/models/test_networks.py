"""Encoders and encoder-decoders by hand: compared with PyTorch's layers, invariance to padding, and refused input.
test_gradients.py compares their gradients with the mirror."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manual_backprop.common.batch import AnyBatch, Batch, EncoderBatch, PairBatch
from manual_backprop.common.errors import ConfigError
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.models.implementations import build_network
from manual_backprop.models.network import Network, parameter_shapes
from manual_backprop.models.recorder import Recorder
from manual_backprop.ops import IGNORED
from manual_backprop.study.gradient_check import ENOUGH_TO_ROUND, ODD, check_network_precision, draw_batch
from manual_backprop.study.gradient_check.measure import differing, error_of, errors_of
from manual_backprop.study.gradient_check.network_case import counted, rows_of, wholly_zero
from manual_backprop.study.gradient_check.network_check import networks, set_proof_scale, step_of
from manual_backprop.training.command_line import check

pytestmark = [pytest.mark.gradients, pytest.mark.usefixtures("one_thread", "as_written")]

ARCHITECTURES = ("gpt2", "vaswani", "llama")
PAIR = replace(ODD, network="encoder_decoder", n_encoder_blocks=3, max_source_len=11)
ENCODER = replace(ODD, network="encoder", n_outputs=5)
NUMBERS = replace(ENCODER, n_inputs=4, n_outputs=3, head_loss="squared_error")
KINDS = {"encoder_decoder": PAIR, "encoder": ENCODER, "encoder of numbers": NUMBERS}


# Against torch.nn's layers


class TorchStacks(nn.Module):
    """`torch.nn.TransformerEncoderLayer` and `torch.nn.TransformerDecoderLayer`, with a network's parameters."""

    def __init__(self, network: Network):
        super().__init__()
        self.config, self.network = network.config, network
        config, pre_norm = self.config, self.config.traits.pre_norm
        sizes: dict[str, Any] = {"d_model": config.d_model, "nhead": config.n_heads, "dim_feedforward": config.d_ffn}
        sizes |= {"dropout": 0.0, "activation": config.activation, "layer_norm_eps": config.epsilon}
        sizes |= {"batch_first": True, "norm_first": pre_norm, "dtype": torch.float64}

        def last_norm() -> nn.Module | None:
            return nn.LayerNorm(config.d_model, config.epsilon, dtype=torch.float64) if pre_norm else None

        layer = nn.TransformerEncoderLayer(**sizes)
        self.encoder = nn.TransformerEncoder(layer, config.encoder_blocks, last_norm(), enable_nested_tensor=False)
        self.decoder: nn.Module | None = None
        if config.network == "encoder_decoder":
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), config.n_blocks, last_norm())
        self.leaves = {}
        mine = dict(self.views())
        for name, value in network.parameters.items():
            if name in mine:
                mine[name].data.copy_(value)
            else:
                self.leaves[name] = value.clone().requires_grad_()

    def views(self, gradients: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The layers' parameters, or their gradients, under our names."""
        for stack, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            if module is None:
                continue
            for number, layer in enumerate(module.layers):
                block = f"{stack}.blocks.{number}"
                attentions = {"attention": layer.self_attn}
                if stack == "decoder":
                    attentions["cross_attention"] = layer.multihead_attn
                parts = {"feed_forward.hidden": layer.linear1, "feed_forward.output": layer.linear2}
                for place, name in enumerate([*attentions, "feed_forward"], 1):
                    parts[f"{name}_norm"] = getattr(layer, f"norm{place}")
                for name, attention in attentions.items():
                    parts[f"{name}.output"] = attention.out_proj
                    for kind in ("weight", "bias"):
                        packed = getattr(attention, f"in_proj_{kind}")
                        thirds = (packed.grad if gradients else packed).chunk(3)
                        for projection, third in zip(("query", "key", "value"), thirds, strict=True):
                            yield f"{block}.{name}.{projection}.{kind}", third
                yield from self._of({f"{block}.{name}": part for name, part in parts.items()}, gradients)
            if module.norm is not None:
                yield from self._of({f"{stack}.final_norm": module.norm}, gradients)
        if gradients:
            yield from ((name, leaf.grad) for name, leaf in self.leaves.items())

    @staticmethod
    def _of(modules: dict[str, nn.Module], gradients: bool) -> Iterator[tuple[str, Tensor]]:
        for name, module in modules.items():
            for kind, parameter in module.named_parameters():
                yield f"{name}.{kind}", parameter.grad if gradients else parameter

    def embedded(self, tokens: Tensor, table: str, places: str) -> Tensor:
        x = F.embedding(tokens, self.leaves[table])
        if self.config.traits.scaled_embedding:
            x = x * math.sqrt(self.config.d_model)
        T = tokens.shape[1]
        if self.config.position_kind == "learned":
            return x + self.leaves[places][:T]
        return x + self.network.position_table[:T]

    def loss(self, batch: PairBatch | EncoderBatch) -> Tensor:
        rows, lengths = (
            (batch.inputs, batch.lengths) if isinstance(batch, EncoderBatch) else (batch.source, batch.source_lengths)
        )
        padding = torch.arange(rows.shape[1]) >= lengths[:, None]
        source_places = "position_embedding.weight"
        if isinstance(batch, PairBatch):
            source_places = f"source_{source_places}"
        memory = self.encoder(
            self.embedded(rows, "token_embedding.weight", source_places), src_key_padding_mask=padding
        )
        if isinstance(batch, EncoderBatch):
            pooled = memory.masked_fill(padding[..., None], 0).sum(1) / lengths[:, None]
            logits = F.linear(pooled, self.leaves["head.weight"], self.leaves["head.bias"])
        else:
            assert self.decoder is not None
            T = batch.tokens.shape[1]
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            target = self.embedded(batch.tokens, "token_embedding.weight", "position_embedding.weight")
            x = self.decoder(target, memory, tgt_mask=future, memory_key_padding_mask=padding)
            logits = F.linear(x, self.leaves.get("head.weight", self.leaves["token_embedding.weight"])).flatten(0, 1)
        total = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / counted(batch)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("architecture", ["gpt2", "vaswani"])
@pytest.mark.parametrize("kind", ["encoder_decoder", "encoder"])
def test_stacks_of_torch_layers_give_the_same(kind: str, architecture: str, activation: str) -> None:
    """gpt2 is norm_first=True with a norm after the stack, vaswani norm_first=False without one."""
    config = replace(KINDS[kind], architecture=architecture, activation=activation)
    network, _ = networks(config)
    batch = draw_batch(config, 4, 7)
    least = batch.lengths if isinstance(batch, EncoderBatch) else batch.source_lengths
    least.clamp_(min=1)  # torch's attention gives NaN where no key is visible
    stacks = TorchStacks(network)
    want_loss = stacks.loss(batch)
    want_loss.backward()
    loss, gradients = step_of(network, batch)
    assert error_of(loss, want_loss.detach()) < 1e-10
    errors = errors_of(gradients, dict(stacks.views(gradients=True)), wholly_zero(config, batch))
    assert len(errors) > 20
    assert max(errors.values()) < 1e-10, errors


# Padding


def alone(batch: AnyBatch, row: int) -> AnyBatch:
    """A row by itself, without padding."""
    part = rows_of(batch, slice(row, row + 1), batch.first_row + row)
    if isinstance(part, EncoderBatch):
        return replace(part, inputs=part.inputs[:, : int(part.lengths)])
    assert isinstance(part, PairBatch)
    T = int((part.targets != IGNORED).nonzero()[:, 1].max()) + 1
    source = part.source[:, : max(int(part.source_lengths), 1)]
    return replace(part, source=source, tokens=part.tokens[:, :T], targets=part.targets[:, :T])


def only(batch: AnyBatch, row: int) -> AnyBatch:
    """The whole batch, in which only the targets of one row count."""
    targets = torch.full_like(batch.targets, torch.nan if batch.targets.is_floating_point() else IGNORED)
    targets[row] = batch.targets[row]
    return replace(batch, targets=targets)


@pytest.mark.parametrize("which", ["reference", "fused", "torch"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_padded(kind: str, architecture: str, which: str) -> None:
    """Its outputs, loss and gradients, with dropout, do not depend on the other rows or on padding."""
    config = replace(KINDS[kind], architecture=architecture, dropout=0.3, kernels=which.replace("torch", "reference"))
    network = build_network("torch" if which == "torch" else "custom", config)
    set_proof_scale(network)
    batch = draw_batch(config, 4, 8)
    if isinstance(batch, PairBatch):
        targets = batch.targets.clamp(min=0)
        for row, length in enumerate((8, 1, 5, 3)):
            targets[row, length:] = IGNORED
        batch = replace(batch, targets=targets)
    else:
        batch = replace(batch, targets=torch.where(batch.targets == IGNORED, 1, batch.targets))
    outputs = network.predict(batch)
    for row in range(4):
        padded, single = only(batch, row), alone(batch, row)
        loss, gradients = step_of(network, padded, denominator=3)
        single_loss, single_gradients = step_of(network, single, denominator=3)
        assert error_of(single_loss, loss) < 1e-12
        apart = wholly_zero(config, single)
        assert max(errors_of(single_gradients, gradients, apart).values()) < 1e-12
        of_single = network.predict(single)[0]
        same = outputs[row] if isinstance(batch, EncoderBatch) else outputs[row, : len(of_single)]
        assert error_of(of_single, same) < 1e-12


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_empty_source_says_nothing(architecture: str, kernels: str) -> None:
    """Context and probabilities are exactly 0, and parameters of the encoder get no gradient."""
    config = replace(PAIR, architecture=architecture, kernels=kernels, source_vocab_size=12)
    network, _ = networks(config)
    batch = draw_batch(config, 3, 6, S=4, lengths=[4, 0, 2])
    network.recorder = recorder = Recorder()
    network.loss_and_gradients(batch, denominator=5, step=None)
    seen = {name: tensor for name, tensor in recorder.tensors.items() if ".cross_attention." in name}
    for block in range(config.n_blocks):
        for name in ("context", "probabilities", "dscores"):
            tensor = seen[f"decoder.blocks.{block}.cross_attention.{name}"]
            assert not tensor[1].any()
            assert tensor[0].any()
    _, gradients = step_of(network, replace(batch, source_lengths=torch.zeros(3, dtype=torch.int64)))
    only_encoders = [name for name in gradients if name.startswith(("encoder.", "source_"))]
    assert len(only_encoders) > 20
    assert not any(gradients[name].any() for name in only_encoders)
    reached = ("query.weight", "key.weight", "value.weight", "output.weight")
    crossed = [name for name in gradients if ".cross_attention." in name and name.endswith(reached)]
    assert len(crossed) == 4 * config.n_blocks
    assert not any(gradients[name].any() for name in crossed)


# What a step tells


@pytest.mark.parametrize(
    ("implementation", "changed"),
    [
        ("custom", {"kernels": "reference", "recompute": "block"}),
        ("custom", {"kernels": "fused"}),
        ("torch", {}),
        ("baseline", {"compile": "never"}),
    ],
)
@pytest.mark.parametrize("kind", ["encoder_decoder", "encoder"])
def test_blocks_of_both_stacks_say_when_their_gradients_are_complete(
    kind: str, implementation: str, changed: dict[str, Any]
) -> None:
    config = replace(KINDS[kind], **changed)
    network, batch = build_network(implementation, config), draw_batch(config, 2, 5)
    seen: list[tuple[str | None, dict[str, Tensor]]] = []

    def look(block: str | None) -> None:
        mine = [name for name in network.gradients if block is None or name.startswith(f"{block}.")]
        seen.append((block, {name: network.gradients[name].clone() for name in mine}))

    network.on_gradients_complete = look
    network.zero_gradients()
    network.loss_and_gradients(batch, denominator=9, step=1)
    encoder = [f"encoder.blocks.{block}" for block in reversed(range(config.encoder_blocks))]
    decoder = [f"decoder.blocks.{block}" for block in reversed(range(config.n_blocks))]
    order = [*(decoder if kind == "encoder_decoder" else []), *encoder, None]
    assert [block for block, _ in seen] == order
    for _, gradients in seen:
        assert len(gradients) > 8
        assert differing(gradients, network.gradients) == 0
    network.backward(torch.ones_like(network.forward(batch)))
    assert [block for block, _ in seen] == order * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_recomputed_blocks_give_the_same_bits(kernels: str, kind: str) -> None:
    config = replace(KINDS[kind], kernels=kernels, dropout=0.2)
    batch = draw_batch(config, 3, 7)
    kept, recomputed = (step_of(networks(replace(config, recompute=how))[0], batch) for how in ("none", "block"))
    assert torch.equal(kept[0], recomputed[0])
    assert differing(kept[1], recomputed[1]) == 0


# In low precision


def low_precision(
    config: CustomTransformerConfig, precision: str, kernels: str, scale: str = "proof"
) -> list[tuple[str, float]]:
    config = replace(config, precision=precision, kernels=kernels)
    return [(f.quantity, f.error) for f in check_network_precision(config, scale) if not f.ok]


ROUNDED = [
    pytest.param(*case, marks=() if usual else pytest.mark.nightly)
    for architecture in ARCHITECTURES
    for precision in ("fp32", "bf16", "bf16_mixed")
    for kernels in ("reference", "fused")
    for case, usual in [((architecture, precision, kernels), (architecture == "vaswani") and (kernels == "fused"))]
]


@pytest.mark.parametrize(("architecture", "precision", "kernels"), ROUNDED)
def test_an_encoder_decoder_in_low_precision(architecture: str, precision: str, kernels: str) -> None:
    config = replace(ENOUGH_TO_ROUND, network="encoder_decoder", n_encoder_blocks=1, architecture=architecture)
    assert not low_precision(config, precision, kernels)


@pytest.mark.parametrize(("architecture", "precision", "kernels"), ROUNDED)
def test_an_encoder_in_low_precision(architecture: str, precision: str, kernels: str) -> None:
    config = replace(ENOUGH_TO_ROUND, network="encoder", n_outputs=7, n_blocks=1, architecture=architecture)
    assert not low_precision(config, precision, kernels)


# What a run asks for


def test_a_run_passes_on_what_the_network_is_made_of() -> None:
    asked = ("model.n_encoder_blocks=3", "model.positions=none", "architecture=vaswani")
    config = check(["task=reversal", *asked]).jobs[0].config
    network = config.network_config(13)
    assert (network.network, network.encoder_blocks, network.position_kind) == ("encoder_decoder", 3, "none")
    assert not any("position" in name for name in parameter_shapes(network))
    usual = check(["task=reversal", "architecture=vaswani"]).jobs[0].config.network_config(13)
    assert (usual.encoder_blocks, usual.position_kind) == (usual.n_blocks, "sinusoidal")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.positions=rotary",), "model.positions=rotary: architecture=gpt2 supports learned, sinusoidal, none"),
        (
            ("architecture=llama", "model.positions=learned"),
            "model.positions=learned: architecture=llama supports rotary, none",
        ),
        (("model.n_encoder_blocks=2",), "model.n_encoder_blocks=2: network=decoder has no encoder"),
    ],
    ids=str,
)
def test_what_a_run_refuses(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(overrides)
    assert len(refused.value.violations) == 1
    assert refused.value.violations[0].startswith(said)


def test_the_paper_has_one_table() -> None:
    """Sources, targets and head share it (Vaswani et al. 2017, section 3.4), as gpt2's do; llama's head is its own."""

    def tables(architecture: str) -> list[str]:
        shapes = parameter_shapes(replace(PAIR, architecture=architecture))
        return [name for name in shapes if "embedding" in name or name.startswith("head")]

    assert tables("vaswani") == ["token_embedding.weight"]
    places = ["position_embedding.weight", "source_position_embedding.weight"]
    assert tables("gpt2") == ["token_embedding.weight", *places]
    assert tables("llama") == ["token_embedding.weight", "head.weight"]


# What is refused


@pytest.mark.parametrize("kind", ["decoder", *KINDS])
@pytest.mark.parametrize("implementation", ["custom", "torch", "baseline"])
def test_another_kind_of_batch_is_refused(implementation: str, kind: str) -> None:
    config = replace(KINDS.get(kind, ODD), compile="never")
    network = build_network(implementation, config)
    for other in (ODD, PAIR, ENCODER):
        if other.network != config.network:
            batch = draw_batch(other, 2, 5)
            with pytest.raises(ValueError, match=f"network={config.network}"):
                network.loss_and_gradients(batch, denominator=1, step=None)
    assert isinstance(draw_batch(ODD, 2, 5), Batch)
