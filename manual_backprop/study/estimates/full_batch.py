"""A batch of random tokens in which every row is as long as a network allows: what its steps cost at most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...config.schema import CustomTransformerConfig

if TYPE_CHECKING:
    import torch

    from ...common.batch import AnyBatch
    from ...models.network import Network


def full_batch(config: CustomTransformerConfig, rows: int, device: torch.device) -> AnyBatch:
    """Of `rows` rows, which all count."""
    import torch

    from ...common.batch import Batch, PairBatch

    T = config.max_seq_len
    tokens = (torch.arange(rows * T, device=device).view(rows, T) * 7919) % config.vocab_size
    if config.get("network", "decoder") == "decoder":
        return Batch(tokens, tokens)
    S = config.get("max_source_len") or T
    source = (torch.arange(rows * S, device=device).view(rows, S) * 7919) % config.vocab_size
    return PairBatch(source, torch.full((rows,), S, device=device), tokens, tokens)


def predicted(network: Network, batch: AnyBatch) -> Any:
    """The network's logits (B, T, V)."""
    from ...common.batch import Batch

    return network.predict(batch.tokens) if isinstance(batch, Batch) else network.predict(batch)  # type: ignore[arg-type]
