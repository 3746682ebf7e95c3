"""The process group of one training: sums of tensors, shared values, and the name of a process that failed.

gloo sums tensors, and NCCL on GPUs. Other values are exchanged as JSON through the store by which the processes find
each other. A process that waits for another checks once a second whether that one still runs (`watch`). So it never
waits for a dead process, and has no timeout for long work.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...common.errors import InputError, Interrupted, ManualBackpropError, ProcessFailed
from ...common.processes import Place, Processes
from .watch import INTERVAL, Watch

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
NEVER = timedelta(days=7)  # no timeout: `Watch` notices dead processes, and work may take long
LIMIT = timedelta(seconds=25)  # to find the others' store
LAST_MESSAGE_TIMEOUT = timedelta(seconds=5)
MOST_WAIT = 0.02  # [s] longest pause between two checks for a value that is still missing


class Sum(NamedTuple):
    """A sum that is being computed."""

    work: Any
    tensor: Tensor


class Group(Processes):
    """The process group, as seen by this process. Built by `connect`; all processes call its methods in the same
    order."""

    def __init__(self, place: Place, watch: Watch, store: dist.Store):
        self.rank, self.size, self.place = place.rank, place.size, place
        self._watch, self._store = watch, store
        self._exchanged = 0  # number of values exchanged so far

    # Tensors

    def begin_sum(self, tensor: Tensor, kind: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Sum:
        """Starts to replace `tensor` by its sum over all processes; call `wait` before reading it."""
        with self._failures():
            return Sum(dist.all_reduce(tensor, kind, async_op=True), tensor)

    def wait(self, begun: Sum) -> Tensor:
        """The tensor of a completed sum. On a GPU the host does not wait: later work on the device follows the sum."""
        self._finish(begun.work, begun.tensor.device)
        return begun.tensor

    def summed(self, tensor: Tensor) -> Tensor:
        return self.wait(self.begin_sum(tensor.clone()))

    def largest(self, tensor: Tensor) -> Tensor:
        return self.wait(self.begin_sum(tensor.clone(), dist.ReduceOp.MAX))

    def all_parts(self, whole: Tensor, part: Tensor) -> None:
        with self._failures():
            work = dist.all_gather(list(whole.split(len(part))), part, async_op=True)
        self._finish(work, whole.device)

    def parts_for_first(self, part: Tensor) -> list[Tensor] | None:
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.is_first else None
        with self._failures():
            work = dist.gather(part, parts, dst=0, async_op=True)
        self._finish(work, part.device)
        return parts

    def _finish(self, work: Any, device: torch.device) -> None:
        with self._failures():
            if device.type != "cpu":  # NCCL: the stream waits, and its watchdog notices dead processes
                work.wait()
                return
            while True:
                try:
                    work.wait(timedelta(seconds=INTERVAL))
                    return
                except RuntimeError:
                    if work.is_completed():
                        work.wait()  # it completed just after the timeout; if it failed, this raises its error
                        return
                    lost = self._watch.lost
                    if lost is not None and lost["exit_code"] is not None:
                        work.wait(LAST_MESSAGE_TIMEOUT)  # it ended by itself; its last message may still arrive
                        return
                    self.raise_if_lost()

    # Other values

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, exchanged as JSON."""
        self._exchanged += 1
        key = f"value/{self._exchanged}"
        with self._failures():
            self._store.set(f"{key}/{self.rank}", json.dumps(value))
            found = [json.loads(self._read(f"{key}/{rank}")) for rank in range(self.size)]
            if self._exchanged > 2:  # no process lags by two values, so all have read this one
                self._store.delete_key(f"value/{self._exchanged - 2}/{self.rank}")
        return found

    def from_first(self, make: Callable[[], Any]) -> Any:
        return self.gathered(make() if self.is_first else None)[0]

    def first_alone(self, work: Callable[[], T]) -> T:
        done = work() if self.is_first else None
        self.gathered(None)
        return done if self.is_first else work()  # type: ignore[return-value]

    def agree(self, what: Mapping[str, Any]) -> None:
        parts = self.gathered(dict(what))
        for rank, part in enumerate(parts):
            other = [
                f"{name}: {parts[0].get(name)!r} and {part.get(name)!r}"
                for name in {**parts[0], **part}
                if parts[0].get(name) != part.get(name)
            ]
            if other:
                raise InputError(
                    f"processes 0 and {rank} of {self.size} do not do the same; start all of them with the same code, "
                    f"command line and data. {'; '.join(other)}"
                )

    def _read(self, key: str) -> bytes:
        pause = 0.001
        while not self._store.check([key]):
            self.raise_if_lost()
            time.sleep(pause)
            pause = min(2 * pause, MOST_WAIT)
        found: bytes = self._store.get(key)
        return found

    # Failures

    def raise_if_lost(self) -> None:
        if self._watch.lost is not None:
            raise self._error(self._watch.lost)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Replaces an exception of torch.distributed by the error that names the failed process."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise self._error(self._watch.why()) from error

    def _error(self, lost: dict[str, Any]) -> ManualBackpropError:
        """The exception that another process's failure raises here; a signal there counts as a signal here."""
        number = (lost.get("exit_code") or 0) - 128
        if number > 0:
            return Interrupted(number, lost["reason"])
        who = "another process" if lost["rank"] is None else f"process {lost['rank']} of {self.size}"
        text = f"{who} {lost['reason']}"
        return ProcessFailed(text + (f"\n\n{lost['traceback']}" if lost.get("traceback") else ""))

    def report(self, error: BaseException) -> None:
        """Reports to the others that this process failed, and why, unless it failed because another one did."""
        if isinstance(error, ProcessFailed):
            return
        text = str(error) if isinstance(error, ManualBackpropError) else f"{type(error).__name__}: {error}"
        shown = None if isinstance(error, ManualBackpropError) else "".join(traceback.format_exception(error))
        code = getattr(error, "exit_code", 1)
        try:
            self._watch.fail(self.rank, text if code > 128 else f"has failed: {text}", code, shown)
        except (RuntimeError, OSError):
            return  # no process is left to read it

    def leave(self) -> None:
        """Waits at the end until all processes are done. Raises the error of one that failed."""
        self.gathered(None)
        self._watch.done()
        dist.destroy_process_group()


