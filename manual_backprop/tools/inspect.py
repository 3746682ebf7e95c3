"""Shows a dataset: its splits, columns and sizes, and some rows."""

import sys
from collections.abc import Sequence

from ..common.errors import InputError
from ..common.exit_codes import exit_code_of
from ..common.plain_text import visible
from ..config.arguments import Parser, whole
from .dataset_arguments import (
    DATASETS,
    add_dataset_options,
    dataset_of,
    errors_name_options,
    interruptible,
    with_options_for_keys,
)

COMMAND = "python -m manual_backprop.tools.inspect"

DESCRIPTION = f"""\
Shows the splits of a dataset, their columns and sizes, and some rows: raw, as stored, and decoded, as the text that a
model would read. From a dataset on the hub only these rows are downloaded.

{DATASETS}
It also shows a folder that tools.tokenization pretokenize has written; its raw rows are token ids."""

EPILOG = f"""\
Examples

  {COMMAND} tinystories --rows 2
  {COMMAND} python_docs --tokenizer byte
  {COMMAND} mails.jsonl --text-key body
  {COMMAND} outputs/pretokenized/python_docs-byte-1a2b3c4d

Exit codes: 0 done, 2 wrong input, a gated or missing dataset, or no network connection."""

TAB = "\t"
UNITS = ("bytes", "kB", "MB", "GB", "TB")


def in_bytes(size: int) -> str:
    value, unit = float(size), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{size:,} bytes" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[:width]} ... ({len(text):,} characters)"


def main(arguments: Sequence[str] | None = None) -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = Parser("tools.inspect", DESCRIPTION, EPILOG)
    parser.add_argument("dataset", metavar="DATASET", help="see above")
    parser.add_argument("--rows", type=whole(0), default=3, metavar="N", help="of each split (3)")
    parser.add_argument("--width", type=whole(1), default=400, metavar="N", help="characters of each (400)")
    parser.add_argument("--tokenizer", metavar="TOKENIZER", help="also show tokens: a folder, byte, gpt2, OWNER/NAME")
    add_dataset_options(parser)
    options = parser.parse(arguments)

    from ..data.datasets.description import NO_TEXT, describe, describe_shards
    from ..data.tokens.pretrained import tokenizer_named
    from ..data.tokens.token_shards import is_shards

    with errors_name_options(), interruptible("nothing was written."):
        tokenizer = None if options.tokenizer is None else tokenizer_named(options.tokenizer)
        if is_shards(options.dataset):
            splits = describe_shards(options.dataset, options.rows)
        else:
            splits = describe(dataset_of(options.dataset, options), options.rows)
    for split in splits:
        rows = "rows not counted" if split.rows is None else f"{split.rows:,} {'row' if split.rows == 1 else 'rows'}"
        size = "size not known" if split.size is None else in_bytes(split.size)
        columns = visible(", ".join(f"{name} ({kind})" for name, kind in split.columns.items()))
        print(f"{visible(split.name)}: {rows}, {size}; columns: {columns or 'none seen'}")
        for number, (raw, text) in enumerate(split.samples, 1):
            print(f"\n  {visible(split.name)}, row {number}, raw\n{_indented(shortened(raw, options.width))}")
            decoded = with_options_for_keys(text) if text.startswith(NO_TEXT) else text
            print(f"  decoded\n{_indented(shortened(decoded, options.width))}")
            if tokenizer is not None and not text.startswith(NO_TEXT):
                try:
                    ids = tokenizer.encode(text[: options.width])
                except InputError as error:  # an unknown character
                    print(f"  no tokens\n{_indented(str(error))}")
                    continue
                pieces = "|".join(tokenizer.decode([token]) for token in ids)
                print(f"  {len(ids)} tokens\n{_indented(shortened(' '.join(map(str, ids)), options.width))}")
                print(_indented(pieces))
        print()


def _indented(text: str) -> str:
    """The lines of a text, indented. Only a line feed ends a line; control characters are made visible."""
    return "\n".join(f"    {visible(line, kept=TAB)}" for line in text.removesuffix("\n").split("\n"))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
