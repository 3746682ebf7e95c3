"""Tokenizers for datasets: choose a vocabulary size, train a tokenizer, and write tokens as shards.

The same for Python: `analyze_dataset`, `train_tokenizer`, `train_tokenizer_from_files`, `pretokenize_dataset` and
`load_pretokenized`, here and in `manual_backprop`.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import manual_backprop

from ..common.errors import InputError
from ..common.exit_codes import exit_code_of
from ..common.startup.output import enduring_output
from ..config.arguments import Parser, sub_command, whole
from .dataset_arguments import (
    DATASETS,
    add_dataset_options,
    add_skip_bad_rows,
    add_subset,
    dataset_of,
    datasets_of,
    errors_name_options,
    interruptible,
    pasted,
)

FUNCTIONS = (
    *("analyze_dataset", "load_pretokenized", "pretokenize_dataset"),
    *("train_tokenizer", "train_tokenizer_from_files"),
)
COMMAND = "python -m manual_backprop.tools.tokenization"
PICTURES = Path("outputs/analysis")

OVERVIEW = f"""\
Chooses a vocabulary size, trains a tokenizer, and writes tokens as shards. Give one of

  {COMMAND} analyze DATASET ...
  {COMMAND} train registry DATASET VOCAB_SIZE
  {COMMAND} train file FILE ... VOCAB_SIZE
  {COMMAND} pretokenize DATASET TOKENIZER

Each takes --help.

{DATASETS}

Only the datasets that you name are downloaded; later they are used offline.
Exit codes: 0 done, 2 wrong input, 4 the disk is full or read-only, 130 interrupted."""

ANALYZE = f"""\
Compares byte-pair encodings of several sizes on a dataset, and recommends a vocabulary size and a sequence length. It
shows tokens, bytes per token, the share of the vocabulary that occurs, how many tokens cover 90 to 99.9 % of the text
and which they are, and the lengths of documents. The encodings are trained here, from the training documents; your own
text needs no network. Several datasets are compared in one table and one picture.

{DATASETS}"""

ANALYZE_EPILOG = f"""\
The recommended vocabulary is the largest for which at most a tenth of the learned tokens occur less than 100 times, and
each doubling up to it saves at least 5 % of the tokens. max_seq_len is the smallest power of two, from 64 to 1024, that
fits 95 % of the documents.

Examples

  {COMMAND} analyze python_docs
  {COMMAND} analyze tinystories wikitext --subset 20000
  {COMMAND} analyze notes/ --tokenizer gpt2 --picture notes.png"""

TRAIN = f"""\
Trains a byte-level byte-pair encoding with <unk> <pad> <bos> <eos>, and writes a folder that
transformers.AutoTokenizer.from_pretrained and tokenizer=file tokenizer.path=FOLDER load.

  {COMMAND} train registry DATASET VOCAB_SIZE  its training documents
  {COMMAND} train file FILE ... VOCAB_SIZE     all documents of .txt, .jsonl, .parquet

{DATASETS}"""

TRAIN_EPILOG = f"""\
From more than 32 MB of text a sample of about that size is used, in pieces from all over it. An existing folder is not
changed; if it contains another tokenizer, that is an error.

Examples

  {COMMAND} train registry tinystories 4096 --subset 50000
  {COMMAND} train file notes.txt mails.jsonl 2048 --text-key body
  python -m manual_backprop.run tokenizer=file tokenizer.path=outputs/tokenizers/tinystories-4096-first-50000"""

PRETOKENIZE = f"""\
Writes a dataset's training and validation tokens as memory-mapped shards, with a manifest: source, revision, digest of
the tokenizer, counts, SHA-256 of each file. The same input gives the same bytes, whatever the number of workers. A
repeated command finds the finished shards; after an interruption it continues.

{DATASETS}

TOKENIZER is byte, gpt2, OWNER/NAME on the hub, a folder with tokenizer.json, or the name of one in
outputs/tokenizers."""

PRETOKENIZE_EPILOG = f"""\
Examples

  {COMMAND} pretokenize tinystories tinystories-4096-first-50000
  {COMMAND} pretokenize notes/ byte --max-length 1024 --output notes-tokens

  python -m manual_backprop.run dataset=pretokenized dataset.path=notes-tokens tokenizer=pretokenized

