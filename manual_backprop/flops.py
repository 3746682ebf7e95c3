"""How much arithmetic a step is, and how much of it this machine does in a second.

FLOPs of a token: 6 x (weights that enter a matrix product, the vocabulary projection included even when tied)
+ 12 L D T.
Forward takes 2 for each weight (a product and a sum), backward 4; the last term is attention's scores and context.
"""

from __future__ import annotations

import time

import torch

from .config import CustomTransformerConfig

SIDE = 1024  # of the square matrices whose product is timed


def flops_per_token(config: CustomTransformerConfig, sequence_length: int) -> int:
    """Of one token in one training step, forward and backward [FLOPs]."""
    d_model = config.d_model
    block = 4 * d_model * d_model + 2 * d_model * config.d_ffn
    weights = config.n_blocks * block + config.vocab_size * d_model
    return 6 * weights + 12 * config.n_blocks * d_model * sequence_length


def matrix_product_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.1) -> float:
    """What this machine reaches on matrix products alone, in this format and with the threads torch has now [FLOP/s].

    The best of many products within `seconds`, after a warm-up.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIDE, SIDE, generator=generator).to(dtype).to(device) for _ in range(2))
    shortest = float("inf")
    a @ b
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        _wait(device)
        begin = time.perf_counter()
        a @ b
        _wait(device)
        shortest = min(shortest, time.perf_counter() - begin)
    return 2 * SIDE**3 / shortest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
