"""Modules from outside of the package, which add tasks, learning objectives and activations to what a config can name.

Only what the command line names is imported, by `--plugin` (a program of one's own just imports it). A run's config
records the names, for whoever goes on with it: nothing is imported because a file says so.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.config.rules import shown

HELP = "a module, or a file, with tasks, objectives or activations of your own; may be given several times"
_loaded: dict[str, str] = {}  # name of the module -> what was given for it


def load_plugins(given: Sequence[str]) -> None:
    """Imports them: modules that can be imported from the working directory too, or files. Raises InputError."""
    for one in given:
        folder = Path(one).expanduser().resolve().parent if one.endswith(".py") else Path.cwd()
        if one.endswith(".py") and not Path(one).expanduser().is_file():
            raise InputError(f"--plugin {one}: there is no such file, seen from {Path.cwd()}")
        name = name_of(one)
        if name in _loaded:
            continue
        sys.path.insert(0, str(folder))
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0] and error.name != name:
                raise InputError(f"--plugin {one}: needs {error.name}, which is not installed") from error
            raise InputError(
                f"--plugin {one}: there is no such module; give one that is installed or lies in the working "
                "directory, as in my_package.my_task, or the path of a file that ends in .py"
            ) from error
        finally:
            with suppress(ValueError):
                sys.path.remove(str(folder))
        _loaded[name] = one


def name_of(given: str) -> str:
    """The module that `--plugin` means."""
    return Path(given).stem if given.endswith(".py") else given


def loaded_plugins() -> tuple[str, ...]:
    """Their names, as a run records them."""
    return tuple(_loaded)


def given_plugins() -> tuple[str, ...]:
    """As they were given, for a process that is to load the same."""
    return tuple(_loaded.values())


def missing_plugins(saved: Any) -> list[str]:
    """A sentence where a run's config names plugins that are not loaded."""
    named = saved if isinstance(saved, list | tuple) else []
    missing = [str(name) for name in named if name not in _loaded]
    if not missing:
        return []
    arguments = " ".join(f"--plugin {name}" for name in missing)
    return [
        f"plugins={shown(list(named))}: this run has what a module of its own has added, and nothing is imported "
        f"because a file names it; add {arguments} (a module that can be imported, or the path of its file)"
    ]


def add_name(name: str, names: list[str], what: str) -> None:
    """Raises ConfigError where it is no word, or another one's."""
    if not name.isidentifier():
        raise ConfigError([f"{what} {name!r}: a name has letters, digits and _, and begins with a letter"])
    if name in names:
        raise ConfigError([f"{what} {name}: there is one of this name already; there are {', '.join(names)}"])
    names.append(name)
