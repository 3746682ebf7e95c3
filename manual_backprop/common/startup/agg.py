"""Imports matplotlib even if MPLBACKEND or the user's matplotlibrc is invalid.

Our figures need no window: without pyplot, Agg draws PNG files whatever backend is chosen. But a backend that does not
exist, or a matplotlibrc that cannot be read, makes the import of matplotlib fail.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock


def _imported() -> ModuleType:
    import matplotlib.backends.backend_agg
    import matplotlib.figure

    return matplotlib


_log = logging.getLogger("matplotlib")
_level = _log.level
_log.setLevel(logging.ERROR)  # no warnings about lines of a matplotlibrc, or a cache folder that it cannot write
try:
    matplotlib = _imported()
except Exception:  # invalid settings raise errors of several types
    for _name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        del sys.modules[_name]
    _spec = importlib.util.find_spec("matplotlib")
    if _spec is None or _spec.origin is None:
        raise ModuleNotFoundError("matplotlib is not installed") from None
    _own = str(Path(_spec.origin).parent / "mpl-data" / "matplotlibrc")
    _exists = os.path.exists
    with (  # matplotlib finds its own matplotlibrc before the user's, and no MPLBACKEND
        mock.patch.dict(os.environ, {"MATPLOTLIBRC": _own}),
        mock.patch.object(os.path, "exists", lambda path: path != "matplotlibrc" and _exists(path)),
    ):
        os.environ.pop("MPLBACKEND", None)
        matplotlib = _imported()
finally:
    _log.setLevel(_level)
