"""Arguments of the commands that use a trained model: argparse, with a sentence for each mistake.

Numbers are checked here, before torch is imported. The error for a misspelt option names the nearest right one.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn, TypeVar

from manual_backprop.common.errors import InputError
from manual_backprop.config.plugins import HELP, load_plugins
from manual_backprop.config.rules import did_you_mean, nearest

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Raises InputError; argparse would print its usage and exit."""

    def __init__(self, command: str, description: str, epilog: str):
        super().__init__(
            prog=f"python -m manual_backprop.{command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=110),
        )
        self.add_argument("--plugin", action="append", default=[], metavar="MODULE", help=HELP)

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        given = list(sys.argv[1:] if arguments is None else arguments)
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        for argument in given:
            name = argument.partition("=")[0]
            if name.startswith("--") and len(name) > 2 and name[2:] not in known:
                meant = nearest(name[2:].replace("_", "-"), known)
                self.error(f"{name}: there is no such option{did_you_mean(meant and f'--{meant}')}")
        options, rest = self.parse_known_args(given)
        if rest:
            self.error(f"{rest[0]}: unexpected argument; a text of several words needs quotes around it")
        load_plugins(options.plugin)
        return options

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}\nSee {self.prog} --help")


def sub_command(
    command: str, overview: str, names: list[str], arguments: Sequence[str] | None
) -> tuple[str, list[str]] | None:
    """The first argument, which is one of `names`, and the rest; None after --help, which prints `overview`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(overview)
        if given:
            return None
        raise InputError(f"No command was given: give one of {', '.join(names)}.")
    if given[0] not in names:
        hint = did_you_mean(nearest(given[0], names), otherwise=".")
        raise InputError(f"{given[0]}: there is no such command{hint}\nSee {command} --help")
    return given[0], given[1:]


def whole(minimum: int) -> Callable[[str], int]:
    return _reader(int, lambda value: minimum <= value < 2**63, f"a whole number of at least {minimum}")


def number(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A finite number for which `holds` is true; `rule` is that condition in words."""
    return _reader(float, lambda value: math.isfinite(value) and holds(value), f"a number, {rule}")


def _reader(kind: Callable[[str], T], holds: Callable[[T], bool], rule: str) -> Callable[[str], T]:
    def read(text: str) -> T:
        with suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}, was {text!r}")

    return read


temperature = number("at least 0", lambda value: value >= 0)
share = number("more than 0 and at most 1", lambda value: 0 < value <= 1)


def add_run(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run or a checkpoint, see above")


def add_device(parser: Parser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one (auto)"
    )


def add_search(parser: Parser) -> None:
    """The options of beam search (`models/decoding/generation.py`)."""
    parser.add_argument(
        "--beams",
        type=whole(1),
        default=1,
        metavar="N",
        help="beam search with N beams, if more than 1: keep the N best continuations and show the one with the best "
        "score; nothing is sampled, so temperature, top-k, top-p and seed have no effect (1)",
    )
    parser.add_argument(
        "--length-penalty",
        type=number("at least 0", lambda value: value >= 0),
        default=0.6,
        metavar="A",
        help="of beam search: score = log p(new tokens) / ((5 + number of new tokens) / 6)^A; 0 compares "
        "log-probabilities, a higher A prefers longer texts (0.6)",
    )


def add_sampling(parser: Parser) -> None:
    """The sampling options that generate and chat share."""
    parser.add_argument(
        "--max-length", type=whole(0), default=100, metavar="N", help="at most N new tokens, without the prompt (100)"
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.8,
        metavar="X",
        help="0 takes the likeliest token each time; a higher one samples unlikely tokens more often (0.8)",
    )
    parser.add_argument(
        "--top-k", type=whole(0), default=50, metavar="K", help="sample from the K likeliest tokens; 0: from all (50)"
    )
    parser.add_argument(
        "--top-p", type=share, metavar="P", help="of these, keep the likeliest that add up to probability P (all)"
    )
    parser.add_argument(
        "--seed", type=whole(0), metavar="S", help="the same seed samples the same text (a new seed each time)"
    )
    add_device(parser)
