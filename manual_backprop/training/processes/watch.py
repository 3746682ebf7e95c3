"""Who of a group has failed, or no longer answers.

Each process beats once a second in the store that all of them reach, from a thread of its own: saving, tokenizing and
compiling beat too, a stopped process does not. What fails first is written down there, once, with its reason; the
others read it within a second, or as soon as a sum with the dead process breaks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

from torch.distributed import Store

from ...common.machine import boot_id

INTERVAL = 1.0  # [s] between two beats
PATIENCE = 15.0  # [s] without a beat: such a process is lost
FAILED_KEY = "failed"


class Watch:
    """Beats for this process and looks at the others, until `stop`. `lost` says who has failed, or is None."""

    def __init__(self, store: Store, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self.lost: dict[str, Any] | None = None  # rank, reason, exit_code, traceback
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        store.set(f"process/{rank}", json.dumps({"seen_from": _seen_from(), "pid": os.getpid()}))
        store.set(f"beat/{rank}", "0")

    def start(self) -> None:
        """Once every process has beaten for the first time."""
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
            except (RuntimeError, OSError) as error:  # the store is gone, and with it whoever held it
                self.lost = {
                    "rank": None,
                    "exit_code": None,
                    "reason": f"what had started it is gone ({type(error).__name__})",
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
        """Writes down that process `rank` has failed, unless another one has before; returns what stands there."""
        given = {"rank": rank, "reason": reason, "exit_code": exit_code, "traceback": traceback}
        self.store.compare_set(FAILED_KEY, "", json.dumps(given))
        return self.failure()

    def failure(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.store.get(FAILED_KEY))
        return found

    def done(self) -> None:
        """This process has come to its end: it beats no more, and nothing is wrong with it."""
        self.stop()
        self.store.set(f"beat/{self.rank}", "done")

    def why(self) -> dict[str, Any]:
        """After a sum has broken: who has failed. Waits for whoever it was to say so, or to be missed."""
        end = time.monotonic() + PATIENCE + 2 * INTERVAL
        while self.lost is None and time.monotonic() < end:
            try:
                if self.store.check([FAILED_KEY]):
                    return self.failure()
                for rank in range(self.size):
                    if rank != self.rank and self._has_died(rank):
                        time.sleep(0.2)  # what it wrote before it died comes first
                        return self.fail(rank, "has ended without a word: it was killed (was the memory full?)")
            except (RuntimeError, OSError):
                break
            time.sleep(0.05)
        return self.lost or {"rank": None, "exit_code": None, "reason": "cannot be reached any more"}

    def _has_died(self, rank: int) -> bool:
        """Of a process of this machine; of one elsewhere nobody knows here."""
        place = json.loads(self.store.get(f"process/{rank}"))
        if place["seen_from"] is None or place["seen_from"] != _seen_from():
            return False
        try:
            with open(f"/proc/{place['pid']}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except FileNotFoundError:
            return True
        except OSError:
            return False


def _seen_from() -> str | None:
    """Where a process number means the same process: the kernel, and the container in it; None where nobody knows."""
    try:
        return f"{boot_id()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
