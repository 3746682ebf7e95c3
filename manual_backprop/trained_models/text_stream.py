"""A model's text while it is generated: complete characters only, up to the first stop text."""

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

CONTROL = ("Cc", "Cf", "Zl", "Zp")  # Unicode categories: control, format, line and paragraph separators
UNREADABLE = "\ufffd"  # decoding shows it for bytes that are not a complete character


@dataclass(frozen=True)
class Sampling:
    """The options of generation, as in `LanguageModel.generate`."""

    max_length: int
    temperature: float
    top_k: int
    top_p: float | None
    seed: int | None
    beams: int = 1  # more than 1: beam search, whose text comes as a whole at the end
    length_penalty: float = 0.0

    @classmethod
    def of(cls, options: Namespace) -> Sampling:
        """The options of a command line (`arguments.add_sampling`, and `add_search` if the command has it)."""
        given = vars(options)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


class WholeCharacters:
    """Decodes tokens one by one: `add(token)` returns the text that is certain now. All pieces together equal the
    decoded text of all tokens after the tokens `before`.

    A token may end inside a character: its bytes wait for the rest. Until then they are decoded as one U+FFFD at the
    end, and later tokens change nothing before it. If a tokenizer has tokens for single bytes, a run of them waits for
    its end, since all of it is text or none. The text of a token may depend on the tokens before it (a space between
    words), so some of these are decoded again each time.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.tokens: list[int] = list(before)[len(before) - min(len(before), tokenizer.context) :]
        self.returned = len(tokenizer.decode(self.tokens))  # characters of their text that were returned

    def add(self, token: int) -> str:
        tokenizer, context = self.tokenizer, self.tokenizer.context
        self.tokens.append(token)
        text = tokenizer.decode(self.tokens)
        certain = len(text) - text.endswith(UNREADABLE)
        if waiting := tokenizer.open_bytes(self.tokens):
            certain = len(tokenizer.decode(self.tokens[:-waiting]))
        new = text[self.returned : certain]
        self.returned = max(self.returned, certain)
        if certain == len(text) and len(self.tokens) > 2 * context:
            self.tokens = self.tokens[len(self.tokens) - context :]
            self.returned = len(tokenizer.decode(self.tokens))
        return new

    def rest(self) -> str:
        """The text of the last bytes, which are not a complete character."""
        return self.tokenizer.decode(self.tokens)[self.returned :]


class UntilStop:
    """Cuts a text at the first of `stops`: `add(piece)` returns the text that is certainly before it, and `stopped`
    becomes true at a stop."""

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
        overlap = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.waiting = text[len(text) - overlap :]
        return text[: len(text) - overlap]


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt as tokens; an empty one starts a new document, after an end token. Raises InputError."""
    begin = list(tokenizer.begin_token_ids)
    if prompt or begin:
        return begin + tokenizer.encode(prompt)
    if tokenizer.end_token_id is None:
        raise InputError(
            f"The prompt is empty, and tokenizer={tokenizer.name} has no end token to start after: give at least one "
            "character"
        )
    return [tokenizer.end_token_id]


def continuation(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling, stops: Sequence[str] = ()
) -> Iterator[str]:
    """The text after a prompt, piece by piece. Raises InputError already when it is called."""
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
    """Print a piece of text at once. In a terminal, control characters that the model may generate are replaced."""
    if sys.stdout.isatty():
        piece = "".join(c if c in "\n\t" or unicodedata.category(c) not in CONTROL else UNREADABLE for c in piece)
    print(piece, end="", flush=True)
