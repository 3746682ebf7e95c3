"""The configuration of a network: its sizes, architecture and number formats, and the rules for them.

Imports the standard library only. The configuration of a whole run, which implies its network's, is in `schema.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from manual_backprop.common.errors import CheckpointError, ConfigError
from manual_backprop.common.processes import Place
from manual_backprop.config.rules import Number, did_you_mean, nearest

if TYPE_CHECKING:
    import torch

Config = TypeVar("Config")

ACTIVATIONS = ["gelu_tanh", "gelu", "relu", "swiglu"]  # and registered ones (models/extensions.py)
PRECISIONS = ("fp64", "fp32", "tf32", "bf16", "bf16_mixed", "fp16_mixed")
CPU_PRECISIONS = ("fp64", "fp32", "bf16", "bf16_mixed")  # with fast kernels for CPUs
COMPILE = ("auto", "always", "never")
KERNELS = ("reference", "fused")
RECOMPUTE = ("none", "block")
NETWORKS = ("decoder", "encoder", "encoder_decoder")
POSITIONS = ("none", "learned", "sinusoidal", "rotary")
POOLINGS = ("mean", "first")
HEAD_LOSSES = ["cross_entropy", "squared_error"]  # and registered ones
REGRESSION_LOSSES = {"squared_error"}  # those of HEAD_LOSSES whose targets are numbers
NORM_EPSILONS = {"layer": 1e-5, "rms": 1e-6}  # defaults: GPT-2's, and that of the first Llama
ROTARY_BASE = 10000.0  # default: Su et al. 2021, section 3.2.2
NORM_EPSILON_RULE = Number(minimum=1e-12, below=1, optional=True)
ROTARY_BASE_RULE = Number(above=1, optional=True)


@dataclass(frozen=True)
class Architecture:
    """The traits of an architecture, apart from its sizes."""

    pre_norm: bool  # True: a norm before each sublayer and after the last block; False: after each residual sum
    norm: str  # layer: subtracts the mean and scales; rms: only scales
    positions: str  # learned: a trained table; sinusoidal: a fixed one; rotary: queries and keys are rotated
    biases: bool  # whether linear layers have biases
    tied_head: bool  # whether a decoder's vocabulary projection is its token embedding
    tied_head_of_pair: bool  # the same for the decoder of an encoder-decoder
    scaled_embedding: bool  # whether token embeddings are multiplied by sqrt(d_model)
    activation: str  # the default; swiglu needs a third matrix, and only llama has it

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network is gated: it then has three matrices."""
        return self.activation == "swiglu"


ARCHITECTURES = {
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3
    "gpt2": Architecture(
        pre_norm=True,
        norm="layer",
        positions="learned",
        biases=True,
        tied_head=True,
        tied_head_of_pair=True,
        scaled_embedding=False,
        activation="gelu_tanh",
    ),
    # Vaswani et al. 2017, "Attention Is All You Need", 3.1-3.5: the encoder-decoder is the paper's, with one table
    # for sources, targets and head (3.4); a decoder alone has no cross-attention, and its head is not tied
    "vaswani": Architecture(
        pre_norm=False,
        norm="layer",
        positions="sinusoidal",
        biases=True,
        tied_head=False,
        tied_head_of_pair=True,
        scaled_embedding=True,
        activation="relu",
    ),
    # Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models", section 2.2
    "llama": Architecture(
        pre_norm=True,
        norm="rms",
        positions="rotary",
        biases=False,
        tied_head=False,
        tied_head_of_pair=False,
        scaled_embedding=False,
        activation="swiglu",
    ),
}


def accepts_mapping(cls: type[Config]) -> type[Config]:
    """Decorator: the dataclass also accepts one mapping, `CustomTransformerConfig({"d_model": 64})`.

    Its constructor then raises ConfigError with every unknown key and the field that was probably meant.
    """
    of_fields: Callable[..., None] = cls.__init__

    @wraps(of_fields)
    def __init__(self: Config, *values: Any, **fields: Any) -> None:
        if not values or not isinstance(values[0], Mapping):
            of_fields(self, *values, **fields)
            return
        if values[1:] or fields:
            raise ConfigError(
                [f"{', '.join(fields) or 'values'}: given together with a mapping; put them into the mapping"]
            )
        names = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
        known = f"; it has {', '.join(names)}"
        if unknown := [str(key) for key in values[0] if key not in names]:
            hints = (did_you_mean(nearest(key, names), otherwise=known) for key in unknown)
            raise ConfigError(
                [f"{key}: a network has no such key{hint}" for key, hint in zip(unknown, hints, strict=True)]
            )
        of_fields(self, **values[0])

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


