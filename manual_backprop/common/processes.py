"""The processes that share one training, as all code below the runner sees them. Usually there is only one.

Code that measures or draws something for a whole run takes this process's part of the work (`part_of`, `mapped`) and
combines the results (`summed`, `largest`); with one process these do nothing more. The runner sets the current group
(`acting_as`); `training.processes` connects the processes.
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
    """The rank of a process, the number of processes and their meeting address, from the environment variables that
    torchrun and `training.processes.start` set."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    @classmethod
    def found(cls) -> Place | None:
        """Read from the environment; None if this process is alone."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        if not all(os.environ.get(name, "").isdecimal() for name in names) or "MASTER_ADDR" not in os.environ:
            return None
        rank, size, local_rank, local_size, port = (int(os.environ[name]) for name in names)
        return cls(rank, size, local_rank, local_size, os.environ["MASTER_ADDR"], port) if size > 1 else None


class Processes:
    """A group of one process. A subclass stands for several, which must call its methods in the same order."""

    rank = 0  # of this process
    size = 1  # how many there are

    @property
    def is_first(self) -> bool:
        """Whether this process has rank 0: it writes, prints and owns the run directory."""
        return self.rank == 0

    def part_of(self, items: Iterable[T]) -> Iterator[T]:
        """This process's items: every `size`-th, starting with number `rank`."""
        return islice(items, self.rank, None, self.size)

    def gathered(self, value: Any) -> list[Any]:
        """The `value` of each process, in the order of ranks. JSON must be able to hold the values."""
        return [value]

    def mapped(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """[function(item) for item in items], in every process; each item is computed by one of them. JSON must be able
        to hold the results."""
        parts = self.gathered([function(item) for item in self.part_of(items)])
        return [parts[place % self.size][place // self.size] for place in range(len(items))]

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, which have the same shape and dtype."""
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum of the tensors of all processes."""
        return tensor

    def all_parts(self, whole: Tensor, part: Tensor) -> None:
        """Fill `whole` with the parts of all processes, in the order of ranks; all parts have the same length."""
        whole.copy_(part)

    def parts_for_first(self, part: Tensor) -> list[Tensor] | None:
        """The parts of all processes, in the order of ranks; None in all processes but the first."""
        return [part]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The result of `make()`, which only the first process calls, in all of them. JSON must be able to hold it."""
        return make()

    def agree(self, what: Mapping[str, Any]) -> None:
        """Raise InputError in all processes, with the entries of `what` that differ between them."""

    def first_alone(self, work: Callable[[], T]) -> T:
        """Call `work()` in the first process, then in the others, which find the files that the first has written."""
        return work()


ALONE = Processes()
_acting: list[Processes] = [ALONE]


def processes() -> Processes:
    """The current group of processes."""
    return _acting[-1]


@contextmanager
def acting_as(group: Processes) -> Iterator[None]:
    """Within this context, `processes()` returns `group`."""
    _acting.append(group)
    try:
        yield
    finally:
        _acting.pop()
