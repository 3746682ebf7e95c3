"""Downloads a dataset of the hub into a folder, or lists the known datasets."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.columns import columns
from ..common.errors import InputError
from ..common.exit_codes import exit_code_of
from ..common.startup.output import enduring_output
from ..config.arguments import Parser
from .dataset_arguments import add_dataset_options, add_subset, dataset_of, errors_name_options, interruptible, pasted

COMMAND = "python -m manual_backprop.tools.download_dataset"

DESCRIPTION = """\
Downloads a dataset of the hub into a folder that dataset=saved reads, on this machine or on one without a network.

NAME is a name in conf/dataset (--list shows them) or OWNER/NAME on the hub; a named dataset may be given either way.
The size of the download is printed first. Files are also kept in the cache of the `datasets` library (HF_HOME), so an
interrupted download continues and a repeated one finds everything. With --subset, and always for some datasets
(fineweb), rows are streamed up to that number, and an interrupted stream continues from the last multiple of ten
thousand documents. The folder appears when it is complete."""

EPILOG = f"""\
Examples

  {COMMAND} --list
  {COMMAND} tinystories
  {COMMAND} fineweb --subset 50000 --output fineweb-50k
  {COMMAND} Salesforce/wikitext --config wikitext-103-raw-v1
  python -m manual_backprop.tools.inspect outputs/datasets/tinystories

Exit codes: 0 done, 2 wrong input, a gated or missing dataset or no network, 4 the disk is full, 130 interrupted."""


def listing() -> list[str]:
    from ..data.datasets.download import DATASETS
    from ..data.datasets.named import shipped_datasets

    rows = [("name", "on the hub", "column", "", "")]
    for name, about, dataset in shipped_datasets():
        if dataset.repository is not None:
            place = dataset.repository + (f", {dataset.config}" if dataset.config else "")
            there = "downloaded" if (DATASETS / name).exists() else ""
            rows.append((name, place, dataset.text_column or "text", about, there))
    return columns(rows)


@enduring_output()
def main(arguments: Sequence[str] | None = None) -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = Parser("tools.download_dataset", DESCRIPTION, EPILOG)
    parser.add_argument("name", nargs="?", metavar="NAME", help="see above")
    parser.add_argument("--list", action="store_true", help="list the named datasets and their downloads")
    parser.add_argument("--split", metavar="NAME", help="only this split (all)")
    add_subset(parser)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="to write (outputs/datasets/NAME)")
    add_dataset_options(parser)
    options = parser.parse(arguments)
    if options.list:
        print("\n".join(listing()))
        return
    if options.name is None:
        raise InputError(f"Which dataset? Give its NAME; {COMMAND} --list shows what there is.")
    split, options.split = options.split, None
    dataset = dataset_of(options.name, options)

    from ..data.datasets.download import download
    from ..data.datasets.named import split_to_train

    with (
        errors_name_options(),
        interruptible("no folder was written; what was downloaded is kept, and the same command continues."),
    ):
        done = download(dataset, split, options.output, lambda text: print(text, flush=True))
    column = done.source["text_column"]
    words = ["dataset=saved", pasted("dataset.path", done.folder)]
    if column != "text":
        words.append(pasted("dataset.text_column", column))
    if (first := split_to_train(done.source)) is not None:
        words.append(pasted("dataset.split", first))
    print(f"{done.folder}{': it was there already' if done.was_there else ''}")
    print(f"to train on it: python -m manual_backprop.run {' '.join(words)}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
