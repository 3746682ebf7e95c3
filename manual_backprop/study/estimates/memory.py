"""Estimates the peak memory of a run without allocating it.

It runs one optimizer step and one evaluation with PyTorch's fake tensors, which have a shape but no content, and counts
the tensors that are alive at the same time. So it works for every network, and stays right when the code changes. The
rest of a process's memory (Python, PyTorch, MLflow, the text) is measured here, or known from measurements.
"""

import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...common.allocator import resident_bytes
from ...config.schema import CustomTransformerConfig, RunConfig

log = logging.getLogger(__name__)

MB = 10**6
MLFLOW = 205 * MB  # its import, and its database
WORKSPACE = 35 * MB  # of matrix products, and of counting the bigrams of the text
LOW_PRECISION = 75 * MB  # of oneDNN for bfloat16 products on a CPU
COMPILER = 95 * MB  # the modules of torch's compiler, which torch.optim imports at its first step
PREPARATION = 125 * MB  # reading the built-in text and learning its tokens for the first time
FRAGMENTATION = 1.35  # freed memory is kept for the next step and is fragmented (allocator.keep_freed_memory)
TRACED_BLOCKS = 8  # blocks that are traced if the network has more than twice as many
TRACED_SEQUENCES = 32  # the same for sequences of a batch
FITS = 0.9  # of the memory may be used: the rest covers the error of an estimate
PIECEMEAL = 100_000_000  # parameters; in larger networks the temporaries of an update are negligible


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory at the peak of a run [bytes]."""

    process: int  # Python, PyTorch and other imports, without a network
    state: int  # parameters, gradients, moments
    working: int  # additional memory of a step or an evaluation, whichever is larger
    device: str  # of state and working memory

    @property
    def peak(self) -> int:
        return self.process + self.state + self.working

    @property
    def on_device(self) -> int:
        """The part that must fit into the device's memory."""
        return self.peak if self.device == "cpu" else self.state + self.working


def estimate_memory(config: RunConfig, network: CustomTransformerConfig, prepared: bool = True) -> MemoryEstimate:
    """The estimate for a run. `prepared`: the text is in the cache, so no tokenizer has to be trained first."""
    device = network.get_device().type
    process = (resident_bytes("VmRSS") or 0) + WORKSPACE
    process += MLFLOW if config.tracking.name == "mlflow" else 0
    process += 0 if prepared else PREPARATION
    process += COMPILER if config.implementation.name == "baseline" else 0
    process += LOW_PRECISION if device == "cpu" and network.get_compute_dtype().itemsize == 2 else 0
    state, step, evaluation = _trace(config, network)
    return MemoryEstimate(process, state, round(FRAGMENTATION * max(step, evaluation)), device)  # a save copies nothing


def parameter_count(network: CustomTransformerConfig) -> int:
    from ...models.network import parameter_shapes

    return sum(math.prod(shape) for shape in parameter_shapes(network).values())


def checkpoint_bytes(config: RunConfig, network: CustomTransformerConfig) -> int:
    """The size of a checkpoint: parameters and moments in their saved dtypes."""
    width = {"fp64": 8, "bf16": 2}.get(network.precision, 4)
    moment = 8 if network.precision == "fp64" else 4
    return parameter_count(network) * (width + moment * (2 if config.optimizer.name == "adamw" else 1))


