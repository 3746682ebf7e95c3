"""plan=true: prints what a run, or each job of a sweep, would do and cost. It starts nothing and writes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.errors import InputError
from ..config.rules import shown
from ..config.schema import CustomTransformerConfig, RunConfig
from ..models.flops import flops_per_token
from ..study.estimates.memory import (
    MemoryEstimate,
    checkpoint_bytes,
    estimate_memory,
    gigabytes,
    memory_of,
    parameter_count,
    too_large,
)
from ..study.estimates.time import BUSY, Speed, measure_speed
from ..tasks import Preview, preview_task
from .command_line import Job
from .value_sources import flattened, value_sources

OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Plan:
    """Steps, memory and time of a config on this machine."""

    config: RunConfig
    network: CustomTransformerConfig
    preview: Preview
    first_step: int  # steps that a resumed run has made already
    memory: MemoryEstimate
    speed: Speed

    @property
    def max_steps(self) -> int:
        steps = self.preview.max_steps
        if steps is None:
            raise InputError(
                f"training.num_epochs={self.config.training.num_epochs:g}: the length of an epoch is not known before "
                "the text is prepared; plan with training.max_steps, or run it first"
            )
        return steps

    @property
    def steps(self) -> int:
        """The number of remaining steps."""
        return max(0, self.max_steps - self.first_step)

    def times(self, every: int | str) -> int:
        """How often something happens that is due every `every` steps and at the end."""
        steps = max(1, round(self.preview.steps_per_epoch or self.max_steps)) if every == "epoch" else int(every)
        return self.max_steps // steps - self.first_step // steps + (self.max_steps % steps > 0)

    @property
    def evaluated_tokens(self) -> int:
        """The tokens of all evaluations; the last one is over the whole split."""
        training, whole = self.config.training, self.preview.evaluated_tokens
        part = whole
        if training.eval_batches is not None:
            part = min(whole, training.eval_batches * training.batch_size * self.network.max_seq_len)
        return (self.times(training.eval_every) - 1) * part + whole

    @property
    def sampled_tokens(self) -> int:
        return self.times(self.config.training.eval_every) * self.preview.generated_tokens

    @property
    def seconds(self) -> dict[str, float]:
        return {
            "training": self.steps * self.speed.step,
            "evaluations": self.evaluated_tokens * self.speed.evaluated_token if self.steps else 0.0,
            "samples": self.sampled_tokens * self.speed.sampled_token if self.steps else 0.0,
        }

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The lower and upper bound of all seconds, from the spread of the steps; None if no step was timed."""
        least, step, most = self.speed.least, self.speed.step, self.speed.most
        if least is None or most is None:
            return None
        total = sum(self.seconds.values())
        return total * least / step, total * most / step


class Planner:
    """Makes plans; measures what several jobs of a sweep share only once."""

    def __init__(self) -> None:
        self.previews: dict[object, Preview] = {}
        self.memories: dict[object, MemoryEstimate] = {}
        self.speeds: dict[object, Speed] = {}

    def plan(self, config: RunConfig) -> Plan:
        preview = self._preview(config)
        network = replace(preview.network_config, seed=0)
        shape = network, config.implementation, config.optimizer.name, config.training.batch_size, config.tracking
        if shape not in self.memories:
            self.memories[shape] = estimate_memory(config, network, preview.prepared)
        memory = self.memories[shape]
        work = *shape, config.training.gradient_accumulation_steps, config.device
        if work not in self.speeds:
            self.speeds[work] = measure_speed(config, network, too_large(memory) is None)
        return Plan(config, network, preview, _first_step(config), memory, self.speeds[work])

    def _preview(self, config: RunConfig) -> Preview:
        examples = config.task, config.dataset, config.tokenizer, config.batching
        key = *examples, config.training, config.network_config(1)  # 1: whatever the vocabulary of the examples is
        if key not in self.previews:
            self.previews[key] = preview_task(config, OUTPUTS / "datasets")
        return self.previews[key]


def _first_step(config: RunConfig) -> int:
    """The step of the checkpoint that a run resumes; 0 for a new run."""
    if config.resume is None:
        return 0
    from ..checkpoints.checkpoint import step_of
    from ..tracking.run_directory import find_run

    found = find_run(OUTPUTS, config.resume)
    if found.checkpoint is None:
        raise InputError(f"resume={shown(config.resume)}: {found.path} has no checkpoint to resume from")
    return step_of(found.checkpoint)


