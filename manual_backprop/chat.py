"""Type texts that a trained model continues, interactively."""

import contextlib
import sys
from collections.abc import Sequence

from manual_backprop.common.errors import EXIT_DONE
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser, add_run, add_sampling
from manual_backprop.trained_models.chat import CHAT_COMMANDS, Chat
from manual_backprop.trained_models.saved_model import RUN_HELP

DESCRIPTION = f"""\
Type the beginning of a text, and a trained model continues it. The arrow keys edit a line and recall earlier ones.

{RUN_HELP}

Input lines

{CHAT_COMMANDS}"""

EPILOG = """\
Examples

  python -m manual_backprop.chat last
  python -m manual_backprop.chat last --temperature 0.5 --max-length 50
  printf 'Return the\\nquit\\n' | python -m manual_backprop.chat last

Exit codes: 0 done, 2 wrong input."""


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
    with contextlib.suppress(ImportError):  # optional
        import readline  # noqa: F401  input() uses it for editing and history
    print("Type the beginning of a text; help lists the commands, Ctrl-D quits.", flush=True)
    chat.run()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
