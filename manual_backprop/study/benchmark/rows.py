"""One measuring process: it builds the network of its row, warms up, and runs steps on request.

Every row has the same weights, random tokens, optimizer, settings, threads and settings of the C library's allocator.
No row asks PyTorch for less precision, or to flush denormal numbers. If PyTorch has a faster library for float32
products than the one that it calls, every peer has a row that uses it. A step is forward, loss, backward, clipping and
the update.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ...common.allocator import keep_freed_memory, resident_bytes, trim_freed_memory
from ...common.errors import first_line
from ..paired_timing import wait_for
from .cases import BY_HAND, ONEDNN, Case, compile_mode, is_compiled, network_of, uses_onednn
from .process_memory import peak_since_reset, reset_peak

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...common.batch import Batch, PairBatch
    from ...models.network import Network
    from ...optim.optimizers import Optimizer
    from .peers import HuggingFacePeer

WARM_UP = 3  # steps, after the first two: one may compile, and one is recorded (replay.py) or captured (graph.py)
TURN = 0.3  # [s] that a turn takes at least: it is as many steps as that needs
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
ADAMW: dict[str, Any] = {"weight_decay": 0.1, "betas": (0.9, 0.99)}
EPSILON = 1e-8
OWN = "the kernels' own"  # products (kernels/cpu/cpp/products.h)
PROBES = 4  # random directions onto which each gradient is projected


@dataclass(frozen=True)
class Answer:
    """The result of a row's first step.

    sketch: for each parameter, the norm of its gradient and its projections onto PROBES random directions.
    """

    loss: float
    sketch: dict[str, list[float]]


@dataclass(frozen=True)
class Ready(Answer):
    """A row that has warmed up.

    cache: the compiled code was found on disk (warm) or compiled now (cold); compiling failed and the row ran
    uncompiled (failed); or there was nothing to compile (none).
    products: the library of its matrix products.
    """

    first_seconds: float = 0.0  # of the first forward and backward pass, compilation included
    step_seconds: float = 0.0  # of a later step, roughly
    cache: str = "none"
    products: str = "unknown"


@dataclass(frozen=True)
class LeftOut:
    """A row that cannot run here, and why."""

    reason: str


class NetworkTrainer:
    """A network of this project with its own AdamW; the mirror with PyTorch's fused AdamW, like all peers."""

    def __init__(self, name: str, config: Any):
        from ...models.implementations import build_network

        self.implementation = network_of(name)
        self.network = build_network(self.implementation, config)
        self.device = self.network.device
        self.training_step: Any = None
        self.steps = 0
        by_torch = self.implementation == "torch"
        self.optimizer = fused_adamw(self.network) if by_torch else self.network.adamw(**ADAMW, epsilon=EPSILON)
        self.loss: Tensor | None = None
        if by_torch and is_compiled(name):
            import torch

            self.network.check_tokens = torch.compiler.disable(self.network.check_tokens)  # type: ignore[method-assign]
            compiled = torch.compile(self.network.loss_and_gradients, mode=compile_mode(name))
            self.network.loss_and_gradients = compiled  # type: ignore[method-assign]
        if self.implementation == "baseline":
            self.network.compile_mode = compile_mode(name)  # type: ignore[attr-defined]

    def loss_and_gradients(self, batch: Batch | PairBatch) -> Tensor:
        """The loss and gradients of this batch; earlier gradients are overwritten."""
        self.network.zero_gradients()
        self.loss = self.network.loss_and_gradients(batch, denominator=batch.targets.numel(), step=1)
        return self.loss

    def update(self, max_grad_norm: float) -> None:
        assert self.loss is not None
        self.optimizer.step(self.loss, LEARNING_RATE, max_grad_norm=max_grad_norm)

    def step(self, batch: Batch | PairBatch, max_grad_norm: float) -> None:
        """One step; that of the hand-written network on a GPU is one CUDA graph, as in a run."""
        if self.implementation != "custom" or self.device.type != "cuda":
            self.loss_and_gradients(batch)
            self.update(max_grad_norm)
            return
        if self.training_step is None:
            from ...models import training_step

            self.training_step = training_step.TrainingStep(self.network, self.optimizer, max_grad_norm)
        self.steps += 1
        self.training_step([batch], batch.targets.numel(), LEARNING_RATE, self.steps)

    def gradients(self) -> Mapping[str, Tensor]:
        return self.network.gradients