def print_plans(jobs: Sequence[Job]) -> None:
    """Prints one job in full, with the source of each value; or a line for each job of a sweep, and their sum."""
    import manual_backprop.training.runner  # noqa: F401  the memory of a run's imports is measured

    planner = Planner()
    if len(jobs) == 1:
        print(sources_page(jobs[0]), end="\n\n", flush=True)
        print(plan_page(planner.plan(jobs[0].config)))
    else:
        print_sweep(planner, jobs)
    print("\nNothing was started; leave out plan=true to run it.")


def sources_page(job: Job) -> str:
    """Every key of a job with its value and the source of the value."""
    sources = value_sources(job.config, job.overrides, job.runtime, OUTPUTS)
    lines = [f"Would run with: {' '.join(job.overrides) or 'the defaults'}", ""]
    for key, value in flattened(job.config.to_dict()):
        lines.append(f"  {key:<37} {shown(value):<22} {sources[key]}")
    return "\n".join(lines)


def plan_page(plan: Plan) -> str:
    config, network, training = plan.config, plan.network, plan.config.training
    preview = plan.preview
    about = "" if preview.prepared else "about "
    epoch, tokens_per_step = preview.steps_per_epoch, preview.tokens_per_step
    flops = flops_per_token(network, network.max_seq_len)
    checkpoint = checkpoint_bytes(config, network)
    memory, seconds = plan.memory, plan.seconds
    kept = min(training.keep_checkpoints, plan.times(training.save_every)) + 1
    on = "" if memory.device == "cpu" else "on the GPU "
    rows = {
        "parameters": f"{parameter_count(network):,}",
        preview.examples[0]: preview.examples[1],
        "a step": preview.step,
        "an epoch": f"{about}{epoch:,.1f} steps" if epoch else "",
        "in all": f"{plan.max_steps:,} steps, {plan.max_steps * tokens_per_step:,} tokens"
        + (f", {about}{plan.max_steps / epoch:,.2f} epochs" if epoch else ""),
        "continues": f"after step {plan.first_step:,}: {plan.steps:,} steps are left" if plan.first_step else "",
        "arithmetic": f"{flops:,} FLOPs a token, {flops * tokens_per_step:.3g} a step, "
        f"{flops * tokens_per_step * plan.steps:.3g} in all",
        "memory": f"about {gigabytes(memory.peak)} at the peak: {gigabytes(memory.process)} the process with its "
        f"libraries; {on}{gigabytes(memory.state)} parameters, gradients and moments, "
        f"{gigabytes(memory.working)} the work on them; there are {gigabytes(memory_of(memory.device))}",
        "checkpoint": f"{gigabytes(checkpoint)}, and {gigabytes(kept * checkpoint)} for the {kept} kept at most",
        "time": f"about {duration(sum(seconds.values()))}{between(plan.bounds)} and some seconds to start: "
        + ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if value)
        + f"; {plan.speed.step:.3g} s a step, {tokens_per_step / plan.speed.step:,.0f} tokens a second",
        "": plan.speed.how,
        "processes": f"{config.device.processes} share each step; memory and time are those of one process alone"
        if config.device.processes > 1
        else "",
    }
    page = [f"  {name:<12}{text}" for name, text in rows.items() if text]
    warning = too_large(memory)
    return "\n".join([*page, "", warning] if warning else page)


def print_sweep(planner: Planner, jobs: Sequence[Job]) -> None:
    total = 0.0
    print(f"{len(jobs)} jobs, each with what sets it apart\n")
    print(f"  {'job':>4}  {'parameters':>13}  {'steps':>9}  {'memory':>9}  {'time':>11}  overrides")
    warnings: dict[str, None] = {}
    for number, job in enumerate(jobs, 1):
        plan = planner.plan(job.config)
        seconds = sum(plan.seconds.values())
        total += seconds
        print(
            f"  {number:>4}  {parameter_count(plan.network):>13,}  {plan.steps:>9,}  {gigabytes(plan.memory.peak):>9}  "
            f"{duration(seconds):>11}  {' '.join(job.overrides)}",
            flush=True,
        )
        if warning := too_large(plan.memory):
            warnings[f"Job {number}: {warning}"] = None
        if plan.speed.busy is not None and plan.speed.busy > BUSY:
            warnings["Other processes had the processor while steps were timed: times may be too long."] = None
    print(f"\n  in all about {duration(total)}, one after the other, and some seconds to start each")
    for warning in warnings:
        print(f"\n{warning}")


def between(bounds: tuple[float, float] | None) -> str:
    """The two bounds in words; empty if they read the same."""
    if bounds is None or duration(bounds[0]) == duration(bounds[1]):
        return ""
    return f" ({duration(bounds[0])} to {duration(bounds[1])})"


def duration(seconds: float) -> str:
    """A readable duration: 0.4 s, 71 s, 12 min, 3.4 h, 12 days."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"
