"""Continue a text with a trained model, or translate a source."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from manual_backprop.common.errors import InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser, add_run, add_sampling, add_search, whole
from manual_backprop.trained_models.saved_model import RUN_HELP

DESCRIPTION = f"""\
Continues a text (--prompt) with a language model, and shows each character as soon as it is generated. Or generates the
target of a source (--source): of a text with a model of task=translation, of a row of numbers with one of
task=reversal, copy or sort.

{RUN_HELP}

The first line describes the model; then come the prompt and its continuation. The model stops at the end of a document,
after --max-length tokens, or before the first --stop. With --source it takes the likeliest token each time, unless
--temperature, --top-k or --top-p is given, and prints a line for each source: the translation; or for a row of numbers
the row, the generated target, and whether it is right. --source - reads a source from each line of stdin."""

EPILOG = """\
Examples

  python -m manual_backprop.generate last --prompt "Return the"
  python -m manual_backprop.generate last --prompt "Return the" --temperature 0        # the same text every time
  python -m manual_backprop.generate last@last --prompt "def " --num-samples 3 --seed 1
  python -m manual_backprop.generate last --prompt "def " --beams 4 --max-length 30    # beam search
  python -m manual_backprop.generate last --source "1 2 3 4"                           # task=reversal, copy, sort
  python -m manual_backprop.generate last --source "1 2 3 4" --beams 4 --length-penalty 1
  python -m manual_backprop.generate last --source "<de> March 3, 1998"                # task=translation dataset=dates
  echo "This function" | python -m manual_backprop.generate last --prompt - --stop "." --max-length 200

The model sees only the last model.max_seq_len tokens of a prompt; when a text reaches that length, it forgets the first
half. Exit codes: 0 done, 2 wrong input, 3 the model's logits are not finite, 130 interrupted."""


def read_text(given: str, option: str) -> str:
    """The given text; for `-` the text from stdin, without the last line break. Raises InputError."""
    if given != "-":
        return given
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{option} -: the text from stdin is not UTF-8 (byte {error.start}): {error.reason}"
        ) from error


def write_source(parser: Parser, options: Namespace) -> None:
    """Print the generated target of each source."""
    if options.stop or options.max_length != parser.get_default("max_length"):
        parser.error("--stop, --max-length: are for prompts; the model itself ends the target of a source")
    given = read_text(options.source, "--source")
    sources = given.splitlines() if options.source == "-" else [given]
    if not sources:
        raise InputError("--source -: nothing came in on stdin; give a source on each line")

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
    for number, source in enumerate(sources, 1):
        try:
            for sample in range(options.num_samples):
                seed = None if options.seed is None else options.seed + sample
                print(writer.write(source, **drawing, **search, seed=seed), flush=True)
        except InputError as error:
            raise InputError(f"stdin, line {number}: {error}" if options.source == "-" else str(error)) from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("generate", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add_run(parser)
    add("--prompt", metavar="TEXT", help='what to continue; - reads stdin; "" starts a new document')
    add("--source", metavar="SOURCE", help='in place of a prompt: a text, or numbers, as in "1 2 3 4"; - reads stdin')
    add_sampling(parser)
    add_search(parser)
    add("--num-samples", type=whole(1), default=1, metavar="N", help="number of texts, each with the next seed (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be given several times")
    usual = {"temperature": parser.get_default("temperature"), "top_k": parser.get_default("top_k")}
    parser.set_defaults(temperature=None, top_k=None)
    options = parser.parse(arguments)
    if (options.prompt is None) == (options.source is None):
        parser.error("give --prompt TEXT, or --source SOURCE to a model of task=translation, reversal, copy or sort")
    if options.source is not None:
        write_source(parser, options)
        return
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.beams > 1 and options.num_samples > 1:
        parser.error("--num-samples: beam search (--beams) finds the same text each time; leave one of them out")
    if "" in options.stop:
        parser.error("--stop: the text must not be empty")
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


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
