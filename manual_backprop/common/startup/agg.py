"""matplotlib as pictures of ours need it: imported whatever MPLBACKEND and matplotlibrc say, which are for windows.

Importing this imports it. A figure that was made without pyplot is drawn by Agg, the backend of PNG files, whichever is
chosen; yet a backend that does not exist, or a matplotlibrc that cannot be read, ends matplotlib's own import.
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
    """It warns of lines of a matplotlibrc, and of a cache folder that it cannot write."""
    log = logging.getLogger("matplotlib")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _without_settings() -> Iterator[None]:
    """MPLBACKEND is not there, and matplotlib's own matplotlibrc is the first that is found."""
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
    except Exception:  # whatever those settings make it raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        with _without_settings():
            matplotlib = _imported()