def memory_of(device: str) -> int:
    """The memory of this machine that a process may use, or the memory of its GPU [bytes]."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info()[1])
    import psutil

    total = int(psutil.virtual_memory().total)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of a container
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


def too_large(estimate: MemoryEstimate) -> str | None:
    """A sentence if a run will probably not fit, else None."""
    there = memory_of(estimate.device)
    if estimate.on_device <= there:
        return None
    what = "this machine" if estimate.device == "cpu" else "the GPU"
    return (
        f"This run needs about {gigabytes(estimate.on_device)}, and {what} has {gigabytes(there)}: it will probably "
        "run out of memory. Lower training.batch_size and raise training.gradient_accumulation_steps as much, or "
        "choose a smaller model.max_seq_len or model."
    )


def what_would_fit(config: RunConfig, network: CustomTransformerConfig | None) -> str:
    """The message when memory has run out: how much there is, how much the run needs, and keys with which it would fit
    and train the same. It has no numbers if the network is not known, or no memory is left to compute them."""
    training = config.training
    lower = (
        f"lower training.batch_size={training.batch_size} and raise training.gradient_accumulation_steps as much, "
        "which trains the same, or choose a smaller"
        if training.batch_size > 1
        else "choose a smaller"
    )
    plain = f"{lower} model.max_seq_len or model. plan=true says how much a run needs."
    try:
        numbers = None if network is None else _what_would_fit(config, network)
    except (MemoryError, OSError, RuntimeError):
        numbers = None
    return f"The memory is not enough for this run: {numbers or plain}"


def _what_would_fit(config: RunConfig, network: CustomTransformerConfig) -> str:
    training = config.training
    B, A = training.batch_size, training.gradient_accumulation_steps
    estimate = estimate_memory(config, network)
    there, where = memory_of(estimate.device), "this machine" if estimate.device == "cpu" else "the GPU"

    def with_batch(size: int, recompute: str) -> int:
        changed = replace(training, batch_size=size, recompute=recompute)
        return estimate_memory(replace(config, training=changed), replace(network, recompute=recompute)).on_device

    # every sequence adds the same memory, so memory is linear in the batch size
    ways = []
    for recompute in dict.fromkeys((training.recompute, "block")):
        whole = with_batch(B, recompute)
        one = with_batch(1, recompute) if B > 1 else whole
        slope = (whole - one) / max(B - 1, 1)
        fitting = [size for size in range(B, 0, -1) if B % size == 0 and one + slope * (size - 1) <= FITS * there]
        if fitting:
            size = fitting[0]
            keys = "training.recompute=block " * (recompute != training.recompute)
            keys += f"training.batch_size={size} training.gradient_accumulation_steps={A * B // size}" * (size != B)
            ways += [f"{keys.strip()} (about {gigabytes(one + slope * (size - 1))})"] * bool(keys)
    needs = f"it needs about {gigabytes(estimate.on_device)}, and {where} has {gigabytes(there)}"
    if estimate.on_device <= there:
        needs += ", part of which other processes may use"
    if not ways:
        return f"{needs}. Choose a smaller model.max_seq_len or model."
    return (
        f"{needs}. The same is trained with {', or with '.join(ways)}; or choose a smaller model.max_seq_len or model."
    )


def warn_if_too_large(config: RunConfig, network: CustomTransformerConfig) -> None:
    """Logs a warning if a run will probably not fit, before it is built. Costs nothing if there is plenty of memory."""
    B, T, D = config.training.batch_size, network.max_seq_len, network.d_model
    kept = network.n_blocks * (20 * D + 4 * network.d_ffn + 4 * network.n_heads * T) + 4 * network.vocab_size
    memory, state = memory_of(network.get_device().type), 3 * checkpoint_bytes(config, network)
    if 8 * B * T * kept + state < memory / 4:
        return  # a rough upper bound is enough
    if warning := too_large(estimate_memory(config, network)):
        log.warning(warning)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


Traced = tuple[int, int, int]  # bytes of the state, and the additional peak of a step and of an evaluation


def _trace(config: RunConfig, network: CustomTransformerConfig) -> Traced:
    """Traces a step and an evaluation. Beyond the first ones every block and every sequence adds the same memory, so
    deep networks and large batches are extrapolated and not traced in full."""

    def of_blocks(blocks: int) -> Traced:
        def of_sequences(batch_size: int) -> Traced:
            return _trace_step(config, replace(network, n_blocks=blocks), batch_size)

        return _extrapolated(of_sequences, config.training.batch_size, TRACED_SEQUENCES)

    return _extrapolated(of_blocks, network.n_blocks, TRACED_BLOCKS)


def _extrapolated(trace: Callable[[int], Traced], number: int, few: int) -> Traced:
    """trace(number); if `number` is more than twice `few`, extrapolated linearly from `few` and twice `few`."""
    if number <= 2 * few:
        return trace(number)
    first, second = trace(few), trace(2 * few)
    times = number / few - 1
    state, step, evaluation = (round(a + times * (b - a)) for a, b in zip(first, second, strict=True))
    return state, step, evaluation


def _trace_step(config: RunConfig, network_config: CustomTransformerConfig, B: int) -> Traced:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from ...models.implementations import build_network
    from ...models.training_step import build_optimizer
    from ...ops import cross_entropy_forward, squared_error_forward
    from .full_batch import full_batch

    class LiveTensors(TorchDispatchMode):
        """Tracks every tensor from the operation that creates it until it is freed."""

        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self.sizes: dict[int, int] = {}

        def __torch_dispatch__(
            self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = operation(*args, **(kwargs or {}))
            for leaf in tree_leaves(made):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    place = storage._cdata
                    if place not in self.sizes:
                        self.sizes[place] = storage.nbytes()
                        self.now += storage.nbytes()
                        weakref.finalize(storage, self._end, place)
            self.peak = max(self.peak, self.now)
            return made

        def _end(self, place: int) -> None:
            self.now -= self.sizes.pop(place)

    living = LiveTensors()
    T = network_config.max_seq_len
    with FakeTensorMode(), living:
        name = config.implementation.name
        compile = "never" if name == "baseline" else network_config.compile
        network = build_network(name, replace(network_config, compile=compile))
        # A fake tensor has no values to compare with the vocabulary.
        vars(network).update(dict.fromkeys(("check_tokens", "check_source", "check_inputs"), lambda *given: None))
        optimizer = build_optimizer(config, network)
        state = living.now
        batch = full_batch(network_config, B, network.device)
        loss = network.loss_and_gradients(batch, denominator=B * T, step=1)
        if parameter_count(network_config) < PIECEMEAL:  # in larger ones its temporaries are negligible
            optimizer.step(loss, 1e-3, config.training.max_grad_norm)
        step = living.peak - state
        living.peak = living.now
        outputs = network.predict(batch)
        if batch.targets.is_floating_point():
            _ = squared_error_forward(outputs, batch.targets, denominator=1)
        else:
            _ = cross_entropy_forward(outputs, batch.targets, denominator=1), outputs.argmax(-1)
        evaluation = living.peak - state
    return state, step, evaluation
