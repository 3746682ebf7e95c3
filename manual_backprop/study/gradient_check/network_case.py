"""The test cases of networks: small networks of every kind, batches of odd shapes, and the gradients that are zero.

It is for networks what `op_case.py` is for ops. `network_check.py` checks a case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...common.batch import AnyBatch, Batch, EncoderBatch, PairBatch
from ...config.schema import CustomTransformerConfig
from ...models.network import block_names, reads_memory, tables_of
from ...ops import IGNORED

ODD = CustomTransformerConfig(  # all dimensions different, none a power of two
    vocab_size=17, d_model=18, n_blocks=2, n_heads=3, d_ffn=22, max_seq_len=9, precision="fp64", seed=3
)
ALL = slice(None)
SomeBatch = TypeVar("SomeBatch", Batch, PairBatch, EncoderBatch, AnyBatch)


def draw_batch(
    config: CustomTransformerConfig,
    B: int,
    T: int,
    seed: int = 0,
    *,
    segments: bool = False,
    S: int | None = None,
    lengths: list[int] | None = None,
) -> AnyBatch:
    """A batch of random tokens; some tokens of the vocabulary never occur, and some targets are ignored if there are
    enough of them.

    `segments`: whether a decoder's rows have segments. S is the length of an encoder-decoder's sources (None: T + 2, or
    the largest). `lengths` of padded rows (None: the first row is full; others have length 1, 0 if sources may be
    empty, and random lengths).
    """
    generator = torch.Generator().manual_seed(seed)
    if config.network == "encoder":
        return on_device(_draw_sequences(config, B, T, lengths, generator), config.get_device())
    tokens = torch.randint(max(config.vocab_size - 3, 1), (B, T), generator=generator)
    targets = torch.randint(config.vocab_size, (B, T), generator=generator)
    if B * T > 2:
        targets[torch.rand((B, T), generator=generator) < 0.25] = IGNORED
        targets[0, 0] = 0
    if config.network == "encoder_decoder":
        S = min(T + 2, config.source_length) if S is None else S
        vocab_size = config.source_vocab_size or config.vocab_size
        source = torch.randint(max(vocab_size - 3, 1), (B, S), generator=generator)
        pairs = PairBatch(source, _draw_lengths(lengths, B, S, 0, generator), tokens, targets, first_row=2)
        return on_device(pairs, config.get_device())
    documents = None
    if segments:
        place = torch.arange(T)
        first = torch.randint(1, max(T, 2), (B, 1), generator=generator)  # start of the second document
        documents = torch.where(place > T - 2, -1, (place >= first).long())
    return on_device(Batch(tokens, targets, documents, first_row=2), config.get_device())


def _draw_lengths(given: list[int] | None, B: int, S: int, least: int, generator: torch.Generator) -> Tensor:
    if given is not None:
        return torch.tensor(given)
    lengths = torch.randint(1, S + 1, (B,), generator=generator)
    lengths[0], lengths[1:2], lengths[2:3] = S, 1, least
    return lengths


def _draw_sequences(
    config: CustomTransformerConfig, B: int, T: int, lengths: list[int] | None, generator: torch.Generator
) -> EncoderBatch:
    dtype, outputs = config.get_dtype(), config.n_outputs or 1
    if config.n_inputs is None:
        inputs = torch.randint(max(config.vocab_size - 3, 1), (B, T), generator=generator)
    else:
        inputs = torch.randn(B, T, config.n_inputs, generator=generator, dtype=torch.float64).to(dtype)
    if config.predicts_numbers:
        targets = torch.randn(B, outputs, generator=generator, dtype=torch.float64).to(dtype)
        targets[torch.rand(B, outputs, generator=generator) < 0.25] = torch.nan
        targets[0, 0] = 0.5
    else:
        targets = torch.randint(outputs, (B,), generator=generator)
        targets[2:3] = IGNORED
    return EncoderBatch(inputs, _draw_lengths(lengths, B, T, 1, generator), targets, first_row=2)


def on_device(batch: AnyBatch, device: torch.device | str) -> AnyBatch:
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors_of(batch).items()}
    return replace(batch, **moved)


def tensors_of(batch: AnyBatch) -> dict[str, Tensor]:
    """The tensors of a batch, by name."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def rows_of(batch: SomeBatch, rows: slice | Tensor, first_row: int = 0) -> SomeBatch:
    """Some rows of a batch as a batch; its first row is row `first_row` of the optimizer step."""
    changed: dict[str, Any] = {name: tensor[rows].contiguous() for name, tensor in tensors_of(batch).items()}
    return replace(batch, first_row=first_row, **changed)


