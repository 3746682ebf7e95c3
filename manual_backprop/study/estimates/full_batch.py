"""A batch of random tokens with rows of the largest length: it gives the highest cost of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...config.schema import CustomTransformerConfig

if TYPE_CHECKING:
    import torch

    from ...common.batch import AnyBatch
    from ...models.network import Network


def full_batch(config: CustomTransformerConfig, rows: int, device: torch.device) -> AnyBatch:
    """A batch of `rows` rows in which all targets count."""
    import torch

    from ...common.batch import Batch, EncoderBatch, PairBatch

    T = config.max_seq_len
    if config.network == "encoder":
        inputs, lengths = torch.zeros(rows, T, dtype=torch.int64), torch.full((rows,), T)
        if config.n_inputs is not None:
            inputs = torch.zeros(rows, T, config.n_inputs, dtype=config.get_dtype())
        targets = torch.zeros(rows, dtype=torch.int64)
        if config.predicts_numbers:
            targets = torch.zeros(rows, config.n_outputs or 1, dtype=config.get_dtype())
        return EncoderBatch(inputs.to(device), lengths.to(device), targets.to(device))
    tokens = (torch.arange(rows * T, device=device).view(rows, T) * 7919) % config.vocab_size
    if config.network == "decoder":
        return Batch(tokens, tokens)
    S = config.max_source_len or T
    source = (torch.arange(rows * S, device=device).view(rows, S) * 7919) % config.vocab_size
    return PairBatch(source, torch.full((rows,), S, device=device), tokens, tokens)


def next_token(network: Network, batch: AnyBatch) -> Callable[[], object]:
    """A function that reads one more token, after the first half of the batch's first row; for an encoder it reads the
    first row."""
    from ...common.batch import EncoderBatch, PairBatch
    from ...models.decoding.incremental import IncrementalDecoder

    if isinstance(batch, EncoderBatch):
        row = EncoderBatch(batch.inputs[:1], batch.lengths[:1], batch.targets[:1])
        return lambda: network.predict(row)
    if isinstance(batch, PairBatch):
        lengths = batch.source_lengths[:1]
        decoder = IncrementalDecoder(network, 1, network.encode(batch.source[:1], lengths), lengths)
    else:
        decoder = IncrementalDecoder(network)
    decoder.read(batch.tokens[:1, : max(1, batch.tokens.shape[1] // 2)])
    return lambda: decoder.read(batch.tokens[:1, :1])
