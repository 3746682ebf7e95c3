"""Let a trained model continue a text."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from manual_backprop.common.errors import InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser, add_run, add_sampling, add_search, whole
from manual_backprop.trained_models.saved_model import RUN_HELP

DESCRIPTION = f"""\
Continues a text with a trained model, and shows each character as soon as it is written; or writes what becomes of a
source: of a text with a model of task=translation, of a row of numbers with one of task=reversal, copy or sort.

{RUN_HELP}

The first line says which model it is; then come the prompt and its continuation. The model stops at the end of a
document, at --max-length, or before the first --stop. With --source, which takes the likeliest token each time unless
--temperature, --top-k or --top-p is given, comes a line for each source: the translation; of a row of numbers the row,
what the model writes, and whether it is right. --source - reads a source from each line of stdin."""

EPILOG = """\
Examples

  python -m manual_backprop.generate last --prompt "Return the"
  python -m manual_backprop.generate last --prompt "Return the" --temperature 0        # the same every time
  python -m manual_backprop.generate last@last --prompt "def " --num-samples 3 --seed 1
  python -m manual_backprop.generate last --prompt "def " --beams 4 --max-length 30    # the best of a search
  python -m manual_backprop.generate last --source "1 2 3 4"                           # task=reversal, copy, sort
  python -m manual_backprop.generate last --source "1 2 3 4" --beams 4 --length-penalty 1
  python -m manual_backprop.generate last --source "<de> March 3, 1998"                # task=translation dataset=dates
  echo "This function" | python -m manual_backprop.generate last --prompt - --stop "." --max-length 200

What the model cannot see: of a prompt longer than model.max_seq_len only the end; past that length the window moves on
by half. Exit codes: 0 done, 2 wrong input, 3 the model's logits are not finite, 130 interrupted."""


def read_text(given: str, option: str) -> str:
    """`-` is what comes in on stdin, without the line break that ends it."""
    if given != "-":
        return given
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{option} -: what came in on stdin is no UTF-8 (byte {error.start}): {error.reason}"
        ) from error


def write_source(parser: Parser, options: Namespace) -> None:
    """What a model makes of a source."""
    if options.stop or options.max_length != parser.get_default("max_length"):
        parser.error("--stop, --max-length: are for prompts; what becomes of a source ends where the model ends it")
    given = read_text(options.source, "--source")
    sources = given.splitlines() if options.source == "-" else [given]

    from manual_backprop.tasks import task_named
    from manual_backprop.trained_models.evaluation import restored_task
    from manual_backprop.trained_models.saved_model import load

    saved = load(options.run, device=options.device)
    print(saved.line, flush=True)
    if task_named(saved.task_name).inference_command[:2] != ("generate", "--source"):
        parser.error(f"--source: {saved.usage_hint}")
    writer = restored_task(saved).writer(saved.model)
    draws = (options.temperature, options.top_k, options.top_p) != (None, None, None)
    temperature = (1.0 if draws else 0.0) if options.temperature is None else options.temperature
    drawing = {"temperature": temperature, "top_k": options.top_k, "top_p": options.top_p}
    search = {"beams": options.beams, "length_penalty": options.length_penalty}
    for source in sources:
        for sample in range(options.num_samples):
            seed = None if options.seed is None else options.seed + sample
            print(writer.write(source, **drawing, **search, seed=seed), flush=True)


def main(arguments: Sequence[str] | None = None) -> int | None:
    parser = Parser("generate", DESCRIPTION, EPILOG)
    add_run(parser)
    parser.add_argument("--prompt", metavar="TEXT", help='what to continue; - reads stdin; "" starts a new document')
    parser.add_argument(
        "--source", metavar="SOURCE", help='in place of a prompt: a text, or numbers, as in "1 2 3 4"; - reads stdin'
    )
    add_sampling(parser)
    add_search(parser)
    parser.add_argument(
        "--num-samples", type=whole(1), default=1, metavar="N", help="how many, the next with the next seed (1)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    usual = {"temperature": parser.get_default("temperature"), "top_k": parser.get_default("top_k")}
    parser.set_defaults(temperature=None, top_k=None)
    options = parser.parse(arguments)
    if (options.prompt is None) == (options.source is None):
        parser.error("give --prompt TEXT, or --source SOURCE to a model of task=translation, reversal, copy or sort")
    if options.source is not None:
        write_source(parser, options)
        return None
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.beams > 1 and options.num_samples > 1:
        parser.error("--num-samples: a search (--beams) finds the same text each time; leave one of them out")
    if "" in options.stop:
        parser.error("--stop: the text that ends a sample must not be empty")
    prompt = read_text(options.prompt, "--prompt")

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
