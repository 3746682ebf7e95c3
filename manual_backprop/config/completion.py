"""Shell completion: what a shell offers after `manual-backprop model=<TAB>`. Reads the schema and `conf/` only.

Hydra's script connects a shell to it (`eval "$(manual-backprop -sc install=bash)"`, likewise zsh and fish). It calls
`manual-backprop -sc query=SHELL` with the current line in COMP_LINE.
"""

import os
from pathlib import Path

from manual_backprop.config.rules import Flag, Word
from manual_backprop.config.schema import EXPERIMENTS, shipped_folder
from manual_backprop.config.validation import groups, keys

OPTIONS = ("--cfg", "--config-dir", "--help", "--info", "--multirun", "--version")
PLUGINS = ("hydra/launcher", "hydra/sweeper")


def answer() -> int:
    print(" ".join(completions(os.environ.get("COMP_LINE", ""))))
    return 0


def completions(line: str) -> list[str]:
    """The possible completions of the last word of a command line."""
    word = line.rpartition(" ")[2]
    if word.startswith("-"):
        return [option for option in OPTIONS if option.startswith(word)]
    key, equals, value = word.partition("=")
    if equals:
        before, comma, begun = value.rpartition(",")  # in a sweep, complete the value after the last comma
        return [f"{key}={before}{comma}{choice}" for choice in values(key, begun) if choice.startswith(begun)]
    dotted = [name for name in keys() if not name.endswith(".name")]
    names = [*groups(), EXPERIMENTS, *PLUGINS, *(name for name in dotted if "." in word or "." not in name)]
    return [f"{name}=" for name in names if name.startswith(word)] + [
        f"{group}." for group in groups() if "." not in word and word and group.startswith(word)
    ]


def values(key: str, begun: str = "") -> list[str]:
    """The possible values of a key, if there is a list of them."""
    if key in groups() or key in PLUGINS:
        return _options(shipped_folder("conf") / key)
    if key == EXPERIMENTS:
        return _options(shipped_folder(EXPERIMENTS))
    if key == "dataset.path":
        folder = Path(begun).parent if not begun.endswith("/") else Path(begun)
        try:
            return sorted(str(path) + "/" * path.is_dir() for path in folder.iterdir())
        except OSError:
            return []
    if key == "resume":
        return ["last", "best", *sorted(path.name for path in Path("outputs/runs").glob("*-*-*"))]
    rule = keys()[key].metadata["rule"] if key in keys() else None
    if isinstance(rule, Flag):
        return ["true", "false"]
    return list(rule.choices) if isinstance(rule, Word) else []


def _options(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))
