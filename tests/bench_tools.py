"""A very small case, with which a row of the bench runs quickly in the process of a test."""

from __future__ import annotations

from dataclasses import replace

from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.study.benchmark import rows
from manual_backprop.study.benchmark.cases import BY_HAND, Case
from manual_backprop.study.benchmark.rows import Ready

KERNELS = [name for name, settings in BY_HAND.items() if settings["kernels"] == "fused"]  # rows with them
TINY = CustomTransformerConfig(vocab_size=37, d_model=24, n_blocks=2, n_heads=4, d_ffn=52, max_seq_len=16)


def case_of(**changed: object) -> Case:
    return Case(replace(TINY, **changed), batch_size=3, threads=1)  # type: ignore[arg-type]


def ready(name: str, case: Case) -> Ready:
    """The loss and gradients of a row's first step."""
    trainer = rows.build(name, case)
    loss = trainer.loss_and_gradients(rows.random_batch(case, trainer.device)).item()
    return Ready(loss, rows.sketch_of(trainer.gradients()))