@accepts_mapping
@dataclass(frozen=True)
class CustomTransformerConfig:
    """The configuration of a network: sizes, architecture and number formats. All implementations take the same one.

    The constructor takes keywords, or one mapping: `CustomTransformerConfig({"d_model": 64})`.

    >>> config = CustomTransformerConfig(vocab_size=65, d_model=64, n_heads=4)
    >>> config.d_head, config.violations()
    (16, [])
    >>> CustomTransformerConfig({"d_model": 64, "n_heads": 5}).violations()
    ['d_model=64: must be divisible by n_heads=5, since every head gets an equal share; ...']
    """

    vocab_size: int = 128  # V [tokens]
    d_model: int = 128  # D, width of the residual stream
    n_blocks: int = 8  # L
    n_heads: int = 4  # H; the head dimension is K = D / H
    d_ffn: int = 128  # F, width of the feed-forward network's hidden layer
    max_seq_len: int = 128  # longest T [tokens]
    n_kv_heads: int | None = None  # G, heads of keys and values, each shared by H / G queries (llama); None: H
    dropout: float = 0.0  # probability that an element is dropped, in training
    architecture: str = "gpt2"  # gpt2, vaswani or llama
    activation: str | None = None  # None: the architecture's own
    norm_epsilon: float | None = None  # added to the variance (layer) or mean square (rms); None: the norm's usual one
    rotary_base: float | None = None  # pair i of a head rotates by base^(-2i / K) per position (llama); None: 10000
    padding_token_id: int | None = None  # a token that is never a target; label smoothing gives it no probability
    label_smoothing: float = 0.0  # share of the target's probability that is spread over the vocabulary, in training
    precision: str = "fp32"  # fp64, fp32, bf16, bf16_mixed; on a GPU also tf32 and fp16_mixed
    kernels: str = "reference"  # or fused: the fast pairs
    device: str = "cpu"  # cpu, cuda, cuda:1 or auto
    seed: int = 0  # of the initial weights and of dropout
    recompute: str = "none"  # what backward recomputes: none, or block: all activations except each block's input
    network: str = "decoder"  # decoder, encoder or encoder_decoder
    n_encoder_blocks: int | None = None  # blocks of the encoder; None: n_blocks
    positions: str | None = None  # none, learned, sinusoidal or rotary; None: the architecture's own
    source_vocab_size: int | None = None  # of the encoder's own embedding; None: source and target share a vocabulary
    max_source_len: int | None = None  # longest S [tokens]; None: max_seq_len
    pooling: str = "mean"  # of an encoder: mean over the positions without padding, or first, the first position
    n_inputs: int | None = None  # C, numbers at each position of an encoder's input; None: it reads tokens
    n_outputs: int | None = None  # of an encoder: number of classes, or of predicted numbers
    head_loss: str = "cross_entropy"  # over tokens or classes; an encoder can also have squared_error, over numbers
    compile: str = "auto"  # compile the baseline's training step, or elementwise kernels: auto, always or never

    @classmethod
    def of(cls, given: CustomTransformerConfig | Mapping[str, Any]) -> CustomTransformerConfig:
        """The config itself, or one made from a mapping. Raises ConfigError for anything else."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls(given)  # type: ignore[arg-type]
        raise ConfigError([f"{given!r}: expected a {cls.__name__}, or a mapping as in {{'vocab_size': 257}}"])

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, or `default` if there is no such key."""
        return getattr(self, name) if name in self.__dataclass_fields__ else default

    def get_device(self) -> torch.device:
        """The device of the network; for `auto`, a GPU if there is one."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and (place := Place.found()) is not None:  # each of several processes has its own GPU
            name = f"cuda:{place.local_rank}"
        return torch.device(name)

    def get_dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        import torch

        return {"fp64": torch.float64, "bf16": torch.bfloat16}.get(self.precision, torch.float32)

    def get_compute_dtype(self) -> torch.dtype:
        """The dtype of the inputs of matrix products."""
        import torch

        mixed = {"bf16_mixed": torch.bfloat16, "fp16_mixed": torch.float16}
        return mixed.get(self.precision, self.get_dtype())

    @property
    def traits(self) -> Architecture:
        """The traits of its architecture: norm, positions, activation, biases."""
        return ARCHITECTURES[self.architecture]

    @property
    def d_head(self) -> int:
        """K, the dimension of one attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """G, the number of heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def encoder_blocks(self) -> int:
        """How many blocks an encoder has."""
        return self.n_encoder_blocks or self.n_blocks

    @property
    def position_kind(self) -> str:
        """none, learned, sinusoidal or rotary."""
        return self.positions or self.traits.positions

    @property
    def source_length(self) -> int:
        """The longest source S [tokens]."""
        return self.max_source_len or self.max_seq_len

    @property
    def longest(self) -> int:
        """The longest sequence, source or target [tokens]."""
        return max(self.max_seq_len, self.source_length)

    @property
    def predicts_numbers(self) -> bool:
        """Whether the targets of an encoder are numbers rather than classes."""
        return self.head_loss in REGRESSION_LOSSES

    @property
    def tied_head(self) -> bool:
        """Whether the head is the embedding of the tokens that it predicts; an encoder's head never is."""
        if self.network == "encoder_decoder":
            return self.traits.tied_head_of_pair
        return self.traits.tied_head and self.network == "decoder"

    @property
    def epsilon(self) -> float:
        """The epsilon of every norm."""
        return NORM_EPSILONS[self.traits.norm] if self.norm_epsilon is None else self.norm_epsilon

    @property
    def base(self) -> float:
        """The base of the rotary frequencies."""
        return ROTARY_BASE if self.rotary_base is None else self.rotary_base

    def violations(self) -> list[str]:
        """One sentence for each invalid value."""
        return [*self._invalid()] or [*self._misfits()]

    def _invalid(self) -> Iterator[str]:
        """One sentence for each value that is not valid by itself, or with other sizes."""
        sizes = ("vocab_size", "d_model", "n_blocks", "n_heads", "d_ffn", "max_seq_len")
        wrong = [name for name in sizes if not _is_size(getattr(self, name))]
        for name in wrong:
            yield f"{name}={getattr(self, name)!r}: must be a whole number of at least 1"
        if not wrong and self.d_model % self.n_heads:
            yield heads_violation(self.d_model, self.n_heads)
        elif not wrong and self.architecture in ARCHITECTURES:
            yield from architecture_violations(
                self.architecture, self.activation, self.d_model, self.n_heads, self.n_kv_heads
            )
        for name, rule in (("norm_epsilon", NORM_EPSILON_RULE), ("rotary_base", ROTARY_BASE_RULE)):
            try:
                rule.read(getattr(self, name))
            except ValueError as error:
                yield f"{name}={getattr(self, name)!r}: {error}"
        if self.rotary_base is not None and self.architecture in ARCHITECTURES and self.traits.positions != "rotary":
            yield (
                f"rotary_base={self.rotary_base}: architecture={self.architecture} has {self.traits.positions} "
                "positions; leave it out, or use architecture=llama"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            yield f"seed={self.seed!r}: must be a whole number"
        kind, _, index = str(self.device).partition(":")
        if self.device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
            mps = "; Apple's GPUs are not supported, use cpu" if kind == "mps" else ""
            yield f"device={self.device!r}: must be auto, cpu, cuda, or cuda:1 for the second GPU{mps}"
        if self.precision == "tf32" and self.device == "cpu":
            yield "precision=tf32: only an NVIDIA GPU has it, and this is device=cpu; use precision=fp32"
        for name in ("dropout", "label_smoothing"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                yield f"{name}={value!r}: must be a probability, at least 0 and less than 1"
        padding, sized = self.padding_token_id, isinstance(self.vocab_size, int)
        if padding is not None and (type(padding) is not int or (sized and not 0 <= padding < self.vocab_size)):
            last = self.vocab_size - 1 if sized else "vocab_size - 1"
            yield f"padding_token_id={padding!r}: must be a token id, 0 to {last}, or None"
        for name, choices in (
            ("architecture", tuple(ARCHITECTURES)),
            ("activation", (None, *ACTIVATIONS)),
            ("precision", PRECISIONS),
            ("kernels", KERNELS),
            ("compile", COMPILE),
            ("recompute", RECOMPUTE),
            ("network", NETWORKS),
            ("positions", (None, *POSITIONS)),
            ("pooling", POOLINGS),
            ("head_loss", HEAD_LOSSES),
        ):
            if getattr(self, name) not in choices:
                yield f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(str, choices))}"

    def _misfits(self) -> Iterator[str]:
        """One sentence for each value that does not fit the kind of network, if each value by itself is valid."""
        for name, kinds in (
            ("n_encoder_blocks", ("encoder", "encoder_decoder")),
            ("source_vocab_size", ("encoder_decoder",)),
            ("max_source_len", ("encoder_decoder",)),
            ("n_inputs", ("encoder",)),
            ("n_outputs", ("encoder",)),
        ):
            value = getattr(self, name)
            if value is not None and not _is_size(value):
                yield f"{name}={value!r}: must be a whole number of at least 1, or null"
            elif value is not None and self.network not in kinds:
                yield f"{name}={value}: belongs to network={' or '.join(kinds)}, and this is {self.network}"
        if self.network == "encoder" and self.n_outputs is None:
            yield "n_outputs=null: an encoder needs the number of classes, or of numbers, that it predicts"
        yield from positions_violations(self.architecture, self.positions)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def multiples(number: int, divisor: int) -> str:
    """The multiples of `divisor` next to a number, as in 60 or 64."""
    near = number // divisor * divisor, -(-number // divisor) * divisor
    return " or ".join(str(multiple) for multiple in near if multiple)


