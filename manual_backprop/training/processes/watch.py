"""Detects processes of a group that have failed or no longer respond.

A thread of each process writes a heartbeat once a second to the common store, also during saving, tokenizing and
compiling; a stopped process writes none. The first failure is written there once, with its reason. The others read it
within a second, or as soon as a sum with the dead process fails.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

import psutil
from torch.distributed import Store

from ...common.machine import boot_id

INTERVAL = 1.0  # [s] between two heartbeats
PATIENCE = 15.0  # [s] without a heartbeat after which a process counts as lost
FAILED_KEY = "failed"


class Watch:
    """Writes the heartbeats of this process and reads those of the others, until `stop`. `lost` describes the process
    that failed, or is None."""

    def __init__(self, store: Store, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self.lost: dict[str, Any] | None = None  # rank, reason, exit_code, traceback
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        store.set(f"process/{rank}", json.dumps({"seen_from": _seen_from(), "pid": os.getpid()}))
        store.set(f"beat/{rank}", "0")

    def start(self) -> None:
        """Starts the thread; to be called when every process has connected."""
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        beats: dict[int, bytes] = {}
        heard = dict.fromkeys(range(self.size), time.monotonic())
        others = [rank for rank in range(self.size) if rank != self.rank]
        number = 0
        while not self._stopped.wait(INTERVAL) and self.lost is None:
            number += 1
            try:
                self.store.set(f"beat/{self.rank}", str(number))
                now = dict(zip(others, self.store.multi_get([f"beat/{rank}" for rank in others]), strict=True))
                failed = self.store.check([FAILED_KEY])
            except (RuntimeError, OSError) as error:  # the store is gone, and so is the process that held it
                self.lost = {
                    "rank": None,
                    "exit_code": None,
                    "reason": f"lost the process that had started it ({type(error).__name__})",
                }
                return
            if failed:
                self.lost = self.failure()
                return
            for rank, beat in now.items():
                if beats.get(rank) != beat:
                    beats[rank], heard[rank] = beat, time.monotonic()
                elif beat != b"done" and time.monotonic() - heard[rank] > PATIENCE:
                    reason = f"has not answered for {PATIENCE:.0f} s: it is stopped, or its machine cannot be reached"
                    self.lost = self.fail(rank, reason)
                    return

    def fail(
        self, rank: int, reason: str, exit_code: int | None = None, traceback: str | None = None
    ) -> dict[str, Any]:
        """Records that process `rank` has failed, unless a failure is recorded already; returns the recorded
        failure."""
        given = {"rank": rank, "reason": reason, "exit_code": exit_code, "traceback": traceback}
        self.store.compare_set(FAILED_KEY, "", json.dumps(given))
        return self.failure()

    def failure(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.store.get(FAILED_KEY))
        return found

    def done(self) -> None:
        """Records that this process has finished: missing heartbeats are then no failure."""
        self.stop()
        self.store.set(f"beat/{self.rank}", "done")

    def why(self) -> dict[str, Any]:
        """The failure that broke an all-reduce. Waits until the failed process has reported it, or counts as lost."""
        end = time.monotonic() + PATIENCE + 2 * INTERVAL
        while self.lost is None and time.monotonic() < end:
            try:
                if self.store.check([FAILED_KEY]):
                    return self.failure()
                for rank in range(self.size):
                    if rank != self.rank and self._has_died(rank):
                        time.sleep(0.2)  # a report that it wrote before it died comes first
                        return self.fail(rank, "has ended without a message: it was killed (was the memory full?)")
            except (RuntimeError, OSError):
                break
            time.sleep(0.05)
        return self.lost or {"rank": None, "exit_code": None, "reason": "can no longer be reached"}

    def _has_died(self, rank: int) -> bool:
        """Whether a process of this machine has ended; False for processes of other machines."""
        place = json.loads(self.store.get(f"process/{rank}"))
        if place["seen_from"] is None or place["seen_from"] != _seen_from():
            return False
        try:
            return psutil.Process(place["pid"]).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except (psutil.Error, OSError) as error:  # any other one: its state cannot be read
            return isinstance(error, psutil.NoSuchProcess)


def _seen_from() -> str | None:
    """Identifies the scope of process ids, the kernel and the container; None if unknown."""
    try:
        return f"{boot_id()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
