"""Refuses files in the working directory that Python would import in place of a library: `python -m` looks there first.

It runs before anything else is imported, so it uses only modules that Python has loaded by then.
"""

import os
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder, all_suffixes

SCRIPT = "manual-backprop"
# What setup.cfg and its extras install. Their own dependencies are looked up when the check runs.
DEPENDENCIES = (
    *("torch", "hydra-core", "omegaconf", "datasets", "transformers", "mlflow", "tokenizers", "safetensors", "rich"),
    *("filelock", "psutil", "matplotlib", "plotly", "starlette", "uvicorn"),
    *("hydra-joblib-launcher", "hydra-optuna-sweeper", "hydra-submitit-launcher", "babel"),
)
NEVER_IMPORTED = frozenset({"antigravity", "idlelib", "this", "turtle", "turtledemo"})  # of the standard library


def refuse_shadows() -> None:
    """End the command with one line and exit code 2 if a file in the working directory hides a library."""
    arguments = getattr(sys, "argv", None) or [""]
    if arguments[0] != "-m" and os.path.basename(arguments[0]) != SCRIPT:  # the package is imported as a library
        return
    try:
        folder = os.getcwd()
        hidden = sorted(_shadows(folder)) if folder in map(os.path.abspath, sys.path) else []
    except OSError:  # the folder is deleted or cannot be listed: nothing can be imported from it
        return
    if hidden:
        one = len(hidden) == 1
        print(
            f"{' and '.join(os.path.join(folder, name) for name in hidden)} would be imported in place of "
            f"{'the library of that name' if one else 'the libraries of these names'}: rename {'it' if one else 'them'}"
            ", or give the command in another folder",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _shadows(folder: str) -> list[str]:
    """The files and folders that hide a module of the standard library; if there are none, those that hide a library
    that this package needs."""
    modules = _modules(folder)
    elsewhere = [entry for entry in sys.path if os.path.abspath(entry) != folder]
    for module in [module for module in modules.values() if module in sys.modules]:
        file = os.path.abspath(getattr(sys.modules[module], "__file__", None) or "")
        if not file.startswith(os.path.join(folder, module)):  # the right one is loaded already
            modules = {name: other for name, other in modules.items() if other != module}
    hidden = [name for name, module in modules.items() if _is_in_standard_library(module)]
    return hidden or [
        name
        for name, module in modules.items()
        if module not in sys.stdlib_module_names
        and PathFinder.find_spec(module, elsewhere) is not None
        and _belongs_to_a_dependency(module)
    ]


def _modules(folder: str) -> dict[str, str]:
    """The files and packages of a folder that can be imported, with their module names. A folder without __init__ is
    left out: it hides no installed package."""
    suffixes, found = all_suffixes(), {}
    with os.scandir(folder) as entries:
        for entry in entries:
            module, dot, ending = entry.name.partition(".")
            if not module.isidentifier():
                continue
            if dot and dot + ending in suffixes:
                found[entry.name] = module
            elif not dot and any(os.path.exists(os.path.join(entry.path, f"__init__{one}")) for one in suffixes):
                found[entry.name + os.sep] = module
    return found


def _is_in_standard_library(module: str) -> bool:
    """Whether a module of the standard library can be hidden; built-in and frozen ones precede every folder."""
    return (
        module in sys.stdlib_module_names - NEVER_IMPORTED
        and BuiltinImporter.find_spec(module) is None
        and FrozenImporter.find_spec(module) is None
    )


def _belongs_to_a_dependency(module: str) -> bool:
    """Whether `module` is part of a needed library. Slow, as it reads the installed packages' metadata."""
    import re
    from importlib.metadata import PackageNotFoundError, distribution

    waiting, seen = list(DEPENDENCIES), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        record = "\n" + (found.read_text("RECORD") or found.read_text("SOURCES.txt") or "")
        if re.search(rf"\n{module}(/|\.[^/\n]*,)", record):
            return True
        header = (found.read_text("METADATA") or found.read_text("PKG-INFO") or "").partition("\n\n")[0]
        required = re.findall(r"^Requires-Dist: *([\w.-]+)[^;\n]*(.*)$", header, flags=re.MULTILINE)
        waiting += [other for other, marker in required if "extra" not in marker]
    return False
