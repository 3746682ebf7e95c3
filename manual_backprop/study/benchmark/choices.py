"""The options that choose what is measured, for every command that measures steps. Needs no torch."""

import os
from argparse import Namespace
from dataclasses import replace
from typing import Any

from ...common.errors import InputError
from ...common.machine import compute_capabilities
from ...config.arguments import Parser, whole
from ...config.schema import ARCHITECTURES, PRECISIONS, CustomTransformerConfig, model_sizes
from .cases import CASES, Case

FOR_MODELS = ("architecture", "vocab_size", "device")  # options for --model only: a case fixes them
DEFAULTS: dict[str, Any] = {"model": "medium", "architecture": "gpt2", "vocab_size": 1024, "device": "cpu"}
BATCH_SIZE = 16


def add_choices(parser: Parser, usual: str) -> None:
    """Adds the options. `usual` describes the default cases."""
    parser.add_argument(
        "--case", nargs="+", choices=tuple(CASES), metavar="NAME", help=f"one or more of the cases ({usual})"
    )
    parser.add_argument("--model", choices=tuple(model_sizes()), help="instead of a case: a size of conf/model")
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), help="of --model (gpt2)")
    parser.add_argument("--vocab-size", type=whole(1), metavar="V", help="of a --model without its own (1024)")
    parser.add_argument("--batch-size", type=whole(1), metavar="B", help="sequences (the case's; 16)")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, metavar="P", help=f"{', '.join(PRECISIONS)} (the case's; fp32)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of --model (cpu)")
    parser.add_argument(
        "--threads", type=whole(1), default=os.cpu_count(), metavar="N", help="of the CPU (%(default)s)"
    )


def about_cases() -> dict[str, str]:
    """One line about each case: what it is, and the precisions that it measures."""
    return {name: f"{case.about}: {', '.join(case.bars)}" for name, case in CASES.items()}


def cases_of(options: Namespace) -> list[Case]:
    """The cases that the options choose. Raises InputError if one cannot be measured."""
    if options.case:
        for name in ("model", *FOR_MODELS):
            if (given := getattr(options, name)) is not None:
                raise InputError(f"--{name.replace('_', '-')} {given}: a case fixes it; give --case or --model")
        found = [
            CASES[name].case(name, precision, options.threads, options.batch_size)
            for name in options.case
            for precision in options.precision or CASES[name].bars
        ]
    else:
        chosen = {name: getattr(options, name) or default for name, default in DEFAULTS.items()}
        size: dict[str, Any] = dict(model_sizes()[chosen["model"]])
        del size["learning_rate"]
        size["vocab_size"] = size["vocab_size"] or chosen["vocab_size"]
        config = CustomTransformerConfig(**size, architecture=chosen["architecture"], device=chosen["device"])
        found = [
            Case(replace(config, precision=precision), options.batch_size or BATCH_SIZE, options.threads)
            for precision in options.precision or ["fp32"]
        ]
    for case in found:
        if violations := case.config.violations():
            raise InputError("; ".join(violations))
    if any(case.config.device == "cuda" for case in found) and not compute_capabilities():
        what = f"--case {' '.join(options.case)}" if options.case else "--device cuda"
        raise InputError(f"{what}: no NVIDIA GPU can be used on this machine; choose a case that runs on a CPU")
    return found
