"""An interactive session: a trained model continues each line, unless the line is a command."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..common.errors import ManualBackpropError
from ..config.arguments import temperature, whole
from ..data.tokens.tokenizer import Tokenizer
from .saved_model import SavedModel
from .text_stream import Sampling, continuation, show

CHAT_COMMANDS = """\
  temp 0.5     sampling temperature; 0 takes the likeliest token each time
  topk 40      sample from the 40 likeliest tokens; 0: from all
  length 200   at most 200 new tokens
  help         this list, and the current settings
  quit         also exit, q or Ctrl-D
  Ctrl-C       stops a reply
The model continues every other line, each by itself: it has learned to continue texts, not to answer."""
PROMPT = "> "
EXIT_WORDS = ("quit", "exit", "q")
SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "temp": ("temperature", temperature),
    "topk": ("top_k", whole(0)),
    "length": ("max_length", whole(0)),
}


class Chat:
    """Reads and answers lines until one of EXIT_WORDS. An error in a line does not end the session."""

    def __init__(self, saved: SavedModel, tokenizer: Tokenizer, sampling: Sampling):
        self.saved, self.tokenizer, self.sampling = saved, tokenizer, sampling

    def run(self) -> None:
        while True:
            try:
                line = input(PROMPT)
                if line.strip() in EXIT_WORDS:
                    return
                self.answer(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
            except ManualBackpropError as error:
                print(error, flush=True)

    def answer(self, line: str) -> None:
        words = line.split()
        if not words:
            return
        if words == ["help"]:
            print(f"{CHAT_COMMANDS}\n{self.settings()}")
        elif words[0] in SETTINGS and len(words) == 2:
            self.change(*words)
        else:
            self.reply(line)

    def change(self, name: str, value: str) -> None:
        field, read = SETTINGS[name]
        try:
            self.sampling = replace(self.sampling, **{field: read(value)})
        except ArgumentTypeError as error:
            print(f"{name}: {error}")
        else:
            print(self.settings())

    def settings(self) -> str:
        sampling = self.sampling
        return f"temp {sampling.temperature:g}, topk {sampling.top_k}, length {sampling.max_length}"

    def reply(self, line: str) -> None:
        pieces = continuation(self.saved.model, self.tokenizer, line, self.sampling)
        show(line)
        for piece in pieces:
            show(piece)
        print(flush=True)
