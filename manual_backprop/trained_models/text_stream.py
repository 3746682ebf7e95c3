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

OBEYED = ("Cc", "Cf", "Zl", "Zp")  # categories of characters: control, format, the separators of lines and paragraphs
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
    """`add(token)` returns the text that is certain now. All pieces together are what `decode` makes of all tokens,
    behind those that stand `before`.

    A token may end inside a character: its bytes wait for the rest. They show as one U+FFFD at the end of what is
    decoded, and nothing before it changes by what comes later. Where a tokenizer writes bytes as tokens of their own,
    a run of them is text, or none of it is, and waits for its end. What a token's text is may depend on those before
    it (a blank between words): some of them are decoded again each time.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.tokens: list[int] = list(before)[len(before) - min(len(before), tokenizer.context) :]
        self.given = len(tokenizer.decode(self.tokens))  # characters of their text that were returned

    def add(self, token: int) -> str:
        tokenizer, context = self.tokenizer, self.tokenizer.context
        self.tokens.append(token)
        text = tokenizer.decode(self.tokens)
        certain = len(text) - text.endswith(UNREADABLE)
        if waiting := tokenizer.open_bytes(self.tokens):
            certain = len(tokenizer.decode(self.tokens[:-waiting]))
        new = text[self.given : certain]
        self.given = max(self.given, certain)
        if certain == len(text) and len(self.tokens) > 2 * context:
            self.tokens = self.tokens[len(self.tokens) - context :]
            self.given = len(tokenizer.decode(self.tokens))
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
    begin = list(tokenizer.begin_token_ids)
    if prompt or begin:
        return begin + tokenizer.encode(prompt)
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

    given = prompt_tokens(tokenizer, prompt)
    read, end = torch.tensor([given]), tokenizer.end_token_id
    length, beams, penalty = sampling.max_length, sampling.beams, sampling.length_penalty
    drawing = sampling.temperature, sampling.top_k, sampling.top_p
    if beams > 1:
        found = model.generate(read, length, *drawing, end, sampling.seed, beams, penalty)
        tokens: Iterable[torch.Tensor] = found[0, read.shape[1] :]
    else:
        tokens = model.stream(read, length, *drawing, end, sampling.seed)

    def pieces() -> Iterator[str]:
        characters, until = WholeCharacters(tokenizer, given), UntilStop(stops)
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
        piece = "".join(c if c in "\n\t" or unicodedata.category(c) not in OBEYED else UNREADABLE for c in piece)
    print(piece, end="", flush=True)
