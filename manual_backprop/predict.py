"""Predict with a trained model, as JSON lines: labels of texts, or forecasts."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

from manual_backprop.common.errors import InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser, add_device, add_run
from manual_backprop.trained_models.saved_model import RUN_HELP

if TYPE_CHECKING:
    from manual_backprop.tasks import Predictor

DESCRIPTION = f"""\
Writes the predictions of a trained model for new inputs, one JSON object per line, in the order of the inputs. For
task=classification an input is a text, and its line has the predicted label and the probability of each label. For
task=forecasting the whole file is one input, a series as CSV (a time and its values in each row), and each line is a
step after its end: the time, the step and the forecast of each value.

{RUN_HELP}

It needs only the checkpoint, not the data that the model was trained on. A line on stderr describes the model.

--file takes JSON lines (.jsonl, .ndjson), a table with a heading (.csv, .tsv), whose columns have the same names as in
the training data, or plain text with an input in each line. Stdin (-) is JSON lines if the first line begins with {{,
otherwise plain text. Rows of a Parquet file must be written as one of these first."""

EPILOG = """\
Examples

  python -m manual_backprop.predict last --text "Return a new event loop."
  python -m manual_backprop.predict last --file new.jsonl > predicted.jsonl
  python -m manual_backprop.predict last --file history.csv                     # task=forecasting
  cut -f2 table.tsv | python -m manual_backprop.predict last --file -

Exit codes: 0 done, 2 wrong input, with its file and line (predictions before it are written), 130 interrupted."""

AT_ONCE = 64  # inputs in a batch


def lines_of(place: str) -> Iterator[str]:
    """The lines of a file, or of stdin. Raises InputError if it cannot be read, or if it is not UTF-8."""
    where = "stdin" if place == "-" else place
    try:
        with nullcontext(sys.stdin.buffer) if place == "-" else open(place, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(b"PAR1\x15"):
                    raise InputError(
                        f"{where} is a Parquet file, and --file reads text: JSON lines, CSV, TSV, or an input in each "
                        "line. Write its rows as one of these, as with pandas: "
                        "read_parquet(FILE).to_csv(NEW_FILE, index=False)"
                    )
                yield line.decode("utf-8").removeprefix("\ufeff" if number == 1 else "")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}, line {number}: byte {error.start} of the line is 0x{line[error.start]:02x}, which is not "
            f"UTF-8 ({error.reason})"
        ) from error
    except OSError as error:
        raise InputError(f"--file {place}: cannot be read ({error.strerror or error})") from error


def show(predictor: Predictor, inputs: Iterator[Any]) -> int:
    """Print the predictions as they come, and return their number."""
    count = 0
    while some := list(islice(inputs, AT_ONCE)):
        for prediction in predictor.predict(some):
            print(json.dumps(prediction, ensure_ascii=False))
            count += 1
        sys.stdout.flush()
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("predict", DESCRIPTION, EPILOG)
    add_run(parser)
    parser.add_argument(
        "--text", action="append", default=[], metavar="TEXT", help="an input; may be given several times"
    )
    parser.add_argument("--file", metavar="FILE", help="inputs, see above; - is stdin")
    add_device(parser)
    options = parser.parse(arguments)
    if bool(options.text) == (options.file is not None):
        parser.error("give --text TEXT or --file FILE")

    from manual_backprop.tasks import task_named
    from manual_backprop.trained_models.evaluation import restored_task
    from manual_backprop.trained_models.saved_model import load

    saved = load(options.run, device=options.device)
    print(saved.line, file=sys.stderr, flush=True)
    if task_named(saved.task_name).inference_command[0] != "predict":
        parser.error(f"predict: {saved.usage_hint}")
    predictor = restored_task(saved).predictor(saved.model)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is UTF-8, independent of the terminal
    if options.file is None:
        show(predictor, map(predictor.read_text, options.text))
        return
    where = "stdin" if options.file == "-" else options.file
    if not show(predictor, predictor.read_lines(lines_of(options.file), where)):
        raise InputError(f"--file {options.file}: holds no input")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
