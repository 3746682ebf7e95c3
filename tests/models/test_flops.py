"""The formula for FLOPs against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manual_backprop import CustomTransformer, CustomTransformerConfig, TorchTransformer
from manual_backprop.common.batch import Batch, PairBatch
from manual_backprop.models.flops import flops_per_token, matrix_product_rate
from manual_backprop.models.implementations import build_network
from manual_backprop.models.recorder import Recorder


@pytest.mark.parametrize(
    ("architecture", "n_kv_heads"), [("gpt2", None), ("vaswani", None), ("llama", None), ("llama", 2)]
)
@pytest.mark.parametrize("network", [CustomTransformer, TorchTransformer])
@pytest.mark.parametrize("sequence_length", [1, 7, 16])
def test_formula_is_the_count(architecture: str, n_kv_heads: int | None, network: type, sequence_length: int) -> None:
    """Exactly: every product of a forward and a backward with attention spelled out, which the recorder asks for.

    The formula counts attention's scores without the half that causality hides, as they are computed.
    """
    config = CustomTransformerConfig(
        vocab_size=37,
        d_model=24,
        n_blocks=3,
        n_heads=4,
        n_kv_heads=n_kv_heads,
        d_ffn=52,
        max_seq_len=16,
        architecture=architecture,
    )
    model = network(config)
    model.recorder = Recorder("*.scores")
    tokens = torch.randint(0, 37, (2, sequence_length))
    with FlopCounterMode(display=False) as counter:
        model.loss_and_gradients(Batch(tokens, tokens), denominator=tokens.numel(), step=None)
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(config, sequence_length)


@pytest.mark.parametrize(("architecture", "n_kv_heads"), [("gpt2", None), ("vaswani", None), ("llama", 2)])
def test_the_formula_counts_two_stacks(architecture: str, n_kv_heads: int | None) -> None:
    """Also exactly, for sources as long as targets."""
    config = CustomTransformerConfig(
        vocab_size=37,
        d_model=24,
        n_blocks=3,
        n_encoder_blocks=2,
        n_heads=4,
        n_kv_heads=n_kv_heads,
        d_ffn=52,
        max_seq_len=16,
        architecture=architecture,
        network="encoder_decoder",
    )
    model = build_network("custom", config)
    tokens = torch.randint(0, 37, (2, 7))
    batch = PairBatch(tokens, torch.tensor([7, 7]), tokens, tokens)
    with FlopCounterMode(display=False) as counter:
        model.loss_and_gradients(batch, denominator=tokens.numel(), step=None)
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(config, 7)


def test_by_hand() -> None:
    """GPT-2 with 124 million parameters: 6 N and 12 L D T (Chowdhery et al. 2022, appendix B)."""
    config = CustomTransformerConfig(50257, d_model=768, n_blocks=12, n_heads=12, d_ffn=3072, max_seq_len=1024)
    weights = 12 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(config, 1024) == 6 * weights + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matrix_product_rate(dtype: torch.dtype) -> None:
    rate = matrix_product_rate(dtype, torch.device("cpu"), seconds=0.02)
    assert 1e6 < rate < 1e14
