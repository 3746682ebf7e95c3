"""Let a trained model continue a text."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from manual_backprop.common.errors import InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser, add_run, add_sampling, add_search, whole
from manual_backprop.trained_models.saved_model import RUN_HELP

DESCRIPTION = f"""\
Continues a text with a trained model, and shows each character as soon as it is written.

{RUN_HELP}

The first line says which model it is; then come the prompt and its continuation. The model stops at the end of a
document, at --max-length, or before the first --stop."""

EPILOG = """\
Examples

  python -m manual_backprop.generate last --prompt "Return the"
  python -m manual_backprop.generate last --prompt "Return the" --temperature 0        # the same every time
  python -m manual_backprop.generate last@last --prompt "def " --num-samples 3 --seed 1
  python -m manual_backprop.generate last --prompt "def " --beams 4 --max-length 30    # the best of a search
  echo "This function" | python -m manual_backprop.generate last --prompt - --stop "." --max-length 200

What the model cannot see: of a prompt longer than model.max_seq_len only the end; past that length the window moves on
by half. Exit codes: 0 done, 2 wrong input, 3 the model's logits are not finite, 130 interrupted."""


def read_prompt(given: str) -> str:
    """`-` is what comes in on stdin, without the line break that ends it."""
    if given != "-":
        return given
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompt -: what came in on stdin is no UTF-8 (byte {error.start}): {error.reason}"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int | None:
    parser = Parser("generate", DESCRIPTION, EPILOG)
    add_run(parser)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help='what to continue; - reads stdin; "" starts a new document'
    )
    add_sampling(parser)
    add_search(parser)
    parser.add_argument(
        "--num-samples", type=whole(1), default=1, metavar="N", help="how many, the next with the next seed (1)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    options = parser.parse(arguments)
    if options.beams > 1 and options.num_samples > 1:
        parser.error("--num-samples: a search (--beams) finds the same text each time; leave one of them out")
    if "" in options.stop:
        parser.error("--stop: the text that ends a sample must not be empty")
    prompt = read_prompt(options.prompt)

    from manual_backprop.trained_models.saved_model import load
    from manual_backprop.trained_models.text_stream import Sampling, continuation, show

    saved = load(options.run, device=options.device)
    print(saved.line, flush=True)
    tokenizer = saved.tokenizer()
    sampling = Sampling.of(options)
    for sample in range(options.num_samples):
        if options.num_samples > 1:
            print(f"\n--- sample {sample + 1} of {options.num_samples} ---")
        if options.seed is not None:
            sampling = replace(sampling, seed=options.seed + sample)
        pieces = continuation(saved.model, tokenizer, prompt, sampling, options.stop)
        show(prompt)
        for piece in pieces:
            show(piece)
        print(flush=True)
    return None


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