def heads_violation(d_model: int, n_heads: int, group: str = "") -> str:
    """The sentence about a `d_model` that `n_heads` does not divide; `group` is put before the names of keys."""
    return (
        f"{group}d_model={d_model}: must be divisible by {group}n_heads={n_heads}, since every head gets an equal "
        f"share; use {group}d_model={multiples(d_model, n_heads)}, or another {group}n_heads"
    )


def architecture_violations(
    name: str, activation: str | None, d_model: int, n_heads: int, n_kv_heads: int | None
) -> Iterator[str]:
    """One sentence for each value that does not fit the architecture, if each value by itself is valid."""
    traits = ARCHITECTURES[name]
    if activation not in (None, traits.activation) and "swiglu" in (activation, traits.activation):
        others = ", ".join(word for word in ACTIVATIONS if word != "swiglu")
        yield f"activation={activation}: architecture={name} supports {'swiglu' if traits.gated else others}"
    if traits.positions != "rotary" and n_kv_heads not in (None, n_heads):
        yield (
            f"n_kv_heads={n_kv_heads}: architecture={name} has as many as n_heads={n_heads}; leave it null, or use "
            "architecture=llama"
        )
    elif n_kv_heads is not None and (not isinstance(n_kv_heads, int) or n_kv_heads < 1 or n_heads % n_kv_heads):
        divisors = [str(d) for d in range(1, n_heads + 1) if n_heads % d == 0]
        yield (
            f"n_kv_heads={n_kv_heads}: must divide n_heads={n_heads}, since each serves equally many query heads; use "
            f"{' or '.join(divisors[-4:])}, or null for n_heads"
        )
    if traits.positions == "rotary" and d_model // n_heads % 2:
        yield (
            f"d_model={d_model}: a head of architecture={name} is rotated in pairs and needs an even width, but "
            f"d_model / n_heads = {d_model // n_heads}; use d_model={d_model + n_heads}, or another n_heads"
        )


def positions_violations(architecture: str, positions: str | None) -> Iterator[str]:
    """One sentence if the architecture does not support these positions: only llama has rotary ones."""
    own = ("rotary",) if ARCHITECTURES[architecture].positions == "rotary" else ("learned", "sinusoidal")
    if positions not in (None, *own, "none"):
        yield f"positions={positions}: architecture={architecture} supports {', '.join((*own, 'none'))}"


def network_of_state(state: Mapping[str, Any], checkpoint: Path) -> CustomTransformerConfig:
    """The network's config from a checkpoint's state. The content is not trusted: only known fields with valid values
    pass. Raises CheckpointError."""
    saved = state.get("network")
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{checkpoint} holds no network: its state has no entry `network`.")
    try:
        config = CustomTransformerConfig(**saved)
    except TypeError as error:
        raise CheckpointError(f"{checkpoint} was written by another version: {error}.") from error
    if violations := config.violations():
        raise CheckpointError(f"{checkpoint} describes no network that can be built: {'; '.join(violations)}.")
    return config
