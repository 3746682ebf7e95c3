"""Samples of text that a model generates during its training, so that a reader sees what the loss means."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import torch

from ..common.errors import InputError
from ..common.processes import processes
from ..data.tokens.corpus import Corpus
from ..data.tokens.tokenizer import Tokenizer
from ..models.wrappers.language_model import LanguageModel

TEMPERATURE = 0.7
TOP_K = 50

log = logging.getLogger(__name__)


def encode_prompts(prompts: Sequence[str], corpus: Corpus) -> list[list[int]]:
    """The prompts as tokens; the beginning of the validation text replaces one that the tokenizer cannot encode."""
    encoded = []
    for prompt in prompts:
        try:
            encoded.append([*corpus.tokenizer.begin_token_ids, *corpus.tokenizer.encode(prompt)])
        except InputError:
            tokens = corpus.validation[:8].tolist()
            log.warning(
                "This tokenizer cannot encode the prompt %r; samples continue %r instead.",
                prompt,
                corpus.tokenizer.decode(tokens),
            )
            encoded.append(tokens)
    return encoded


def draw_samples(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], length: int, seed: int
) -> list[str]:
    """Every prompt with its continuation, of `length` tokens or up to the end token. A function of the seed."""

    def text(number: int) -> str:
        drawn = model.generate(
            torch.tensor([list(prompts[number])], device=model.network.device),
            length,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            eos_token_id=tokenizer.end_token_id,
            seed=seed + number,
        )
        return tokenizer.decode(drawn[0].tolist())

    return processes().mapped(text, range(len(prompts)))


def count_words(text: str) -> str:
    """How varied a text is, in words: how many there are, and how many pairs of adjacent ones occur before. Words are
    separated by white space."""
    words = text.split()
    pairs = list(pairwise(words))
    repeated = len(pairs) - len(set(pairs))
    return f"{len(words)} words, {len(set(words))} distinct; {repeated} of {len(pairs)} bigrams repeated"
