"""The FLOPs of a training step, and the FLOP/s that this machine reaches.

FLOPs of a token: 6 x (weights that enter a matrix product, the vocabulary projection included even when tied)
+ 12 L D T, where L counts attentions.
Forward takes 2 for each weight (a product and a sum), backward 4; the last term is attention's scores and context.
"""

from __future__ import annotations

import functools
import time
from contextlib import nullcontext

import torch

from ..config.schema import CustomTransformerConfig
from ..kernels.cpu.products import fastest_products

SIDES = {"cpu": (512, 1024), "cuda": (4096, 8192)}  # of the square matrices whose product is timed


def flops_per_token(config: CustomTransformerConfig, sequence_length: int) -> int:
    """FLOPs of one token in one training step, forward and backward. For an encoder-decoder: of one token of the target
    and one of the source, for sequences of equal length.

    The decoder's cross-attention counts as one more attention in each of its blocks: as many weights, as many scores.
    """
    d_model, blocks, attentions = config.d_model, config.n_blocks, config.n_blocks
    of_encoder = config.encoder_blocks
    head = config.vocab_size * d_model
    if config.network == "encoder":  # one row of numbers for all tokens of a sequence
        blocks = attentions = of_encoder
        head = (config.n_inputs or 0) * d_model + (config.n_outputs or 0) * d_model // sequence_length
    elif config.network == "encoder_decoder":
        blocks, attentions = config.n_blocks + of_encoder, 2 * config.n_blocks + of_encoder
    attention = 2 * d_model * d_model + 2 * d_model * config.kv_heads * config.d_head  # query, output; key, value
    feed_forward = (3 if config.traits.gated else 2) * d_model * config.d_ffn
    weights = attentions * attention + blocks * feed_forward + head
    return 6 * weights + 12 * attentions * d_model * sequence_length


def matrix_product_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.1) -> float:
    """The FLOP/s that this machine reaches on matrix products alone, in this dtype, with torch's current number of
    threads and the fastest library of PyTorch.

    It is the best of many products x @ weight.T of several sizes: a small one may end before another program takes the
    processor away, and a GPU needs large ones. Measured once per process.
    """
    return _measured_rate(dtype, device, torch.get_num_threads(), seconds)


@functools.cache
def _measured_rate(dtype: torch.dtype, device: torch.device, threads: int, seconds: float) -> float:
    generator = torch.Generator(device).manual_seed(0)
    best = 0.0
    for side in SIDES[device.type]:
        a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)  # allocating it each time would cost page faults
        with fastest_products() if device.type == "cpu" else nullcontext():
            torch.mm(a, b.T, out=product)
            start = time.perf_counter()
            while time.perf_counter() - start < seconds / len(SIDES[device.type]):
                _wait(device)
                begin = time.perf_counter()
                torch.mm(a, b.T, out=product)
                _wait(device)
                best = max(best, 2 * side**3 / (time.perf_counter() - begin))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
