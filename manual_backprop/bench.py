"""How fast and how small a training step is, beside what PyTorch makes of the same network, measured in pairs.

    python -m manual_backprop.bench --model medium

One process a row, the same weights, tokens and optimizer in each. A step is forward, loss, backward, clipping and
AdamW. Rows take turns, A B C C B A, so that a machine that slows down slows all of them; the ratio of two rows is taken
turn by turn, and its median is quoted with the quartiles. The subject runs twice: its ratio to itself is the noise
floor, and no smaller difference is claimed. Nothing is timed before the rows' gradients agree. Imports only torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .config import ARCHITECTURES, PRECISIONS, CustomTransformerConfig, model_sizes
from .errors import CheckFailedError, InputError
from .machine import compute_capabilities
from .memory import keep_freed_memory

SUBJECT, AGAIN = "custom", "custom again"
ROWS = {  # name of a row: its implementation, and whether it is compiled
    SUBJECT: ("custom", "never"),
    AGAIN: ("custom", "never"),
    "torch": ("torch", "never"),
    "baseline": ("baseline", "never"),
    "compiled": ("baseline", "always"),
}
AGREEMENT = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 0.1, "bf16_mixed": 0.1}  # relative, of loss and gradients' projections
WARM_UP = 2  # steps


@dataclass(frozen=True)
class Case:
    """What is measured."""

    config: CustomTransformerConfig
    batch_size: int
    threads: int


@dataclass
class Row:
    """What one process measured: seconds of each step and of the very first, which may be compiled; and its peak above
    what the imports took [bytes]."""

    name: str
    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    peak_bytes: int = 0


def measure(case: Case, rounds: int) -> list[Row]:
    """Every row's steps, taken in turns. Raises CheckFailedError if the rows' gradients differ."""
    context = multiprocessing.get_context("spawn")
    rows = [Row(name) for name in ROWS]
    ends: list[Connection] = []
    processes = []
    try:
        for implementation, compiled in ROWS.values():
            ours, theirs = context.Pipe()
            arguments = theirs, implementation, replace(case, config=replace(case.config, compile=compiled))
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        answers = [_answer(end) for end in ends]
        _check_agreement(case, [answer[1:] for answer in answers])
        for row, answer in zip(rows, answers, strict=True):
            row.first_seconds = answer[0]
        order = list(range(len(rows)))
        for _ in range(rounds):
            for place in (*order, *reversed(order)):
                ends[place].send("step")
                rows[place].seconds.append(_answer(ends[place]))
        for end, row in zip(ends, rows, strict=True):
            end.send("peak")
            row.peak_bytes = _answer(end)
    finally:
        for end in ends:
            end.close()  # which ends its process
        for process in processes:
            process.join(timeout=10)
            process.terminate()
    return rows


def _answer(end: Connection) -> Any:
    try:
        answer = end.recv()
    except EOFError:
        raise CheckFailedError("A measuring process ended early; out of memory? Try a smaller --batch-size.") from None
    if isinstance(answer, str):
        raise CheckFailedError(f"A measuring process failed: {answer}")
    return answer


def _check_agreement(case: Case, answers: list[list[float]]) -> None:
    bar = AGREEMENT[case.config.precision]
    for name, answer in zip(ROWS, answers, strict=True):
        for got, want in zip(answer, answers[0], strict=True):
            if not abs(got - want) <= bar * abs(want):
                raise CheckFailedError(
                    f"{name} and {SUBJECT} disagree: {got} against {want} (bar {bar}); nothing was measured"
                )


def _work(end: Connection, implementation: str, case: Case) -> None:
    """A measuring process: builds a row, says what its loss and gradients are, then does what it is asked."""
    import torch

    torch.set_num_threads(case.threads)
    keep_freed_memory()  # for every row alike
    from .models import build_network
    from .models.network import Batch

    if implementation == "baseline":  # what torch.optim and torch.compile import when they are first used
        import torch._dynamo
    if case.config.compile == "always":
        import torch._inductor.compile_fx

    after_imports = _resident_bytes("VmRSS")
    try:
        config = case.config
        network = build_network(implementation, config)
        optimizer = network.adamw(weight_decay=0.1, betas=(0.9, 0.99), epsilon=1e-8)
        generator = torch.Generator().manual_seed(1)
        shape = (case.batch_size, config.max_seq_len + 1)
        tokens = torch.randint(config.vocab_size, shape, generator=generator).to(network.device)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        step = 0

        def train() -> torch.Tensor:
            nonlocal step
            step += 1
            network.zero_gradients()
            loss = network.loss_and_gradients(batch, denominator=batch.targets.numel(), step=step)
            optimizer.step(loss, 1e-4, max_grad_norm=1.0)
            return loss

        network.zero_gradients()
        begin = time.perf_counter()
        loss = network.loss_and_gradients(batch, denominator=batch.targets.numel(), step=1)
        first_loss = loss.item()
        first_seconds = time.perf_counter() - begin
        gradient = torch.cat([gradient.double().cpu().flatten() for gradient in network.gradients.values()])
        direction = torch.randn(len(gradient), generator=generator, dtype=torch.float64)
        norm = gradient.norm().item()
        # both must be far from 0 to be compared: the loss, the norm; and the projection, made so by the norm
        end.send([first_seconds, first_loss, norm, (gradient @ direction).item() + 10 * norm])
        del gradient, direction
        for _ in range(WARM_UP):
            train()
        _reset_peak(network.device)
        while True:
            asked = end.recv()
            if asked == "peak":
                end.send(_peak(network.device, after_imports))
                continue
            begin = time.perf_counter()
            loss = train()
            if network.device.type == "cuda":
                torch.cuda.synchronize()
            end.send(time.perf_counter() - begin)
    except EOFError:
        pass
    except Exception as error:
        end.send(f"{type(error).__name__}: {error}")


def _reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: Any, after_imports: int) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident_bytes("VmHWM") - after_imports


def _resident_bytes(entry: str) -> int:
    """From Linux's own account of this process; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry + ":"))


