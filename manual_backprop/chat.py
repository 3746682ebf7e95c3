"""Write a text and let a trained model go on with it, again and again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from manual_backprop.common.errors import EXIT_DONE, ManualBackpropError
from manual_backprop.config.arguments import Parser, add_run, add_sampling, temperature, whole
from manual_backprop.trained_models.saved_model import RUN_HELP

if TYPE_CHECKING:
    from manual_backprop.data.tokens.tokenizer import Tokenizer
    from manual_backprop.trained_models.saved_model import SavedModel
    from manual_backprop.trained_models.text_stream import Sampling

CHAT_COMMANDS = """\
  temp 0.5     how freely tokens are drawn; 0 takes the likeliest each time
  topk 40      draw among the 40 likeliest; 0: among all
  length 200   new tokens at most
  help         this list, and how tokens are drawn now
  quit         also exit, q or Ctrl-D
  Ctrl-C       stops a reply
Every other line is continued, each by itself: the model has learned to go on with texts, not to answer."""

DESCRIPTION = f"""\
Write the beginning of a text, and a trained model goes on with it. The arrow keys edit a line and bring back earlier
ones.

{RUN_HELP}

What can be typed

{CHAT_COMMANDS}"""

EPILOG = """\
Examples

  python -m manual_backprop.chat last
  python -m manual_backprop.chat last --temperature 0.5 --max-length 50
  printf 'Return the\\nquit\\n' | python -m manual_backprop.chat last

Exit codes: 0 done, 2 wrong input."""

PROMPT = "> "
EXIT_WORDS = ("quit", "exit", "q")
SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "temp": ("temperature", temperature),
    "topk": ("top_k", whole(0)),
    "length": ("max_length", whole(0)),
}


class Chat:
    """Reads lines until one ends it. Nothing that goes wrong with a line ends it."""

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
        from argparse import ArgumentTypeError

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
        from manual_backprop.trained_models.text_stream import continuation, show

        pieces = continuation(self.saved.model, self.tokenizer, line, self.sampling)
        show(line)
        for piece in pieces:
            show(piece)
        print(flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("chat", DESCRIPTION, EPILOG)
    add_run(parser)
    add_sampling(parser)
    options = parser.parse(arguments)

    from manual_backprop.trained_models.saved_model import load
    from manual_backprop.trained_models.text_stream import Sampling

    saved = load(options.run, device=options.device)
    print(saved.line, flush=True)
    sampling = Sampling.of(options)
    chat = Chat(saved, saved.tokenizer(), sampling)
    with contextlib.suppress(ImportError):  # a Python without it reads lines all the same
        import readline  # noqa: F401  input() edits lines with it, and remembers them
    print("Write the beginning of a text; help shows what else can be typed, Ctrl-D leaves.", flush=True)
    chat.run()
    return EXIT_DONE


if __name__ == "__main__":
    from manual_backprop.common.exit_codes import exit_code_of

    sys.exit(exit_code_of(main))
