"""The number of tokens of a text: exact if it is in the cache, otherwise estimated from its bytes. It writes and
downloads nothing."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...config.schema import DatasetConfig, TokenizerConfig
from ..sources.documents import BadRow, FileSource
from ..sources.reading import VALIDATION_SHARE
from ..sources.registry import open_source
from .corpus import Corpus, prepared_corpus

# Of the documentation in Python 3.11. The size of the sources does not tell: docstrings are a small part of them.
PYTHON_DOCS_BYTES = 2_500_000
PYTHON_DOCS_DOCUMENTS = 700
PYTHON_DOCS_CHARACTERS = 111  # different ones
# Bytes per token of byte-pair encodings learned from it, with 2^8, 2^9, ... tokens; larger ones hardly have more.
BYTES_PER_TOKEN = (1.0, 1.9, 2.46, 2.97, 3.43, 3.8, 4.02, 4.07)
VOCABULARIES = {"byte": 257, "gpt2": 50257, "file": 50257}  # the last is a guess, since the file is not read
MOST_TO_READ = 20_000_000  # [bytes]; the characters of a larger text are not counted


@dataclass(frozen=True)
class TextSize:
    train_tokens: int | None  # None: unknown until the text is prepared
    validation_tokens: int
    vocab_size: int
    train_documents: int | None = None  # None: unknown
    corpus: Corpus | None = None  # the prepared corpus, if there is one: then the numbers are exact, else estimates

    @property
    def prepared(self) -> bool:
        return self.corpus is not None


def text_size(dataset: DatasetConfig, tokenizer: TokenizerConfig, cache: str | Path) -> TextSize:
    """The size of a dataset's text. Raises InputError for data that cannot be read."""
    corpus = prepared_corpus(dataset, tokenizer, cache)
    if corpus is not None:
        counts = len(corpus.train), len(corpus.validation), corpus.tokenizer.vocab_size, corpus.train_documents
        return TextSize(*counts, corpus)
    size, documents, characters = _estimated_size(dataset)
    vocab_size = VOCABULARIES.get(tokenizer.name) or tokenizer.vocab_size or characters
    if size is None:
        return TextSize(None, 0, vocab_size)
    tokens = size / (1 if tokenizer.name in ("byte", "char") else bytes_per_token(vocab_size))
    share = dataset.validation if isinstance(dataset.validation, float) else VALIDATION_SHARE
    training_documents = None if documents is None else max(1, round(documents * (1 - share)))
    return TextSize(round(tokens * (1 - share)), round(tokens * share), vocab_size, training_documents)


def _estimated_size(dataset: DatasetConfig) -> tuple[int | None, int | None, int]:
    """The bytes and the number of documents of a text (None if its files do not tell), and of different characters."""
    if dataset.name == "python_docs":
        return PYTHON_DOCS_BYTES, PYTHON_DOCS_DOCUMENTS, PYTHON_DOCS_CHARACTERS
    source = open_source(dataset)
    if not isinstance(source, FileSource) or dataset.subset_size is not None:
        return None, None, PYTHON_DOCS_CHARACTERS
    size = sum(file.status[0] for file in source.files)
    if dataset.name != "text":
        return size, None, PYTHON_DOCS_CHARACTERS
    if size > MOST_TO_READ:
        return size, len(source.files), PYTHON_DOCS_CHARACTERS
    texts = [document.text for document in source.rows() if not isinstance(document, BadRow)]
    return size, len(texts), len(set().union(*map(set, texts)))


def bytes_per_token(vocab_size: int) -> float:
    """The bytes per token of a byte-pair encoding that was learned from a few million bytes of English."""
    return float(np.interp(np.log2(vocab_size) - 8, np.arange(len(BYTES_PER_TOKEN)), BYTES_PER_TOKEN))
