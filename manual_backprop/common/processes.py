"""The processes that share one training, as everything below the runner sees them: usually one, which is all of them.

Whoever measures or draws something for a whole run takes its part of the work (`part_of`, `mapped`) and puts the parts
together (`summed`, `largest`); alone, each of these is the work itself. The runner says which processes there are
(`acting_as`); how they are connected is the business of `training.processes`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Place:
    """Of a process among those that share a training, as torchrun and `training.processes.start` say it in the
    environment."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    @classmethod
    def found(cls) -> Place | None:
        """None: this process is alone."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        if not all(os.environ.get(name, "").isdecimal() for name in names) or "MASTER_ADDR" not in os.environ:
            return None
        rank, size, local_rank, local_size, port = (int(os.environ[name]) for name in names)
        return cls(rank, size, local_rank, local_size, os.environ["MASTER_ADDR"], port) if size > 1 else None


class Processes:
    """One process. Several are a subclass, whose methods every process calls in the same order."""

    rank = 0  # of this process
    size = 1  # how many there are

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes, prints and owns the run's directory."""
        return self.rank == 0

    def part_of(self, items: Iterable[T]) -> Iterator[T]:
        """This process' items: every `size`-th, from number `rank` on."""
        return islice(items, self.rank, None, self.size)

    def gathered(self, value: Any) -> list[Any]:
        """What each process has given, in the order of their ranks: values that JSON can hold."""
        return [value]

    def mapped(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """[function(item) for item in items], each made by one process; results that JSON can hold, for all."""
        parts = self.gathered([function(item) for item in self.part_of(items)])
        return [parts[place % self.size][place // self.size] for place in range(len(items))]

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, of equal shape and format."""
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Likewise, of each element the largest."""
        return tensor

    def all_parts(self, whole: Tensor, part: Tensor) -> None:
        """Fills `whole` with the `part` of every process, one after the other; all parts have the same length."""
        whole.copy_(part)

    def parts_for_first(self, part: Tensor) -> list[Tensor] | None:
        """The `part` of every process, in the first one; None in the others."""
        return [part]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process, for all of them; JSON can hold it. The others wait."""
        return make()

    def agree(self, what: Mapping[str, Any]) -> None:
        """Raises InputError, in all of them, with whatever is not the same in all of them."""

    def first_alone(self, work: Callable[[], T]) -> T:
        """`work()` in every process; the others begin when the first has ended, and find what it has prepared."""
        return work()


ALONE = Processes()
_acting: list[Processes] = [ALONE]


def processes() -> Processes:
    """Those that share what this process is doing."""
    return _acting[-1]


@contextmanager
def acting_as(group: Processes) -> Iterator[None]:
    """Within it, `processes()` are these."""
    _acting.append(group)
    try:
        yield
    finally:
        _acting.pop()
