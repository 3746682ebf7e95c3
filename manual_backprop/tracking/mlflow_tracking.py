"""tracking=mlflow: a thread that delivers the run directory to MLflow.

All work for MLflow is done in that thread: its import, the creation of a new store, every call. The loop only writes
into the run directory. If MLflow is down, hung, slow or out of space, a run prints two warnings and waits at its end at
most `TIMEOUT` seconds without an answer. `python -m manual_backprop.sync RUN_DIRECTORY` delivers the rest later.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from .mlflow_delivery import MlflowDelivery, prepare_environment
from .mlflow_messages import one_line
from .run_directory import FINISHED
from .tracker import LocalTracker

INTERVAL = 1.0  # [s] between two deliveries; longer if a delivery takes much processor time
SHARE = 0.005  # largest share of one core's time for deliveries
LONGEST_PAUSE = 5.0  # [s] between two deliveries at most, so that MLflow stays up to date
LONGEST_INTERVAL = 30.0  # [s] between two attempts if MLflow fails
TIMEOUT = 4.0  # [s] that a run waits at its end without an answer from MLflow
WORK = 0.1  # [s] of processor time: while this process works, a slow MLflow does not count as hung
LONGEST_WAIT = 60.0  # [s] that a run waits at its end if MLflow answers, or for a new store

logger = logging.getLogger("manual_backprop.tracking")


class MlflowTracker(LocalTracker):
    """A LocalTracker whose run directory a thread delivers to MLflow. `root` is the outputs directory; `keep` is the
    `metrics_length` of `open_tracker`."""

    def __init__(self, directory: Path, root: Path, experiment_name: str, run_name: str, keep: int | None = None):
        super().__init__(directory, experiment_name, run_name, keep)
        prepare_environment()
        self._delivery = MlflowDelivery(directory, root)
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._warned = False
        self._complete = False
        # A daemon, so that a hung call to MLflow does not keep the process from ending.
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)
        self._thread.start()

    def finish(self, status: str = FINISHED) -> None:
        try:
            super().finish(status)  # the run's own files first
        finally:
            self._closing.set()
            self._wait()
            if not self._complete:
                reason = one_line(self._failure, self._delivery.uri) if self._failure else "it does not answer"
                logger.warning(
                    "MLflow at %s did not accept everything (%s). The run's own files are complete; "
                    "deliver the rest with: python -m manual_backprop.sync %s",
                    self._delivery.address,
                    reason,
                    self.directory,
                )
            elif refused := self._delivery.refusal_message():
                logger.warning("MLflow at %s has the run. %s", self._delivery.address, refused)

    def _wait(self) -> None:
        start = alive = time.monotonic()
        worked = time.process_time()
        while self._thread.is_alive():
            self._thread.join(0.02)
            now = time.monotonic()
            if self._delivery.working_locally or time.process_time() - worked > WORK:
                alive, worked = now, time.process_time()
            if now - start > LONGEST_WAIT or now - max(alive, self._delivery.last_success) > TIMEOUT:
                return

    def _follow(self) -> None:
        interval = INTERVAL
        terminated_dead_runs = False
        while True:
            closing = self._closing.is_set()
            processor = time.thread_time()
            try:
                self._delivery.deliver(final=closing)
                self._complete = closing
                if not closing and not terminated_dead_runs:
                    terminated_dead_runs = True
                    self._delivery.terminate_dead_runs()
                interval = min(max(INTERVAL, (time.thread_time() - processor) / SHARE), LONGEST_PAUSE)
                self._failure = None
            except Exception as error:  # MLflow, its database and its server have many kinds of errors
                self._failure = error
                interval = min(2 * interval, LONGEST_INTERVAL)
                if not self._warned and not closing:
                    self._warned = True
                    logger.warning(
                        "MLflow at %s fails (%s). The run continues; its metrics are in %s",
                        self._delivery.address,
                        one_line(error, self._delivery.uri),
                        self.path,
                    )
            if closing:
                return
            self._closing.wait(interval)
