"""tracking=mlflow: a thread that follows the run's directory and delivers it to MLflow.

Everything MLflow happens on that thread: its import, the creation of a new store, every call. The loop only writes into
the run's directory. A tracker that is dead, hung, slow or full costs a run two lines and at its end `TIMEOUT` seconds
in which MLflow does not answer and the process does not compute; what it did not take is delivered later by
`python -m manual_backprop.sync RUN_DIRECTORY`.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from manual_backprop.tracking.mlflow_delivery import MlflowDelivery, prepare_environment
from manual_backprop.tracking.mlflow_messages import one_line, without_credentials
from manual_backprop.tracking.run_directory import FINISHED
from manual_backprop.tracking.tracker import LocalTracker

INTERVAL = 1.0  # [s] between two deliveries, and more where they are costly:
SHARE = 0.005  # of one processor core's time may go into them,
LONGEST_PAUSE = 5.0  # [s] but whoever looks at MLflow meanwhile waits no longer than that
LONGEST_INTERVAL = 30.0  # [s] between two attempts on a tracker that fails
TIMEOUT = 4.0  # [s] that a run waits at its end for a tracker that does not answer,
WORK = 0.1  # [s] where this much of a processor's time is a sign of life too, as on a busy machine
LONGEST_WAIT = 60.0  # [s] that it waits for one that does, or for a new store

logger = logging.getLogger("manual_backprop.tracking")


class MlflowTracker(LocalTracker):
    """Writes into the run's directory as LocalTracker does; a thread delivers it. `root` is the outputs directory."""

    def __init__(self, directory: Path, root: Path, experiment_name: str, run_name: str, keep: int | None = None):
        super().__init__(directory, experiment_name, run_name, keep)
        prepare_environment()
        self._delivery = MlflowDelivery(directory, root)
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._warned = False
        self._complete = False
        # A daemon: a hung tracker must not keep the process from ending.
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)
        self._thread.start()

    def finish(self, status: str = FINISHED) -> None:
        try:
            super().finish(status)  # the truth first
        finally:
            self._closing.set()
            self._wait()
            if not self._complete:
                reason = one_line(self._failure, self._delivery.uri) if self._failure else "it does not answer"
                logger.warning(
                    "MLflow at %s did not take everything (%s). The run's own files are complete; "
                    "deliver the rest with: python -m manual_backprop.sync %s",
                    without_credentials(self._delivery.uri),
                    reason,
                    self.directory,
                )
            elif refused := self._delivery.what_is_refused():
                where = without_credentials(self._delivery.uri)
                logger.warning("MLflow at %s has the run. %s", where, refused)

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
            except Exception as error:  # whatever MLflow, its database or its server raise
                self._failure = error
                interval = min(2 * interval, LONGEST_INTERVAL)
                if not self._warned and not closing:
                    self._warned = True
                    logger.warning(
                        "MLflow at %s fails (%s). The run goes on; its metrics are in %s",
                        without_credentials(self._delivery.uri),
                        one_line(error, self._delivery.uri),
                        self._logger.path,
                    )
            if closing:
                return
            self._closing.wait(interval)