def counting(batch: AnyBatch) -> Tensor:
    """True where a target counts, in the shape of the targets."""
    targets = batch.targets
    return ~targets.isnan() if targets.is_floating_point() else targets != IGNORED


def counted(batch: AnyBatch) -> int:
    """The number of targets that count."""
    return int(counting(batch).sum())


# Gradients that are zero


def wholly_zero(config: CustomTransformerConfig, batch: AnyBatch) -> set[str]:
    """Parameters whose whole gradient is zero up to rounding: two correct implementations differ by all of it, so each
    is compared with zero and not with the other."""
    return {
        name for name, _, rows in zero_by_structure(config, batch) if isinstance(rows, slice) and rows.start is None
    }


def zero_by_structure(config: CustomTransformerConfig, batch: AnyBatch) -> Iterator[tuple[str, str, Tensor | slice]]:
    """Gradients that are zero by structure, whatever the numbers: parameter, reason, its rows. This is the only list.

    A key's bias shifts all scores of a query by the same number, which softmax ignores. If every query sees at most one
    key, the only probability is 1, whatever the score. If no query sees a key, a cross-attention has no gradient except
    in the bias of its output, and the encoder has none at all.
    """
    lengths = {stack: length for stack, _, length in _read_by(batch)}
    for block in block_names(config):
        most_keys = {"attention": lengths[block.partition("blocks.")[0]]}  # that one of their queries sees
        if reads_memory(config, block):
            most_keys["cross_attention"] = lengths["encoder."]
        for attention, keys in most_keys.items():
            place = f"{block}.{attention}."
            if config.traits.biases:
                yield f"{place}key.bias", "softmax ignores it", ALL
            if keys <= 1:
                for name in ("query.weight", "key.weight", *(["query.bias"] * config.traits.biases)):
                    yield place + name, "one key at most" if keys else "no key", ALL
    yield from _unused_rows(config, batch)


def _unused_rows(config: CustomTransformerConfig, batch: AnyBatch) -> Iterator[tuple[str, str, Tensor | slice]]:
    """The rows of the embedding tables (tokens and positions) that a batch does not read."""
    read: dict[str, list[Tensor]] = {}  # ids, by table
    tables = tables_of(config)
    for stack, ids, length in _read_by(batch):
        table, places = tables[stack]
        read.setdefault(table, []).append(ids.flatten().cpu())
        rows = config.source_length if places.startswith("source_") else config.max_seq_len
        if config.position_kind == "learned" and rows > length:
            yield places, "beyond the longest", slice(length, None) if length else ALL
    for table, all_ids in read.items():
        if config.n_inputs is not None or (config.tied_head and table == "token_embedding.weight"):
            continue
        size = config.source_vocab_size if table.startswith("source_") else config.vocab_size
        unused = torch.ones(size or 0, dtype=torch.bool)
        unused[torch.cat(all_ids)] = False
        if unused.any():
            yield table, "unused tokens", unused.nonzero()[:, 0] if not unused.all() else ALL


def _read_by(batch: AnyBatch) -> Iterator[tuple[str, Tensor, int]]:
    """For each stack: its name, the ids that it reads without padding, and the number of positions."""
    if isinstance(batch, Batch):
        yield "", batch.tokens, batch.tokens.shape[1]
        return
    rows, lengths = (
        (batch.inputs, batch.lengths) if isinstance(batch, EncoderBatch) else (batch.source, batch.source_lengths)
    )
    real = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    yield "encoder.", rows[real], int(lengths.max())
    if isinstance(batch, PairBatch):
        yield "decoder.", batch.tokens, batch.tokens.shape[1]


# Cases


