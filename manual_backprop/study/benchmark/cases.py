"""What the bench measures: networks with a batch size and a number of threads, and the named cases.

Imports the standard library only, so that bad input is reported before torch is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ...config.schema import CustomTransformerConfig

BY_HAND: dict[str, dict[str, str]] = {  # row: settings of its config
    "custom-reference": {"kernels": "reference"},
    "custom-fused": {"kernels": "fused"},
    "custom-recompute": {"kernels": "fused", "recompute": "block"},
}
GRAPHS = "-graphs"  # after a compiled peer's name, on a GPU: its passes are CUDA graphs (mode="reduce-overhead")
ONEDNN = "-onednn"  # after a peer's name: its float32 products use the faster one of PyTorch's libraries
_PEERS = {
    f"{network}-{how}": network for network in ("torch", "baseline", "huggingface") for how in ("eager", "compiled")
}
ROWS = dict.fromkeys(BY_HAND, "custom") | {  # name: the implementation of its network
    name + library: network for name, network in _PEERS.items() for library in ("", ONEDNN)
}
OURS = tuple(BY_HAND)
SUBJECT = "custom-fused"  # all other rows are compared with it


def network_of(name: str) -> str:
    """The implementation of a row's network."""
    return ROWS[name.removesuffix(GRAPHS)]


def is_compiled(name: str) -> bool:
    """Whether a row's whole step goes through `torch.compile`."""
    return name.removesuffix(ONEDNN).removesuffix(GRAPHS).endswith("-compiled")


def compile_mode(name: str) -> str | None:
    """The mode of `torch.compile` for a compiled row."""
    return "reduce-overhead" if name.endswith(GRAPHS) else None


def uses_onednn(name: str) -> bool:
    """Whether a row requests oneDNN's float32 products; whether it gets them depends on the processor."""
    return name.endswith(ONEDNN) or BY_HAND.get(name, {}).get("kernels") == "fused"


@dataclass(frozen=True)
class Bar:
    """The limits that the subject must meet compared with the fastest peer."""

    time: float  # peer / ours, at least
    memory: float | None = None  # ours / peer, at most


@dataclass(frozen=True)
class Case:
    """One case to measure."""

    config: CustomTransformerConfig
    batch_size: int  # B [sequences]
    threads: int
    name: str = ""
    bar: Bar | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens of a step."""
        return self.batch_size * self.config.max_seq_len

    def describe(self) -> str:
        config = self.config
        name = f"{self.name}: " if self.name else ""
        encoder = f"{config.n_encoder_blocks or config.n_blocks}+" if config.network == "encoder_decoder" else ""
        return (
            f"{name}{config.architecture}, V={config.vocab_size} T={config.max_seq_len} L={encoder}{config.n_blocks} "
            f"H={config.n_heads} D={config.d_model} B={self.batch_size}, {config.precision}, "
            f"{config.device}, {self.threads} threads"
        )


def without_effect(name: str, case: Case) -> str | None:
    """Why a row would equal another row in this case, as far as known without torch; None if it differs."""
    if not name.endswith(ONEDNN):
        return None
    if case.config.device != "cpu":
        return "it is about a CPU's products"
    if case.config.precision == "fp64":
        return "oneDNN has no products in float64"
    if case.config.precision != "fp32":
        return f"in {case.config.precision} PyTorch multiplies by oneDNN anyway"
    return None


@dataclass(frozen=True)
class NamedCase:
    about: str
    sizes: Mapping[str, int]
    batch_size: int
    bars: Mapping[str, Bar | None]  # by precision; these are the precisions that are measured
    device: str = "cpu"
    network: str = "decoder"

    def case(self, name: str, precision: str, threads: int, batch_size: int | None) -> Case:
        """The case with these settings. `batch_size` None: the case's own; with another one there is no bar."""
        fields = dict(self.sizes) | {"network": self.network, "precision": precision, "device": self.device}
        config = CustomTransformerConfig.of(fields)
        bar = self.bars.get(precision) if batch_size in (None, self.batch_size) else None
        return Case(config, batch_size or self.batch_size, threads, name, bar)


def _sizes(V: int, T: int, L: int, H: int, D: int) -> dict[str, int]:
    return {"vocab_size": V, "max_seq_len": T, "n_blocks": L, "n_heads": H, "d_model": D, "d_ffn": 4 * D}


def _bars(*limits: tuple[float, ...]) -> dict[str, Bar | None]:
    """The limits of time and memory in each precision of a CPU's case."""
    return {precision: Bar(*limit) for precision, limit in zip(("fp32", "bf16", "bf16_mixed"), limits, strict=True)}


SMALL, MEDIUM = _sizes(65, 64, 4, 4, 128), _sizes(8192, 256, 6, 6, 384)
GPT2 = {"V": 50257, "L": 12, "H": 12, "D": 768}
CASES = {
    "C1": NamedCase("nanoGPT's README on a CPU", SMALL, 12, _bars((1.4, 0.9), (2.6, 0.8), (2.4, 0.9))),
    "C2": NamedCase("6 blocks of 384", MEDIUM, 16, _bars((1.15, 0.56), (1.6, 0.65), (1.5, 0.75))),
    "C3": NamedCase("a large vocabulary", _sizes(50257, 256, 4, 4, 256), 8, _bars((1.2, 0.5), (1.8, 0.6), (1.5, 0.75))),
    "C4": NamedCase("GPT-2, 124M", _sizes(T=512, **GPT2), 1, _bars((1.15,), (1.5, 1.0), (1.3, 0.9))),
    "S1": NamedCase(
        "an encoder-decoder of 1+1 blocks, for sources and targets of 18 tokens",
        _sizes(13, 18, 1, 8, 128),
        64,
        {"fp32": None, "bf16_mixed": None},
        network="encoder_decoder",
    ),
    "G1": NamedCase("GPT-2, 124M, on a GPU", _sizes(T=1024, **GPT2), 64, {"bf16_mixed": Bar(1.15)}, "cuda"),
    "G3": NamedCase("6 blocks of 384 on a GPU", MEDIUM, 64, {"bf16_mixed": Bar(1.5)}, "cuda"),
    "G4": NamedCase("C1 on a GPU", SMALL, 12, {"bf16_mixed": Bar(5.0)}, "cuda"),
}
