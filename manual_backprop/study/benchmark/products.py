"""The matrix products of a training step and nothing else: a lower bound for the time of a step.

Outputs are written into existing tensors, since allocating them each time would cost page faults. A weight gradient is
dy^T x or the transpose of x^T dy, whichever is faster here. The products use the kernels' library, which may
differ from PyTorch's default.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...config.schema import CustomTransformerConfig
from ...kernels import compiles, fast
from ...kernels.cpu.products import product
from ..paired_timing import seconds_of, wait_for

Product = Callable[[], object]  # computes one matrix product


class ProductsOfAStep:
    """The products of one step with full sequences, in the dtype of the network's products. Attention computes all
    T x T scores, also those that the causal mask hides, as `flops_per_token` counts them."""

    def __init__(self, config: CustomTransformerConfig, batch_size: int):
        self.device = config.get_device()
        self.dtype = config.get_compute_dtype()
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.products: list[tuple[int, Product]] = []  # how often in a step, and the product
        d_model, d_head, kv_width = config.d_model, config.d_head, config.kv_heads * config.d_head
        L, T = config.n_blocks, config.max_seq_len
        N, heads = batch_size * T, batch_size * config.n_heads
        reads_source = config.network == "encoder_decoder"
        blocks = L + (config.n_encoder_blocks or L) if reads_source else L  # sources are as long as targets
        self._linear(blocks, N, d_model, d_model + 2 * kv_width)  # query, key and value
        self._attention(blocks, heads, T, d_head)
        self._linear(blocks, N, d_model, d_model)
        if reads_source:
            self._linear(2 * L, N, d_model, d_model)  # query and output
            self._linear(L, N, d_model, 2 * kv_width)  # key and value of the memory
            self._attention(L, heads, T, d_head)
        self._linear(blocks, N, d_model, (2 if config.traits.gated else 1) * config.d_ffn)
        self._linear(blocks, N, config.d_ffn, d_model)
        self._linear(1, N, d_model, config.vocab_size)

    def step(self) -> None:
        for count, compute in self.products:
            for _ in range(count):
                compute()

    def seconds(self, steps: int) -> float:
        """The time of the products of one step [s], the mean over `steps` of them."""
        wait_for(self.device)
        begin = time.perf_counter()
        with self._as_in_a_step():
            for _ in range(steps):
                self.step()
        wait_for(self.device)
        return (time.perf_counter() - begin) / steps

    def _linear(self, count: int, N: int, inputs: int, outputs: int) -> None:
        """y = x W^T, dx = dy W, dW = dy^T x."""
        x, weight, dy = self._matrices(N, inputs), self._matrices(outputs, inputs), self._matrices(N, outputs)
        y, dx, dweight = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)
        dweight_transposed = torch.empty_like(weight.mT, memory_format=torch.contiguous_format)
        self.products.append((count, lambda: product(y, x, weight.mT)))
        self.products.append((count, lambda: product(dx, dy, weight)))
        ways = lambda: product(dweight, dy.mT, x), lambda: product(dweight_transposed, x.mT, dy)
        self.products.append((count, min(ways, key=self._seconds)))

    def _attention(self, count: int, heads: int, T: int, d_head: int) -> None:
        """The products of all heads at once: S = Q K^T and dP = dO V^T; O = P V and dQ = dS K; dV = P^T dO and dK =
        dS^T Q."""
        query, key, probabilities = (self._matrices(heads, *shape) for shape in ((T, d_head), (T, d_head), (T, T)))
        scores, context = torch.empty_like(probabilities), torch.empty_like(query)
        self.products.append((2 * count, lambda: torch.bmm(query, key.mT, out=scores)))
        self.products.append((2 * count, lambda: torch.bmm(probabilities, key, out=context)))
        self.products.append((2 * count, lambda: torch.bmm(probabilities.mT, query, out=context)))

    def _as_in_a_step(self) -> AbstractContextManager[None]:
        return fast(compiles("auto", self.device), self.device)

    def _matrices(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def _seconds(self, product: Product) -> float:
        """The fastest of three calls [s], after one to warm up."""
        with self._as_in_a_step():
            _, *times = (seconds_of(product, self.device) for _ in range(4))
        return min(times)
