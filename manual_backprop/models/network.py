"""The interface between a network and everything else: batches in, a loss and named gradients out.

Here is what all implementations share: parameters, their initial values, and checks of inputs. There is no forward and
no backward.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import kernels
from ..common.batch import AnyBatch, Batch, EncoderBatch, PairBatch
from ..common.errors import ConfigError, InputError
from ..config.schema import CustomTransformerConfig
from ..ops import IGNORED, Dropout, Visible, random_key, rotations, sinusoids
from ..ops.numerics import Record, no_record
from ..optim.loss_scale import LossScale
from ..optim.optimizers import FlatOptimizer, Optimizer
from ..optim.parameters import Layout, RoundedMatrices, Shape, copy_into, copy_on_cpu

KINDS = {Batch: "decoder", PairBatch: "encoder_decoder", EncoderBatch: "encoder"}


@dataclass(frozen=True)
class DropoutSource:
    """Gives every place of the network its own dropout mask in this step; none in evaluation (step None)."""

    config: CustomTransformerConfig
    step: int | None
    first_row: int = 0
    keys: Mapping[str, Tensor] | None = None  # by place, on the device; they replace the keys of `step`

    def at(self, place: str) -> Dropout | None:
        """The dropout at a place of the network, for features (B, T, D); None if there is none."""
        return self._of(place, (self.config.longest,))

    def at_heads(self, place: str) -> Dropout | None:
        """The dropout at a place of the network, for probabilities (B, H, T, S); None if there is none."""
        return self._of(place, (self.config.n_heads, self.config.longest))

    def _of(self, place: str, sizes: tuple[int, ...]) -> Dropout | None:
        if self.step is None or self.config.dropout == 0:
            return None
        key = random_key(self.config.seed, self.step, place) if self.keys is None else self.keys[place]
        return Dropout(self.config.dropout, key, sizes, (self.first_row,))


class Memory(NamedTuple):
    """The encoder's output for the sources: the cross-attention of the decoder's blocks reads it."""

    states: Tensor  # (B, S, D)
    visible: Visible  # its real positions


def block_names(config: CustomTransformerConfig) -> list[str]:
    """The names of all blocks, in the order of a forward pass: blocks.0, or encoder.blocks.0 and decoder.blocks.0."""
    return [block for blocks in stacks_of(config).values() for block in blocks]


def dropout_places(config: CustomTransformerConfig) -> list[str]:
    """The places where a hand-written network applies dropout in training, as `DropoutSource` names them."""
    if config.dropout == 0:
        return []
    places = [f"{stack}embedding" for stack in stacks_of(config)]
    for block in block_names(config):
        attentions = ("attention", "cross_attention") if reads_memory(config, block) else ("attention",)
        places += [f"{block}.{name}.{what}" for name in attentions for what in ("probabilities", "output")]
        places.append(f"{block}.feed_forward.output")
    return places


def stacks_of(config: CustomTransformerConfig) -> dict[str, list[str]]:
    """Names of blocks by their prefix: empty for a decoder alone, else "encoder." and "decoder."."""
    sizes = {"encoder.": config.encoder_blocks, "decoder.": config.n_blocks}
    if config.network == "encoder":
        del sizes["decoder."]
    elif config.network == "decoder":
        sizes = {"": config.n_blocks}
    return {stack: [f"{stack}blocks.{block}" for block in range(size)] for stack, size in sizes.items()}


def tables_of(config: CustomTransformerConfig) -> dict[str, tuple[str, str]]:
    """For each stack, the names of its token embedding and of its position embedding (if positions are learned)."""
    tables = dict.fromkeys(stacks_of(config), ("token_embedding.weight", "position_embedding.weight"))
    if config.n_inputs is not None:
        tables["encoder."] = "input.weight", "position_embedding.weight"
    if config.network == "encoder_decoder":
        own = config.source_vocab_size is not None
        source = "source_embedding.weight" if own else "token_embedding.weight"
        tables["encoder."] = source, "source_position_embedding.weight"
    return tables


def reads_memory(config: CustomTransformerConfig, block: str) -> bool:
    """Whether a block has a cross-attention."""
    return config.network == "encoder_decoder" and block.startswith("decoder.")


def packed_names(config: CustomTransformerConfig, block: str) -> dict[str, list[str]]:
    """Parameters of a block that lie side by side, so that one product serves them: {name of the whole: its parts}."""
    kinds = ("weight", "bias") if config.traits.biases else ("weight",)
    groups: list[tuple[str, str, tuple[str, ...]]] = [("attention", "qkv", ("query", "key", "value"))]
    if reads_memory(config, block):
        groups.append(("cross_attention", "key_value", ("key", "value")))
    if config.traits.gated:
        groups.append(("feed_forward", "gated", ("gate", "hidden")))
    return {
        f"{block}.{sublayer}.{whole}.{kind}": [f"{block}.{sublayer}.{part}.{kind}" for part in parts]
        for sublayer, whole, parts in groups
        for kind in kinds
    }


def linear_of(views: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """The parameters of a product, or their gradients: weight, and bias, None in an architecture without biases."""
    return views[f"{name}.weight"], views.get(f"{name}.bias")


def norm_of(views: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The parameters of a norm, or their gradients: weight, and bias if it has one."""
    return [views[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in views]


def feed_forward_of(views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parameters of a block's feed-forward network, or their gradients."""
    hidden, output = "feed_forward.hidden", "feed_forward.output"
    return views[f"{hidden}.weight"], views[f"{hidden}.bias"], views[f"{output}.weight"], views[f"{output}.bias"]


def gated_feed_forward_of(views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The parameters of a block's gated feed-forward network, or their gradients."""
    return views["feed_forward.gated.weight"], views["feed_forward.output.weight"]


@cache
def has_float16_products() -> bool:
    """Whether PyTorch multiplies float16 matrices on a CPU."""
    with _disable_current_modes():  # with real tensors, also when a step is only traced
        ones = torch.ones(2, 2, dtype=torch.float16, device="cpu")
        try:
            return bool(torch.addmm(ones[0], ones, ones).sum() == 12)
        except RuntimeError:
            return False


def no_callback(block: str | None) -> None:
    """Does nothing: the default callback for complete gradients."""


def parameter_shapes(config: CustomTransformerConfig) -> dict[str, Shape]:
    """Every parameter's name and shape, in the order of the network. Weights are (outputs, inputs)."""
    d_model, d_ffn, traits = config.d_model, config.d_ffn, config.traits
    d_kv = config.kv_heads * config.d_head
    shapes: dict[str, Shape] = {"token_embedding.weight": (config.vocab_size, d_model)}

    def add(place: str, shape: Shape, bias: bool) -> None:
        shapes[f"{place}.weight"] = shape
        if bias:
            shapes[f"{place}.bias"] = shape[:1]

    learned, pair = config.position_kind == "learned", config.network == "encoder_decoder"
    if config.n_inputs is not None:
        del shapes["token_embedding.weight"]
        add("input", (d_model, config.n_inputs), True)
    if learned:
        shapes["position_embedding.weight"] = (config.max_seq_len, d_model)
    if config.source_vocab_size is not None:
        shapes["source_embedding.weight"] = (config.source_vocab_size, d_model)
    if learned and pair:
        shapes["source_position_embedding.weight"] = (config.source_length, d_model)
    for block in block_names(config):
        attentions = ("attention", "cross_attention") if reads_memory(config, block) else ("attention",)
        for norm in (*attentions, "feed_forward"):
            add(f"{block}.{norm}_norm", (d_model,), traits.norm == "layer")
        for attention in attentions:
            for projection, outputs in (("query", d_model), ("key", d_kv), ("value", d_kv), ("output", d_model)):
                add(f"{block}.{attention}.{projection}", (outputs, d_model), traits.biases)
        if traits.gated:
            add(f"{block}.feed_forward.gate", (d_ffn, d_model), traits.biases)
        add(f"{block}.feed_forward.hidden", (d_ffn, d_model), traits.biases)
        add(f"{block}.feed_forward.output", (d_model, d_ffn), traits.biases)
    if traits.pre_norm:
        for stack in stacks_of(config):
            add(f"{stack}final_norm", (d_model,), traits.norm == "layer")
    if config.network == "encoder":
        add("head", (config.n_outputs or 0, d_model), True)
    elif not config.tied_head:
        add("head", (config.vocab_size, d_model), False)
    return shapes


def initial_standard_deviation(name: str, shape: Shape, config: CustomTransformerConfig) -> float:
    """The standard deviation of a matrix's initial values.

    gpt2, llama: 0.02 at GPT-2's width of 768, scaled with 1 / sqrt(D) for other widths. It is smaller for matrices
    whose product is added to the residual stream, where 2L terms add up, or 3L with cross-attention (Radford et al.
    2019, section 2.3). vaswani: 1 / sqrt(D) for embeddings, so that their scaled values are of size 1; other matrices
    preserve the variance of their inputs (Glorot and Bengio 2010, equation 16).
    """
    if config.traits.pre_norm:
        base = 0.02 * math.sqrt(768 / config.d_model)
        blocks = stacks_of(config).get(name.partition("blocks.")[0], [])
        terms = sum(3 if reads_memory(config, block) else 2 for block in blocks)  # of the residual stream
        return base / math.sqrt(terms) if name.endswith("output.weight") else base
    if name in ("token_embedding.weight", "source_embedding.weight", "head.weight"):
        return config.d_model**-0.5
    outputs, inputs = shape
    return math.sqrt(2 / (inputs + outputs))


class Network(ABC):
    """A transformer: a decoder, an encoder, or both. Subclasses define parameters, the computation and its gradients.

    `parameters` and `gradients` have the same names in every implementation, however it stores them.
    """

    parameters: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    compiles = False  # whether parts of its training step run compiled where possible: it changes the last bits

    def __init__(self, config: CustomTransformerConfig | Mapping[str, Any]):
        """Raises ConfigError with every setting that a network cannot be built from."""
        self.config = config = CustomTransformerConfig.of(config)
        if violations := config.violations():
            raise ConfigError(violations)
        self.device = config.get_device()
        self.compute_dtype = config.get_compute_dtype()
        self._check_precision()
        # of fp16_mixed: backward multiplies the loss by it
        self.loss_scale = LossScale(self.device) if config.precision == "fp16_mixed" else None
        self.activation = config.activation or config.traits.activation
        if config.position_kind == "sinusoidal":
            self.position_table = sinusoids(config.longest, config.d_model).to(self.device)
        elif config.traits.positions == "rotary":
            table = rotations(config.longest, config.d_head, config.base).to(self.device)
            if config.position_kind == "none":  # rotated by angle 0: cosines of 1, sines of 0
                table[0], table[1] = 1, 0
            self.position_table = table
        self.recorder: Record = no_record
        # Called in every backward pass: with a block's name when its gradients are complete, from the last block to
        # the first, and at the end with None for all others (embedding, final norm, head).
        self.on_gradients_complete: Callable[[str | None], None] = no_callback

    @property
    def _recording(self) -> Record:
        """What a step reports its activations to."""
        return self.recorder

    def _check_precision(self) -> None:
        """Raises ConfigError for a precision that this device or this PyTorch does not support."""
        precision, kind = self.config.precision, self.device.type
        if precision == "tf32" and kind == "cpu":
            raise ConfigError(["precision=tf32: only an NVIDIA GPU has it, and there is none here; use precision=fp32"])
        if precision == "fp16_mixed" and kind == "cpu" and not has_float16_products():
            raise ConfigError(
                ["precision=fp16_mixed: this PyTorch multiplies no float16 matrices on a CPU; use bf16_mixed or fp32"]
            )

    @contextmanager
    def _scaled_gradients(self) -> Iterator[float | Tensor]:
        """A context for a backward pass; it yields the factor of dloss. Inside, the gradients are multiplied by the
        loss scale, so that those of activations are not lost in float16; at the end `gradients` are unscaled."""
        if self.loss_scale is None:
            yield 1.0
            return
        factor = self.loss_scale.factor
        if gradients := self.gradient_tensors():
            torch._foreach_mul_(gradients, factor)
        yield factor
        torch._foreach_mul_(self.gradient_tensors(), 1 / factor)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Fills the parameters with the same numbers on every device: each is a function of (seed, name) alone."""
        for name, parameter in self.parameters.items():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif parameter.dim() == 2:
                key = hashlib.blake2b(f"{self.config.seed}/{name}".encode(), digest_size=7).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(values * initial_standard_deviation(name, tuple(parameter.shape), self.config))
            else:
                parameter.zero_()

    @abstractmethod
    def loss_and_gradients(self, batch: AnyBatch, *, denominator: int | Tensor, step: int | None) -> Tensor:
        """Forward and backward: adds to `gradients` and returns the loss, one number that stays on the device.

        The loss is the sum over the batch's targets that count, divided by `denominator`, their number in the whole
        optimizer step: a Python number, or its `on_device`, converted once for all batches of a step. `step` is the
        number of the current optimizer step and chooses the dropout masks; None: no dropout.
        """

    @abstractmethod
    def forward(self, tokens: Tensor | AnyBatch, segments: Tensor | None = None, step: int | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V). The caches are kept until `backward` or the next forward.

        An encoder-decoder takes a PairBatch, an encoder an EncoderBatch, which gives (B, n_outputs).
        """

    @abstractmethod
    def backward(self, dlogits: Tensor) -> None:
        """dlogits (B, T, V): adds to `gradients`. To be called once after each `forward`."""

    @abstractmethod
    def predict(self, tokens: Tensor | AnyBatch, segments: Tensor | None = None) -> Tensor:
        """Like `forward`, but keeps no caches: for evaluation and generation."""

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        """source (B, S), with lengths (B,) of its real tokens -> memory (B, S, D), the output of the encoder. For an
        encoder-decoder."""
        raise InputError(f"network={self.config.network} reads no source.")

    @abstractmethod
    def zero_gradients(self) -> None:
        """Set all gradients to 0, before the first batch of a step: `loss_and_gradients` adds to them."""

    @abstractmethod
    def update_parameters(self, learning_rate: float) -> None:
        """Plain gradient descent: parameter -= learning_rate * gradient."""

    @abstractmethod
    def gradient_tensors(self) -> list[Tensor]:
        """All gradients in as few tensors as possible, for operations over all of them."""

    @abstractmethod
    def adamw(self, weight_decay: float, betas: tuple[float, float], epsilon: float) -> Optimizer:
        """AdamW over this network's parameters; weight decay applies to matrices only."""

    @abstractmethod
    def sgd(self, weight_decay: float, momentum: float) -> Optimizer:
        """Likewise."""

    def export_parameters(self) -> dict[str, Tensor]:
        """Copies of all parameters by name, on the CPU, in their own dtype."""
        return {name: copy_on_cpu(parameter) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies values into the parameters by name. Raises InputError, without changes, if names or shapes differ."""
        copy_into(self.parameters, parameters)

    def count_parameters(self) -> int:
        """A head that is tied to the embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def on_device(self, number: int | Tensor) -> Tensor:
        """`number` as a tensor on this network's device. A Python number is filled in there and nothing waits for it;
        `torch.as_tensor` would copy it from the host."""
        return number.to(self.device) if isinstance(number, Tensor) else torch.full((), number, device=self.device)

    def inputs_of(self, batch: AnyBatch, targets: bool = True) -> tuple[Tensor | None, ...]:
        """The checked inputs of a batch: tokens and segments; source, its lengths and tokens; or inputs and their
        lengths. `targets`: and the targets, last. Raises InputError for a batch of another kind or a malformed one."""
        kind = KINDS[type(batch)]
        if kind != self.config.network:
            raise InputError(
                f"a {type(batch).__name__} is for network={kind}, and this is network={self.config.network}."
            )
        if isinstance(batch, PairBatch):
            self.check_tokens(batch.tokens, batch.targets if targets else None)
            self.check_source(batch.source, batch.source_lengths, len(batch.tokens))
            return batch.source, batch.source_lengths, batch.tokens
        if isinstance(batch, EncoderBatch):
            self.check_inputs(batch)
            return batch.inputs, batch.lengths
        self.check_tokens(batch.tokens, batch.targets if targets else None, batch.segments)
        return batch.tokens, batch.segments

    def check_source(self, source: Tensor, lengths: Tensor, B: int) -> None:
        """Raises InputError for sources that this network cannot read."""
        config = self.config
        vocab_size = config.source_vocab_size or config.vocab_size
        self._check_rows("source", source, config.source_length, "max_source_len", vocab_size)
        if len(source) != B:
            raise InputError(f"There are {len(source)} sources and {B} targets: expected the same number.")
        self._check_lengths(lengths, *source.shape)

    def check_inputs(self, batch: EncoderBatch) -> None:
        """Raises InputError for inputs or targets that this encoder cannot use."""
        config, inputs, targets = self.config, batch.inputs, batch.targets
        if config.n_inputs is None:
            self._check_rows("inputs", inputs, config.max_seq_len, "max_seq_len", config.vocab_size)
        elif inputs.dim() != 3 or inputs.shape[2] != config.n_inputs or not inputs.is_floating_point():
            raise InputError(
                f"inputs have shape {tuple(inputs.shape)} and are {inputs.dtype}; expected numbers, (batch, sequence, "
                f"{config.n_inputs})."
            )
        if not 1 <= inputs.shape[1] <= config.max_seq_len:
            raise InputError(
                f"The sequence has {inputs.shape[1]} positions; expected 1 to max_seq_len={config.max_seq_len}."
            )
        self._check_lengths(batch.lengths, *inputs.shape[:2])
        numbers = config.predicts_numbers
        shape = (len(inputs), config.n_outputs) if numbers else (len(inputs),)
        if targets.shape != shape or targets.is_floating_point() != numbers:
            raise InputError(
                f"targets have shape {tuple(targets.shape)} and are {targets.dtype}; expected "
                f"{'numbers' if numbers else 'classes, whole numbers'}, {shape}."
            )
        if not numbers and targets.device.type == "cpu":
            check_ids("class", targets, config.n_outputs or 0, ignored=True)

    def _check_rows(self, what: str, rows: Tensor, longest: int, limit: str, vocab_size: int) -> None:
        if rows.dim() != 2 or rows.numel() == 0 or rows.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"{what} has shape {tuple(rows.shape)} and is {rows.dtype}; expected whole numbers, (batch, sequence), "
                "both at least 1."
            )
        if rows.shape[1] > longest:
            raise InputError(f"The {what} has {rows.shape[1]} tokens, but {limit} is {longest}: shorten it.")
        if rows.device.type == "cpu":
            check_ids(f"{what} id", rows, vocab_size)

    def _check_lengths(self, lengths: Tensor, B: int, T: int) -> None:
        if lengths.shape != (B,) or lengths.is_floating_point():
            raise InputError(f"lengths have shape {tuple(lengths.shape)}; expected whole numbers, ({B},).")
        if lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > T)).any()):
            raise InputError(f"lengths are {lengths.tolist()}; expected 0 to {T}.")

    def check_tokens(self, tokens: Tensor, targets: Tensor | None = None, segments: Tensor | None = None) -> None:
        """Raises InputError for tokens that this network cannot read. A negative index would wrap around in silence.

        The values are checked on the CPU only: on a GPU the step would wait for the comparison. There the corpus is
        checked when it is opened, and the wrapper checks its arguments before it moves them to the device.
        """
        config = self.config
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise InputError(f"tokens have shape {tuple(tokens.shape)}; expected (batch, sequence), both at least 1.")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise InputError(f"tokens are {tokens.dtype}; expected whole numbers, torch.int64 or torch.int32.")
        if tokens.shape[1] > config.max_seq_len:
            raise InputError(
                f"The sequence has {tokens.shape[1]} tokens, but max_seq_len is {config.max_seq_len}: "
                "shorten it, or build the network with a larger max_seq_len."
            )
        if targets is not None and targets.dtype not in (torch.int64, torch.int32):
            raise InputError(f"targets are {targets.dtype}; expected whole numbers, torch.int64 or torch.int32.")
        for name, other in (("targets", targets), ("segments", segments)):
            if other is not None and other.shape != tokens.shape:
                raise InputError(
                    f"{name} have shape {tuple(other.shape)}; expected that of the tokens, {tuple(tokens.shape)}."
                )
        if tokens.device.type != "cpu":
            return
        check_ids("token id", tokens, config.vocab_size)
        if targets is not None:
            check_ids("target", targets, config.vocab_size, ignored=True)