def odd_cases(architecture: str) -> Iterator[tuple[str, CustomTransformerConfig, AnyBatch, str]]:
    """Small decoders of one architecture that together cover every code path: name, config, batch, scale."""
    plain, rich = _plain_and_rich(architecture)
    yield "plain", plain, draw_batch(plain, 2, 7), "proof"
    yield "initial scale", plain, draw_batch(plain, 2, 7, seed=1), "initial"
    yield "segments, dropout", rich, draw_batch(rich, 3, 9, segments=True), "proof"
    if plain.traits.gated:
        for n_heads, n_kv_heads in ((3, 1), (9, 3)):
            config = replace(rich, n_heads=n_heads, n_kv_heads=n_kv_heads, n_blocks=1)
            batch = draw_batch(config, 2, 5, seed=2, segments=True)
            yield f"{n_heads} heads share {n_kv_heads}", config, batch, "proof"
    else:
        for activation in ("gelu_tanh", "gelu", "relu"):
            config = replace(plain, activation=activation, n_blocks=1)
            yield activation, config, draw_batch(config, 2, 5, seed=2), "proof"
    yield "T=1", plain, draw_batch(plain, 3, 1, seed=3), "proof"
    yield "B=1 T=1", rich, draw_batch(rich, 1, 1, seed=4), "proof"
    deep = replace(rich, n_blocks=3, n_heads=9)
    yield "8 rows", deep, draw_batch(deep, 8, 6, seed=5), "proof"


def _plain_and_rich(architecture: str) -> tuple[CustomTransformerConfig, CustomTransformerConfig]:
    plain = replace(ODD, architecture=architecture)
    rich = replace(plain, dropout=0.2, label_smoothing=0.1, norm_epsilon=0.3)
    return plain, replace(rich, rotary_base=30.0) if plain.traits.positions == "rotary" else rich


def odd_pairs(architecture: str) -> Iterator[tuple[str, CustomTransformerConfig, AnyBatch, str]]:
    """The same for encoder-decoders. The first one is the typical one: S != T, sources of all lengths."""
    plain, rich = (
        replace(config, network="encoder_decoder", n_encoder_blocks=3, max_source_len=11)
        for config in _plain_and_rich(architecture)
    )
    rich = replace(rich, source_vocab_size=13, n_encoder_blocks=1, n_kv_heads=1 if plain.traits.gated else None)
    yield "plain", plain, draw_batch(plain, 4, 7, S=10), "proof"
    yield "initial scale", plain, draw_batch(plain, 3, 8, seed=1, S=5), "initial"
    yield "S < T, dropout", rich, draw_batch(rich, 4, 9, seed=2, S=4), "proof"
    nowhere = replace(plain, positions="none", n_blocks=1, n_encoder_blocks=1)
    yield "positions=none", nowhere, draw_batch(nowhere, 2, 5, seed=3, S=6), "proof"
    yield "S=1", plain, draw_batch(plain, 3, 6, seed=4, S=1), "proof"
    yield "T=1", rich, draw_batch(rich, 3, 1, seed=5, S=8), "proof"
    yield "B=1 S=1 T=1", rich, draw_batch(rich, 1, 1, seed=6, S=1), "proof"
    yield "one real token a row", rich, draw_batch(rich, 2, 5, seed=7, S=4, lengths=[1, 1]), "proof"
    yield "empty sources", plain, draw_batch(plain, 2, 5, seed=8, S=3, lengths=[0, 0]), "proof"


def odd_encoders(architecture: str) -> Iterator[tuple[str, CustomTransformerConfig, AnyBatch, str]]:
    """The same for encoders: with tokens and with numbers as inputs, with classes and with numbers as targets."""
    plain, rich = (replace(config, network="encoder", n_outputs=5) for config in _plain_and_rich(architecture))
    numbers = replace(rich, n_inputs=4, head_loss="squared_error", n_blocks=1, label_smoothing=0.0)
    yield "classes", plain, draw_batch(plain, 4, 7), "proof"
    yield "initial scale", plain, draw_batch(plain, 3, 8, seed=1), "initial"
    yield "numbers, dropout", numbers, draw_batch(numbers, 4, 9, seed=2), "proof"
    first = replace(rich, pooling="first", positions="none")
    yield "the first position", first, draw_batch(first, 3, 6, seed=3), "proof"
    yield "T=1", plain, draw_batch(plain, 3, 1, seed=4), "proof"
    yield "B=1 T=1", numbers, draw_batch(numbers, 1, 1, seed=5), "proof"
    yield "one real token a row", rich, draw_batch(rich, 2, 5, seed=6, lengths=[1, 1]), "proof"
    yield "an empty row", plain, draw_batch(plain, 2, 5, seed=7, lengths=[3, 0]), "proof"
