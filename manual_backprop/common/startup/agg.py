"""Imports matplotlib even if MPLBACKEND or the user's matplotlibrc is invalid.

Our figures need no window: without pyplot, Agg draws PNG files whatever backend is chosen. But a backend that does not
exist, or a matplotlibrc that cannot be read, makes the import of matplotlib fail.
"""

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence matplotlib's warnings about lines of a matplotlibrc and about a cache folder that it cannot write."""
    log = logging.getLogger("matplotlib")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _without_settings() -> Iterator[None]:
    """Hide MPLBACKEND and the user's matplotlibrc: matplotlib finds its own one first."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("matplotlib is not installed")
    own = str(Path(spec.origin).parent / "mpl-data" / "matplotlibrc")
    exists = os.path.exists
    with (
        mock.patch.dict(os.environ, {"MATPLOTLIBRC": own}),
        mock.patch.object(os.path, "exists", lambda path: path != "matplotlibrc" and exists(path)),
    ):
        os.environ.pop("MPLBACKEND", None)
        yield


def _imported() -> ModuleType:
    import matplotlib.backends.backend_agg
    import matplotlib.figure

    return matplotlib


with _quietly():
    try:
        matplotlib = _imported()
    except Exception:  # invalid settings raise errors of several types
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        with _without_settings():
            matplotlib = _imported()