def fused_adamw(network: Network) -> Optimizer:
    """PyTorch's fused AdamW over the leaves of the mirror."""
    import torch

    from ...models.mirror import TorchTransformer
    from ...optim.torch_optimizers import TorchOptimizer

    assert isinstance(network, TorchTransformer)
    places: Any = {name: (leaf, slice(None)) for name, leaf in network.leaves.items()}
    settings = {"betas": ADAMW["betas"], "eps": EPSILON}
    return TorchOptimizer(torch.optim.AdamW, places, ADAMW["weight_decay"], settings, ("exp_avg", "exp_avg_sq"))


def build(name: str, case: Case) -> NetworkTrainer | HuggingFacePeer:
    """The trainer of a row, with a new network."""
    compiled = is_compiled(name)
    settings = BY_HAND.get(name, BY_HAND["custom-reference"])
    compiles = compiled or settings["kernels"] == "fused"  # the kernels have some compiled functions
    config = replace(case.config, compile="always" if compiles else "never", **settings)  # type: ignore[arg-type]
    if network_of(name) != "huggingface":
        return NetworkTrainer(name, config)
    from .peers import HuggingFacePeer

    peer = HuggingFacePeer(config, LEARNING_RATE, ADAMW | {"eps": EPSILON})
    if compiled:
        peer.compile(compile_mode(name))
    return peer


def random_batch(case: Case, device: torch.device) -> Batch | PairBatch:
    """A batch of full sequences; for an encoder-decoder, sources as long as targets."""
    import torch

    from ...common.batch import Batch, PairBatch

    shape = (case.batch_size, case.config.max_seq_len + 1)
    tokens = torch.randint(case.config.vocab_size, shape, generator=torch.Generator().manual_seed(1)).to(device)
    read, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if case.config.network == "encoder_decoder":
        lengths = torch.full((case.batch_size,), case.config.max_seq_len, device=device)
        return PairBatch(read.flip(1), lengths, read, targets)
    return Batch(read, targets)


