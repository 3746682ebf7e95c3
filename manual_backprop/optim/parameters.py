"""Parameters, gradients and moments: mappings with the same keys, each a set of views into one flat buffer.

So an optimizer, a norm, an all-reduce or a checkpoint is one operation over one tensor, and a name means the same
parameter in all of them. This file knows shapes and offsets; networks and optimizers know what the numbers mean.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import InputError

PADDING = 32  # elements: entries start at multiples of 64 bytes even in 16-bit dtypes

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch's prefixes
OUTER = ("module.", "model.")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Flat:
    """One flat buffer and its named views. `decayed`, its first slice, is the part with weight decay."""

    buffer: Tensor
    views: dict[str, Tensor]
    decayed_size: int

    def packed(self, names: Sequence[str]) -> Tensor:
        """Entries that lie side by side, as one tensor: concatenated along the first dimension, without a copy."""
        first = self.views[names[0]]
        length = sum(self.views[name].numel() for name in names)
        start = first.storage_offset()
        for name in names:  # the layout has placed them side by side
            assert self.views[name].storage_offset() == start, f"{name} does not follow its neighbour"
            start += self.views[name].numel()
        offset = first.storage_offset()
        return self.buffer[offset : offset + length].view(-1, *first.shape[1:])


class Layout:
    """Where each parameter lies: decayed matrices first, then the rest; the names of a group side by side."""

    def __init__(self, shapes: Mapping[str, Shape], groups: Sequence[Sequence[str]] = ()):
        """`shapes` in the order of the network; `groups` are names of tensors that must lie without padding between."""
        self.shapes = dict(shapes)
        group_of = {group[0]: tuple(group) for group in groups}
        followers = {name for group in groups for name in group[1:]}
        entries = [group_of.get(name, (name,)) for name in self.shapes if name not in followers]
        decayed = [entry for entry in entries if len(self.shapes[entry[0]]) >= 2]
        rest = [entry for entry in entries if len(self.shapes[entry[0]]) < 2]
        self.offsets: dict[str, int] = {}
        self.size = self._place(decayed, 0)
        self.decayed_size = self.size
        self.size = self._place(rest, self.size)
        assert self.offsets.keys() == self.shapes.keys(), "every parameter has exactly one place"

    def _place(self, entries: list[tuple[str, ...]], offset: int) -> int:
        for entry in entries:
            for name in entry:
                self.offsets[name] = offset
                offset += math.prod(self.shapes[name])
            offset = -(-offset // PADDING) * PADDING
        return offset

    def allocate(self, dtype: torch.dtype, device: torch.device | str) -> Flat:
        """A buffer of zeros, and its views in the order of the network."""
        try:
            buffer = torch.zeros(self.size, dtype=dtype, device=device)
        except RuntimeError as error:  # torch says "out of memory" in several ways, all of them RuntimeErrors
            size = self.size * torch.empty((), dtype=dtype).element_size()
            raise InputError(
                f"A buffer of {size / 1e9:,.1f} GB for {self.size:,} parameters does not fit into the memory of "
                f"{device}: make the model smaller."
            ) from error
        views = {
            name: buffer[self.offsets[name] : self.offsets[name] + math.prod(shape)].view(shape)
            for name, shape in self.shapes.items()
        }
        return Flat(buffer, views, self.decayed_size)


class RoundedMatrices:
    """Copies of a network's matrices, rounded to the narrower dtype in which products read them (bf16_mixed).

    Before each calculation `refresh` rounds them again if the parameters have changed since. PyTorch counts the writes
    to a tensor and all of its views, except those of its fused optimizers and those through `x.data` or `x.numpy()`. So
    a sample of the numbers is compared as well. Code that writes a single number in such a way must call
    `torch.autograd.graph.increment_version(x)` afterwards. An optimizer that has written both calls `is_written`. On a
    GPU no sample is compared, since the host would wait for it.
    """

    SAMPLE = 1 << 10  # numbers

    def __init__(self, layout: Layout, parameters: Flat, dtype: torch.dtype, biases: bool = False):
        """`biases`: also round the other parameters."""
        self.flat = layout.allocate(dtype, parameters.buffer.device)
        size = layout.size if biases else parameters.decayed_size
        self._wide, self._narrow = (flat.buffer[:size] for flat in (parameters, self.flat))
        self._version: int | None = None

    def refresh(self) -> None:
        if not self.is_fresh():
            self._narrow.copy_(self._wide)
            self.is_written()

    def is_fresh(self) -> bool:
        if self._version != self._current_version() or (self._wide.is_cpu and type(self._wide) is not Tensor):
            return False
        if not self._wide.is_cpu:
            return True
        step = len(self._wide) // self.SAMPLE + 1
        return torch.equal(self._wide[::step].to(self._narrow.dtype), self._narrow[::step])

    def is_written(self) -> None:
        """Marks the copies as up to date with the parameters."""
        self._version = self._current_version()

    def _current_version(self) -> int:
        return self._wide._version


def unwrapped(tensors: Mapping[str, Tensor], is_known: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors without the prefixes that wrappers put before their names, unless a name `is_known` as it is:
    torch.compile adds `_orig_mod.`, DataParallel `module.`, a module around the model `model.`."""
    names = list(tensors)
    if any(map(is_known, names)):
        return dict(tensors)
    for wrapper in WRAPPERS:  # anywhere in a name, since parts of a model may be wrapped
        names = [name.replace(wrapper, "") for name in names]
    while names and not any(map(is_known, names)):
        outer = next((one for one in OUTER if all(name.startswith(one) for name in names)), None)
        if outer is None:
            return dict(tensors)
        names = [name.removeprefix(outer) for name in names]
    return dict(zip(names, tensors.values(), strict=True))


def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str = "parameter") -> None:
    """Copies every entry of `source` into the entry of `target` with the same name, and converts dtypes. Names may have
    the prefix of a wrapper (see `unwrapped`).

    Raises InputError, and changes nothing, unless names and shapes are the same.
    """
    source = unwrapped(source, target.__contains__)
    problems = [f"{what} {name} is missing" for name in target.keys() - source.keys()]
    problems += [f"{what} {name} is unknown here" for name in source.keys() - target.keys()]
    problems += [
        f"{what} {name} has shape {tuple(source[name].shape)}, expected {tuple(target[name].shape)}"
        for name in target.keys() & source.keys()
        if source[name].shape != target[name].shape
    ]
    if problems:
        shown = sorted(problems)[:8]
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError("These values belong to another network: " + "; ".join(shown) + more + ".")
    for name, tensor in target.items():
        tensor.copy_(source[name])


def copy_on_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU, made once: `.cpu().clone()` would copy a tensor of a GPU twice."""
    return tensor.detach().to("cpu", copy=True)
