"""Show a model's parameters, arithmetic, time and memory; and one training step tensor by tensor."""

import sys
from collections.abc import Sequence

from manual_backprop.common.columns import table_console
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser, number
from manual_backprop.trained_models.saved_model import RUN_HELP, names_a_run

DESCRIPTION = f"""\
Shows a model's parameters and costs, for a trained model (RUN) or for the model of a command line (KEY=VALUE ..., as
for manual_backprop.run; without arguments the default model).

{RUN_HELP}

The first line describes the model. Then come

  parameters   every tensor with its shape, its number of elements and its share, by block and in total
  arithmetic   FLOPs of a token and of a step, steps of an epoch, and the time of a run at --tflops
  memory       weights, gradients, moments and activations at training.batch_size, for each of the three levels:
               by hand, the same under autograd, and idiomatic PyTorch
  --shapes     one training step on the first batch: every activation and every gradient with its shape, format and
               size, whether it is finite, and the loss beside ln V, that of an untrained model"""

EPILOG = """\
Examples

  python -m manual_backprop.summary last
  python -m manual_backprop.summary model=gpt2 precision=bf16 --tflops 400
  python -m manual_backprop.summary model=tiny architecture=llama precision=bf16 --shapes

Exit codes: 0 done, 2 wrong input."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("summary", DESCRIPTION, EPILOG)
    parser.add_argument("subject", nargs="*", metavar="RUN or KEY=VALUE", help="a run, or the settings of a model")
    parser.add_argument(
        "--tflops",
        type=number("more than 0", lambda value: value > 0),
        metavar="X",
        help="10^12 operations per second, to estimate the run time (measured)",
    )
    parser.add_argument("--shapes", action="store_true", help="make one training step and list every tensor of it")
    options = parser.parse(arguments)
    runs = [one for one in options.subject if "=" not in one or names_a_run(one)]
    if runs and len(options.subject) > 1:
        parser.error(f"{runs[0]}: give either one RUN or overrides KEY=VALUE")
    from manual_backprop.training import model_summary as tables

    subject = tables.trained(runs[0]) if runs else tables.described(options.subject)

    console = table_console()
    print(subject.line, end="\n\n", flush=True)
    tables.show_parameters(console, subject.network_config)
    tables.show_cost(console, subject, options.tflops)
    tables.show_memory(console, subject)
    if options.shapes:
        tables.show_step(console, subject)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