In Python: from manual_backprop import load_pretokenized; tokens = load_pretokenized(FOLDER, "train")"""


def __getattr__(name: str) -> Any:
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(manual_backprop, name)


def analyze(arguments: Sequence[str]) -> None:
    parser = Parser("tools.tokenization analyze", ANALYZE, ANALYZE_EPILOG)
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="see above")
    add_subset(parser)
    parser.add_argument(
        "--tokenizer", metavar="TOKENIZER", help="count with this one: a folder, byte, gpt2, OWNER/NAME"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="(outputs/analysis/DATASET.png)")
    add_dataset_options(parser)
    add_skip_bad_rows(parser)
    options = parser.parse(arguments)
    if options.picture is not None and options.picture.suffix != ".png":
        raise InputError(f"--picture {options.picture}: must end in .png, as in analysis.png")
    datasets = datasets_of(options.datasets, options)

    from ..data.datasets.analysis import analyze_dataset
    from ..data.datasets.analysis_picture import draw_analysis
    from ..data.datasets.analysis_text import summary

    with interruptible("nothing was written."):
        reports = [analyze_dataset(dataset, tokenizer=options.tokenizer)[0] for dataset in datasets]
        print(summary(reports))
        picture = options.picture or PICTURES / f"{'-'.join(report.title for report in reports)}.png"
        if draw_analysis(reports, picture):
            print(f"\npicture: {picture}")


def train(arguments: Sequence[str]) -> None:
    parser = Parser("tools.tokenization train", TRAIN, TRAIN_EPILOG)
    parser.add_argument("kind", choices=("registry", "file"), help="from a dataset, or from files")
    parser.add_argument("what", nargs="+", metavar="DATASET|FILE", help="one dataset, or one file or more")
    parser.add_argument("vocab_size", type=whole(1), metavar="VOCAB_SIZE", help="tokens, 260 at least")
    add_subset(parser)
    parser.add_argument(
        "--min-frequency", type=whole(1), default=2, metavar="N", help="merge pairs that occur at least N times (2)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="to write (outputs/tokenizers/NAME-VOCAB_SIZE...)"
    )
    add_dataset_options(parser)
    add_skip_bad_rows(parser)
    options = parser.parse(arguments)
    more = {"min_frequency": options.min_frequency, "output": options.output}
    with interruptible("no tokenizer was written."):
        if options.kind == "file":
            if options.config or options.revision:
                raise InputError("--config and --revision are for a dataset of the hub, not for files.")
            from ..data.datasets.tokenizer_training import train_tokenizer_from_files

            more |= {"text_column": options.text_key, "subset_size": options.subset}
            more |= {"skip_bad_rows": options.skip_bad_rows}
            folder = train_tokenizer_from_files(options.what, options.vocab_size, **more)
        else:
            if len(options.what) > 1:
                raise InputError(f"train registry takes one dataset, and {len(options.what)} were given.")
            from ..data.datasets.tokenizer_training import train_tokenizer

            folder = train_tokenizer(dataset_of(options.what[0], options), options.vocab_size, **more)
    from ..data.tokens.tokenizer import load_tokenizer

    print(f"{folder}: {load_tokenizer(folder).vocab_size:,} tokens")
    print(f"to train with it: python -m manual_backprop.run tokenizer=file {pasted('tokenizer.path', folder)}")


def pretokenize(arguments: Sequence[str]) -> None:
    parser = Parser("tools.tokenization pretokenize", PRETOKENIZE, PRETOKENIZE_EPILOG)
    parser.add_argument("dataset", metavar="DATASET", help="see above")
    parser.add_argument("tokenizer", metavar="TOKENIZER", help="see above")
    add_subset(parser)
    parser.add_argument(
        "--max-length", type=whole(1), metavar="N", help="cut longer documents to N tokens, and count them (never)"
    )
    parser.add_argument("--workers", type=whole(1), metavar="N", help="threads that encode (one for each core)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="to write (outputs/pretokenized/...)")
    add_dataset_options(parser)
    add_skip_bad_rows(parser)
    options = parser.parse(arguments)
    dataset = dataset_of(options.dataset, options)

    from ..data.datasets.pretokenization import pretokenize_dataset
    from ..data.tokens.token_shards import manifest_of

    with interruptible("the shards that are complete are kept, and the same command continues from there."):
        folder = pretokenize_dataset(
            dataset,
            options.tokenizer,
            options.max_length,
            output=options.output,
            workers=options.workers,
            progress=lambda done, shards, tokens: print(f"shard {done} of {shards}, {tokens:,} tokens", flush=True),
        )
    manifest = manifest_of(folder)
    print(folder)
    for split, sizes in manifest["splits"].items():
        cut = f", {sizes['cut']:,} of them cut" if sizes["cut"] else ""
        print(f"  {split}: {sizes['tokens']:,} tokens of {sizes['documents']:,} documents{cut}")
    for note in manifest["notes"]:
        print(f"  {note}")
    print(
        f"to train on them: python -m manual_backprop.run dataset=pretokenized {pasted('dataset.path', folder)} "
        "tokenizer=pretokenized"
    )


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"analyze": analyze, "train": train, "pretokenize": pretokenize}


@enduring_output()
def main(arguments: Sequence[str] | None = None) -> None:
    chosen = sub_command(COMMAND, OVERVIEW, list(COMMANDS), arguments)
    if chosen is None:
        return
    name, rest = chosen
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with errors_name_options():
        COMMANDS[name](rest)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
