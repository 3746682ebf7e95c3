"""Counts evaluations without improvement of the metric that chooses the best checkpoint. schedule=plateau then lowers
the learning rate, and training.patience ends the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Improvement:
    """The best value so far, and counts of evaluations since. A checkpoint saves all of it for a resumed run."""

    best: float | None = None
    since_best: int = 0  # evaluations
    since_lowered: int = 0  # evaluations without improvement since the rate was last lowered
    lowered: int = 0  # how often the rate was lowered

    def see(self, value: float, higher_is_better: bool, rate_patience: int | None) -> None:
        """Counts one evaluation. An equal value does not improve. After `rate_patience` evaluations without
        improvement the rate is lowered."""
        if self.best is None or (value > self.best if higher_is_better else value < self.best):
            self.best, self.since_best, self.since_lowered = value, 0, 0
            return
        self.since_best += 1
        self.since_lowered += 1
        if rate_patience is not None and self.since_lowered >= rate_patience:
            self.lowered, self.since_lowered = self.lowered + 1, 0

    def is_over(self, patience: int | None) -> bool:
        """Whether a run with this `training.patience` ends here."""
        return patience is not None and self.since_best >= patience

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> Improvement:
        """Restores it from a checkpoint's state; those of older versions have None. Raises ValueError if malformed."""
        if state is None:
            return cls()
        best = state.get("best")
        counts: list[Any] = [state.get(name) for name in ("since_best", "since_lowered", "lowered")]
        if not isinstance(best, float | None) or not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"what evaluations have shown is {dict(state)}: expected a number and three counts")
        return cls(best, *counts)