def ratios(row: Row, subject: Row) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the row's time over the subject's, turn by turn."""
    quotients = sorted(mine / its for mine, its in zip(row.seconds, subject.seconds, strict=True))
    low, middle, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return low, middle, high


def table(case: Case, rows: Sequence[Row]) -> str:
    """The measurement in words."""
    import torch

    from .flops import flops_per_token, matrix_product_rate

    config = case.config
    torch.set_num_threads(case.threads)
    rate = matrix_product_rate(
        torch.bfloat16 if "bf16" in config.precision else config.get_dtype(), config.get_device()
    )
    flops = flops_per_token(config, config.max_seq_len) * case.batch_size * config.max_seq_len
    lines = [
        f"{config.architecture}, V={config.vocab_size} T={config.max_seq_len} L={config.n_blocks} H={config.n_heads} "
        f"D={config.d_model} B={case.batch_size}, {config.precision}, {config.get_device()}, {case.threads} threads; "
        f"{flops / 1e9:.1f} GFLOP a step; matrix products alone reach {rate / 1e12:.2f} TFLOP/s",
        "",
        f"{'row':<14}{'ms a step':>11}{'time / custom':>15}{'quartiles':>16}{'peak MB':>10}{'of the limit':>14}"
        f"{'first, s':>10}",
    ]
    for row in rows:
        low, middle, high = ratios(row, rows[0])
        median = statistics.median(row.seconds)
        lines.append(
            f"{row.name:<14}{1e3 * median:>11.1f}{middle:>15.3f}{f'{low:.3f} - {high:.3f}':>16}"
            f"{row.peak_bytes / 1e6:>10.0f}{flops / rate / median:>14.1%}{row.first_seconds:>10.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m manual_backprop.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="medium", help="a size of conf/model (default: %(default)s)")
    parser.add_argument("--architecture", default="gpt2", choices=tuple(ARCHITECTURES), help="(default: %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="(default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=1024, help="V, where the model names none (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="B [sequences] (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns there and back (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurement there, too")
    options = parser.parse_args(arguments)
    if options.json is not None and not (options.json.absolute().parent.is_dir() and not options.json.is_dir()):
        raise InputError(f"--json {options.json}: expected a file in a folder that exists")
    if options.device == "cuda" and not compute_capabilities():
        raise InputError("--device cuda: no NVIDIA GPU can be used on this machine; use --device cpu")
    sizes = model_sizes()
    if options.model not in sizes:
        raise InputError(f"--model {options.model}: there is no such size; use one of {', '.join(sizes)}")
    for name in ("vocab_size", "batch_size", "rounds", "threads"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    size: dict[str, Any] = sizes[options.model] | {
        "vocab_size": sizes[options.model]["vocab_size"] or options.vocab_size
    }
    del size["learning_rate"]
    config = CustomTransformerConfig(
        **size, architecture=options.architecture, precision=options.precision, device=options.device
    )
    if violations := config.violations():
        raise InputError("; ".join(violations))
    case = Case(config, options.batch_size, options.threads)
    rows = measure(case, options.rounds)
    print(table(case, rows))
    if options.json is not None:
        content = {"case": asdict(case), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    from .exit_codes import exit_code_of

    sys.exit(exit_code_of(main))
