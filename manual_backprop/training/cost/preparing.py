"""How fast text becomes tokens on disk, and how much memory that takes.

It measures reading a file of JSON lines, splitting, learning BPE, encoding and writing together. The text is synthetic:
words with Zipfian frequency in sentences, one or two kilobytes a document, the same every time. Text and tokens are in
a temporary folder (TMPDIR); together they need three times the size, and are removed at the end. Run it on an idle
machine.

Example: python -m manual_backprop.tools.cost preparing --megabytes 1000

Exit codes: 0 done, 1 the preparation failed, 2 wrong arguments, 4 the disk is full.
"""

import json
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from ...common.durable_files import storage_errors
from ...common.errors import ManualBackpropError
from ...config.arguments import Parser, whole
from ...study.paired_timing import MeasuringProcess
from ..sweeps.processors import cores

WORDS = 50_000
EXPONENT = 1.1  # of Zipf's law
PARAGRAPH = 2**17  # [words] drawn at a time


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--megabytes", type=whole(1), default=100, metavar="N", help="of text (%(default)s)")
    add("--vocab-size", type=whole(257), default=4096, metavar="V", help="tokens that BPE learns (%(default)s)")


def measure(options: Namespace, folder: Path) -> bool:
    path, size = folder / "text.jsonl", 0
    with storage_errors(f"write the text to {path}"), path.open("w", encoding="utf-8") as file:
        for document in synthetic_documents(options.megabytes):
            size += len(document)
            file.write(json.dumps({"text": document}) + "\n")
    print(f"{size / 1e6:,.0f} MB of text in {path}", flush=True)
    advice = f"Is there room in {folder}?"
    with MeasuringProcess(_prepare, path, options.vocab_size, folder / "cache", advice=advice) as process:
        measured = process.answer()
    if isinstance(measured, ManualBackpropError):
        raise measured
    seconds, cpu, megabytes = measured["seconds"], measured["cpu_seconds"], size / 1e6
    print(f"{measured['documents']:,.0f} documents, {measured['tokens']:,.0f} tokens in {seconds:.1f} s")
    print(
        f"{megabytes / seconds:.2f} MB/s on {cores()} cores = {megabytes / seconds / cores():.2f} MB a second and core"
    )
    print(f"{megabytes / cpu:.2f} MB a second of processor time ({cpu / seconds:.2f} cores were busy)")
    print(f"{measured['memory'] / 1e6:,.0f} MB of memory above the interpreter before it")
    return True


def synthetic_documents(megabytes: int) -> Iterator[str]:
    """Synthetic documents of about this size together."""
    import numpy as np

    random = np.random.default_rng(0)
    syllables = [
        a + b + c for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "ea") for c in ("", "n", "r", "s")
    ]
    lengths = random.integers(1, 5, WORDS)
    drawn = iter(random.integers(0, len(syllables), int(lengths.sum())).tolist())
    words = ["".join(syllables[next(drawn)] for _ in range(length)) for length in lengths.tolist()]
    share = np.arange(1, WORDS + 1) ** -EXPONENT
    edges = np.cumsum(share / share.sum())
    made = 0
    while made < megabytes * 10**6:
        chosen = np.minimum(np.searchsorted(edges, random.random(PARAGRAPH)), WORDS - 1).tolist()
        marks = random.integers(0, 12, PARAGRAPH).tolist()
        text = [
            words[word] + (". " if mark == 0 else ", " if mark == 1 else " ")
            for word, mark in zip(chosen, marks, strict=True)
        ]
        first = 0
        for length in random.integers(100, 400, PARAGRAPH // 250).tolist():
            document = "".join(text[first : first + length]).strip()
            first += length
            if document:
                made += len(document)
                yield document[0].upper() + document[1:] + ".\n"


def _prepare(end: Connection, path: Path, vocab_size: int, cache: Path) -> None:
    """Runs in its own process, so that its peak memory is that of the preparation."""
    import numpy  # noqa: F401  # importing it is not part of the preparation

    before = _peak_memory()
    from ...config.schema import DatasetConfig, TokenizerConfig
    from ...data.tokens.corpus import prepare_corpus

    begin, cpu = time.monotonic(), time.process_time()
    dataset, tokenizer = DatasetConfig("jsonl", str(path), text_column="text"), TokenizerConfig("bpe", vocab_size)
    try:
        corpus = prepare_corpus(dataset, tokenizer, cache)
    except ManualBackpropError as error:
        end.send(error)
        return
    end.send(
        {
            "seconds": time.monotonic() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "memory": _peak_memory() - before,
            "tokens": len(corpus.train) + len(corpus.validation),
            "documents": corpus.train_documents + corpus.validation_documents,
        }
    )


def _peak_memory() -> int:
    """The peak memory of this process so far [bytes]."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