class FlatNetwork(Network):
    """A network whose parameters are views of one flat buffer, and whose gradients are views of another."""

    uses_library = False  # whether kernels run in the compiled library, if there is one
    rounded: RoundedMatrices | None = None  # what products read, if not the parameters themselves
    kind = "decoder"  # as in config.network

    def __init__(self, config: CustomTransformerConfig | Mapping[str, Any]):
        super().__init__(config)
        config = self.config
        if config.network != self.kind:
            raise ConfigError([f"network={config.network}: {type(self).__name__} is one of network={self.kind}"])
        groups = [names for block in block_names(config) for names in packed_names(config, block).values()]
        self.layout = Layout(parameter_shapes(config), groups)
        self.flat_parameters = self.layout.allocate(config.get_dtype(), self.device)
        self.flat_gradients = self.layout.allocate(config.get_dtype(), self.device)
        self.parameters = self.flat_parameters.views
        self.gradients = self.flat_gradients.views
        self._initialize()

    def zero_gradients(self) -> None:
        self.flat_gradients.buffer.zero_()

    @torch.no_grad()
    def update_parameters(self, learning_rate: float) -> None:
        self.flat_parameters.buffer.sub_(self.flat_gradients.buffer, alpha=learning_rate)

    def gradient_tensors(self) -> list[Tensor]:
        return [self.flat_gradients.buffer]

    def adamw(self, weight_decay: float, betas: tuple[float, float], epsilon: float) -> Optimizer:
        return self._optimizer("AdamW", weight_decay, betas, epsilon)

    def sgd(self, weight_decay: float, momentum: float) -> Optimizer:
        return self._optimizer("SGD", weight_decay, momentum)

    def _optimizer(self, name: str, *settings: Any) -> Optimizer:
        """The table's own."""
        make = getattr(kernels.Table(self.config, self.device), name)
        optimizer: FlatOptimizer = make(self.layout, self.flat_parameters, self.flat_gradients, *settings)
        optimizer.uses_library, optimizer.rounded = self.uses_library, self.rounded
        optimizer.loss_scale = self.loss_scale
        return optimizer


def check_ids(what: str, ids: Tensor, vocab_size: int, ignored: bool = False) -> None:
    """Raises InputError unless all ids are in [0, vocab_size); with `ignored`, -100 is allowed too."""
    if not ids.numel():
        return
    least, most = ids.aminmax()
    if int(least) >= 0 and int(most) < vocab_size:
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignored:
        wrong &= ids != IGNORED
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        allowed = f"0 to {vocab_size - 1}" + (f", or {IGNORED} for one that does not count" if ignored else "")
        raise InputError(
            f"The {what} {int(ids[place])} at {place} is outside the vocabulary of {vocab_size}: expected {allowed}. "
            "Was the text encoded with another tokenizer?"
        )