def sketch_of(gradients: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Each gradient's norm, and its projections onto standard normal directions, the same in every process.

    For two gradients g and h, the mean square of the differences of their projections is |g - h|^2 on average.
    """
    import torch

    sketch = {}
    for name, gradient in gradients.items():
        values = gradient.detach().double().cpu().flatten()
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        probes = (torch.randn(len(values), generator=generator).double() for _ in range(PROBES))
        sketch[name] = [values.norm().item(), *(values.dot(probe).item() for probe in probes)]
    return sketch


def prepare(name: str, case: Case) -> None:
    """Settings and imports, the same for every row. It imports the compiler's modules too, since AdamW imports half of
    them."""
    keep_freed_memory()
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx

    torch.set_num_threads(case.threads)
    from ...models.implementations import build_network  # noqa: F401

    if network_of(name) == "huggingface":
        from .peers import network_class

        network_class(case.config)


def work(end: Connection, name: str, case: Case) -> None:
    """A measuring process: sends Ready or LeftOut. Then it answers `turn` with the seconds of a step, and `peak` with
    the peak memory in bytes without the imports, None if the system does not report it."""
    if network_of(name) == "huggingface":
        from .peers import why_not

        if reason := why_not(case.config):
            return end.send(LeftOut(reason))
    prepare(name, case)
    import torch

    from ...kernels.cpu.products import onednn_is_exact

    after_imports = resident_bytes("VmRSS")
    if name.endswith(ONEDNN) and not onednn_is_exact():
        return end.send(LeftOut("here oneDNN has no exact float32 products, so ours use PyTorch's library too"))
    with switches(name, case):
        try:
            steps = Steps(name, case)
            ready = steps.warm_up()
        except torch.OutOfMemoryError:
            reason = "the GPU has no memory for it beside the other rows; measure it alone, with --rows"
            return end.send(LeftOut(reason))
        if isinstance(ready, LeftOut):
            return end.send(ready)
        known = reset_peak(steps.device)
        end.send(ready)
        in_a_turn = max(1, round(TURN / ready.step_seconds))
        while True:
            question = end.recv()
            if question == "peak":
                end.send(peak_since_reset(steps.device, after_imports) if known else None)
            else:
                end.send(steps.seconds(in_a_turn))


@contextmanager
def switches(name: str, case: Case) -> Iterator[None]:
    """A context with PyTorch's settings for all steps of a row."""
    from ...kernels.cpu.products import fastest_products

    with fastest_attention(case), fastest_products() if name.endswith(ONEDNN) else nullcontext():
        yield


def fastest_attention(case: Case) -> AbstractContextManager:
    """A context in which PyTorch's attention on a GPU prefers cuDNN's kernel, the fastest on Hopper, for every row."""
    if case.config.get_device().type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


class Steps:
    """A row's trainer and batch, and the timing of its steps."""

    def __init__(self, name: str, case: Case):
        self.name, self.case, self.compiled = name, case, is_compiled(name)
        self.trainer = build(name, case)
        self.device = self.trainer.device
        self.batch = random_batch(case, self.device)

    def warm_up(self) -> Ready | LeftOut:
        import torch

        network = getattr(self.trainer, "network", None)
        begin = perf_counter()
        try:
            loss = self.trainer.loss_and_gradients(self.batch).item()
        except Exception as error:
            if not self.compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            return LeftOut(f"torch.compile does not work here: {first_line(error)}")
        first_seconds = perf_counter() - begin
        if self.compiled and getattr(network, "compiled", None) is False:  # the baseline continued uncompiled
            return LeftOut("torch.compile does not work here")
        cache = kernels_cache() if self.calls_library else compiler_cache()
        sketch = sketch_of(self.trainer.gradients())
        self.seconds(1)
        gc.collect()
        trim_freed_memory()  # of the compiler, of the sketch
        self.seconds(WARM_UP)
        return Ready(loss, sketch, first_seconds, self.seconds(1), cache, self.products)

    @property
    def calls_library(self) -> bool:
        """Whether its steps call the compiled library of the kernels."""
        return getattr(getattr(self.trainer, "network", None), "uses_library", False) and self.device.type == "cpu"

    @property
    def products(self) -> str:
        """The library of its matrix products. Ask after a step, which may compile it."""
        from ...kernels.cpu.products import has_products

        if self.calls_library and self.case.config.precision != "fp64" and has_products():
            return OWN
        return library_of_products(self.name, self.case)

    def seconds(self, count: int) -> float:
        """The mean seconds of one step."""
        begin = perf_counter()
        for _ in range(count):
            self.trainer.step(self.batch, MAX_GRAD_NORM)
        wait_for(self.device)
        return (perf_counter() - begin) / count


def library_of_products(name: str, case: Case) -> str:
    """The library that PyTorch calls for a row's matrix products."""
    import torch

    from ...kernels.cpu.products import onednn_is_exact

    if case.config.get_device().type == "cuda":
        return "cuBLAS"
    reduced = case.config.precision in ("bf16", "bf16_mixed")
    if reduced and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN"
    if case.config.precision == "fp32" and uses_onednn(name) and onednn_is_exact():
        return "oneDNN"
    return "MKL" if torch.backends.mkl.is_available() and not reduced else "PyTorch's own"


def kernels_cache() -> str:
    """The cache state of the kernels' library; its compiler runs in another process."""
    from ...kernels.cpu.compiled import compiling_failed, newly_compiled

    return "failed" if compiling_failed() else "cold" if newly_compiled() else "warm"


def compiler_cache() -> str:
    """The cache state of torch.compile in this process."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    if found["fxgraph_cache_miss"] or found["fxgraph_cache_bypass"]:
        return "cold"
    return "warm" if found["fxgraph_cache_hit"] else "none"


def work_answer(end: Connection, name: str, case: Case) -> None:
    """A process that sends the Answer of a row, or LeftOut, and ends."""
    prepare(name, case)
    import torch

    with switches(name, case):
        try:
            steps = Steps(name, case)
            loss = steps.trainer.loss_and_gradients(steps.batch).item()
            end.send(Answer(loss, sketch_of(steps.trainer.gradients())))
        except torch.OutOfMemoryError:
            end.send(LeftOut("the GPU has no memory for it"))


def work_products(end: Connection, case: Case) -> None:
    """A measuring process for the matrix products of a step alone: sends roughly the seconds of a step, then answers
    `turn`."""
    import torch

    from .products import ProductsOfAStep

    keep_freed_memory()
    torch.set_num_threads(case.threads)
    products = ProductsOfAStep(case.config, case.batch_size)
    products.step()
    seconds = products.seconds(1)
    end.send(seconds)
    in_a_turn = max(1, round(TURN / seconds))
    while end.recv():
        end.send(products.seconds(in_a_turn))
