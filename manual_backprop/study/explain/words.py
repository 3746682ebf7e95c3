"""What a page about one step says in words (words.toml); numbers and code come from the step itself (`page.py`)."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
ARCHITECTURES: dict[str, str] = WORDS["architectures"]
ENCODERS: dict[str, str] = WORDS["encoders"]
TEXTS: dict[str, str] = WORDS["texts"]


def words_of(architecture: str, pair: str, parameter: str, stack: str = "") -> tuple[str, str, str]:
    """Title, what happens forward, what happens backward; `stack`: encoder. or decoder. of an encoder-decoder,
    `encoder alone`, or nothing for a decoder. Raises LookupError if a pair has no words."""
    for section in WORDS["sections"]:
        place = section.get("architecture", architecture), section.get("stack", stack)
        if (section["pair"], section["parameter"], *place) == (pair, parameter, architecture, stack):
            return section["title"], section["forward"], section["backward"]
    raise LookupError(f"{pair} of {parameter or 'no parameter'}: words.toml has no section for it")


def filled(text: str, facts: Mapping[str, str]) -> str:
    """The text with each {name} replaced by its fact."""
    for name, fact in facts.items():
        text = text.replace("{" + name + "}", fact)
    return text
