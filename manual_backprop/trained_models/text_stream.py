"""A model's text while it is written: whole characters only, up to the first text that ends it."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from manual_backprop.common.errors import InputError

if TYPE_CHECKING:
    from argparse import Namespace

    from manual_backprop.data.tokens.tokenizer import Tokenizer
    from manual_backprop.models.wrappers.language_model import LanguageModel

UNREADABLE = "\ufffd"  # what decoding shows for bytes that are no character, or not yet


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; as `LanguageModel.generate` takes it."""

    max_length: int
    temperature: float
    top_k: int
    top_p: float | None
    seed: int | None
    beams: int = 1  # more than 1: nothing is drawn, and what a search finds comes as a whole
    length_penalty: float = 0.0

    @classmethod
    def of(cls, options: Namespace) -> Sampling:
        """As the command line has it (`arguments.add_sampling`, and `add_search` where a command has one)."""
        given = vars(options)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


class WholeCharacters:
    """`add(token)` returns the text that is certain now. All pieces together are what `decode` makes of all tokens.

    A token may end inside a character: its bytes wait for the rest. They show as one U+FFFD at the end of what is
    decoded, and nothing before it changes by what comes later.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []  # since the last moment at which no character was incomplete
        self.given = 0  # characters of their text that were returned

    def add(self, token: int) -> str:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if text.endswith(UNREADABLE):
            new, self.given = text[self.given : -1], max(self.given, len(text) - 1)
        else:
            new, self.tokens, self.given = text[self.given :], [], 0
        return new

    def rest(self) -> str:
        """At the end: what never became a character."""
        return self.tokenizer.decode(self.tokens)[self.given :]


class UntilStop:
    """`add(piece)` returns the text that is certain to stand before the first of `stops`; then `stopped` is true."""

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.waiting = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        text = self.waiting + piece
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self.waiting = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the start of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt as tokens; an empty one starts a new document, behind an end token. Raises InputError."""
    if prompt:
        return tokenizer.encode(prompt)
    if tokenizer.end_token_id is None:
        raise InputError(
            f"The prompt is empty, and tokenizer={tokenizer.name} has no end token to begin behind: give at least one "
            "character"
        )
    return [tokenizer.end_token_id]


def continuation(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling, stops: Sequence[str] = ()
) -> Iterator[str]:
    """The text behind a prompt, piece by piece. What cannot be used is refused at once, with InputError."""
    import torch

    read, end = torch.tensor([prompt_tokens(tokenizer, prompt)]), tokenizer.end_token_id
    length, beams, penalty = sampling.max_length, sampling.beams, sampling.length_penalty
    drawing = sampling.temperature, sampling.top_k, sampling.top_p
    if beams > 1:
        found = model.generate(read, length, *drawing, end, sampling.seed, beams, penalty)
        tokens: Iterable[torch.Tensor] = found[0, read.shape[1] :]
    else:
        tokens = model.stream(read, length, *drawing, end, sampling.seed)

    def pieces() -> Iterator[str]:
        characters, until = WholeCharacters(tokenizer), UntilStop(stops)
        for token in tokens:
            yield until.add(characters.add(int(token)))
            if until.stopped:
                return
        yield until.add(characters.rest())
        yield until.waiting

    return (piece for piece in pieces() if piece)


def show(piece: str) -> None:
    """Print it at once. A terminal obeys control characters, and a model may write any: there they are made visible."""
    if sys.stdout.isatty():
        piece = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else UNREADABLE for c in piece)
    print(piece, end="", flush=True)
