"""Sets HOME and LOGNAME for a user id without an account, as in a container: libraries ask for both."""

import os
import stat
from contextlib import suppress
from pathlib import Path


def complete_environment() -> None:
    """Set HOME and LOGNAME if the system provides neither. Without LOGNAME MLflow cannot be imported; without HOME some
    libraries create a folder called "~"."""
    with suppress(OSError):
        if os.path.expanduser("~") == "~":
            os.environ["HOME"] = str(private_folder())
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            import pwd

            pwd.getpwuid(os.getuid())
        except (ImportError, KeyError):
            os.environ["LOGNAME"] = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown"


def private_folder() -> Path:
    """A folder in the temporary folder that only this user may write, so that code in it may be run. Raises OSError."""
    from tempfile import gettempdir

    place = Path(gettempdir()) / f"manual_backprop-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{place} is not a folder that only this user may write")
    return place
