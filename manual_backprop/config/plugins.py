"""Plugins: modules outside the package that add tasks, objectives and activations, which a config can then name.

The commands import only modules that the command line names with `--plugin`; a program that uses the library imports
its own. A run's config records their names for resuming, but no module is imported because a file names it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.common.uris import expanded
from manual_backprop.config.rules import shown

HELP = "a module, or a file, with tasks, objectives or activations of your own; may be given several times"
_loaded: dict[str, str] = {}  # module name -> argument of --plugin


def load_plugins(given: Sequence[str]) -> None:
    """Import plugins, given as module names (installed, or in the working directory) or as paths of files. Raises
    InputError."""
    for one in given:
        folder, name = Path.cwd(), one
        if one.endswith(".py"):
            path = expanded(one)
            if not path.is_file():
                raise InputError(f"--plugin {one}: there is no such file (working directory: {folder})")
            folder, name = path.resolve().parent, path.stem
        if name in _loaded:
            continue
        sys.path.insert(0, str(folder))
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0] and error.name != name:
                raise InputError(f"--plugin {one}: needs {error.name}, which is not installed") from error
            raise InputError(
                f"--plugin {one}: there is no such module; give one that is installed or is in the working "
                "directory, as in my_package.my_task, or the path of a .py file"
            ) from error
        finally:
            with suppress(ValueError):
                sys.path.remove(str(folder))
        _loaded[name] = one


def loaded_plugins() -> tuple[str, ...]:
    """The module names of the loaded plugins, as a run records them."""
    return tuple(_loaded)


def given_plugins() -> tuple[str, ...]:
    """The arguments of `--plugin`, for a child process that must load the same plugins."""
    return tuple(_loaded.values())


def missing_plugins(saved: Any) -> list[str]:
    """One sentence if a run's config names plugins that are not loaded, otherwise none. `saved` is its key plugins."""
    named = saved if isinstance(saved, list | tuple) else []
    missing = [str(name) for name in named if name not in _loaded]
    if not missing:
        return []
    arguments = " ".join(f"--plugin {name}" for name in missing)
    return [
        f"plugins={shown(list(named))}: this run needs plugins, and nothing is imported because a file names it; add "
        f"{arguments} (a module that can be imported, or the path of its file)"
    ]


def add_name(name: str, names: list[str], what: str) -> None:
    """Append a new name to `names`. Raises ConfigError if it is not an identifier or is taken."""
    if not name.isidentifier():
        raise ConfigError([f"{what} {name!r}: a name has letters, digits and _, and does not begin with a digit"])
    if name in names:
        raise ConfigError([f"{what} {name}: the name is taken; choose another than {', '.join(names)}"])
    names.append(name)