def open_store(size: int) -> tuple[dist.TCPStore, int]:
    """The store through which `size` processes of this machine find each other, and its port. It exists as long as the
    returned object."""
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    listener.listen(size + 1)
    port = listener.getsockname()[1]
    store = dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def connect(place: Place, backend: str) -> Group:
    """Connects to the other processes and waits for all of them. Raises ProcessFailed if some are missing."""
    os.environ.setdefault("TORCHELASTIC_USE_AGENT_STORE", "True")  # the process that started us holds the store
    if place.address in (LOOPBACK, "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        # torchrun may restart all processes with the same store
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"manual_backprop/{restart}", _store(place))
        watch = Watch(store, place.rank, place.size)
        dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=NEVER)
    except (RuntimeError, OSError, ValueError) as error:
        raise ProcessFailed(
            f"process {place.rank} of {place.size} does not find the others at {place.address}:{place.port}: {error}"
        ) from error
    group = Group(place, watch, store)
    group.gathered(None)
    watch.start()
    return group


def _store(place: Place) -> dist.Store:
    """The store of the group. Raises TimeoutError if another program listens at that port and never answers, since
    PyTorch would wait for it."""
    found: queue.SimpleQueue[dist.Store | Exception] = queue.SimpleQueue()

    def find() -> None:
        try:
            found.put(dist.TCPStore(place.address, place.port, is_master=False, wait_for_workers=False, timeout=LIMIT))
        except Exception as error:
            found.put(error)

    threading.Thread(target=find, name="store", daemon=True).start()
    try:
        store = found.get(timeout=(LIMIT + LAST_MESSAGE_TIMEOUT).total_seconds())
    except queue.Empty:
        raise TimeoutError("another program listens there; choose another port") from None
    if isinstance(store, Exception):
        raise store
    return store
