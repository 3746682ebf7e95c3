"""Pairs of dates in English and in other languages, from the Unicode CLDR (through `babel`): real data without a
download, for which every target is known.

    <de> Tuesday, March 3, 1998  ->  Dienstag, 3. März 1998
    <ja> Mar 3, 1998             ->  1998/03/03

The source begins with the target language. Each day gives one pair for each language, in CLDR's full, long or medium
format; a hash of day and language chooses it (a source that is both long and medium gets the long target). All pairs of
a day are in one split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from typing import Any

from ...common.errors import InputError
from ...config.rules import nearest
from .pairs import Pair, PairSource

FIRST, LAST = date(1970, 1, 1), date(2029, 12, 31)
FORMATS = ("full", "long", "medium")  # of CLDR; its short one lacks the century
SOURCE_LANGUAGE = "en"


class Dates(PairSource):
    test_share = 0.05

    def __init__(self, languages: Sequence[str]):
        """Raises InputError if babel is not installed or does not know a language."""
        try:
            import babel
        except ImportError as error:
            raise InputError(
                "dataset=dates uses CLDR's data in babel, which is not installed: pip install "
                "'manual-backprop[dates]', or use dataset=postfix, which needs no library."
            ) from error
        known = babel.localedata.locale_identifiers()
        for language in languages:
            if language not in known:
                meant = nearest(language, sorted(known))
                raise InputError(
                    f"dataset.languages: babel {babel.__version__} has no language {language!r}"
                    + (f"; did you mean {meant}?" if meant else ", as in de, fr or pt_BR")
                )
        if not languages or len(set(languages)) < len(languages):
            raise InputError(f"dataset.languages={list(languages)}: give each language once, as in [de,fr,ja].")
        self.languages, self.version = tuple(languages), babel.__version__

    def identity(self) -> dict[str, Any]:
        """The version of babel implies that of CLDR."""
        return {"kind": "dates 1", "babel": self.version, "languages": list(self.languages)}

    def rows(self) -> Iterator[Pair]:
        from babel.dates import format_date

        for number in range((LAST - FIRST).days + 1):
            day = FIRST + timedelta(number)
            for language in self.languages:
                digest = hashlib.sha256(f"{day} {language}".encode()).digest()
                form = FORMATS[digest[0] % len(FORMATS)]
                source, longer = (format_date(day, one, locale=SOURCE_LANGUAGE) for one in (form, "long"))
                # May 3, 1998 is both long and medium, but a source must have one target
                target = format_date(day, "long" if source == longer else form, locale=language)
                yield Pair(f"<{language}> {source}", target, f"the dates, {day}", unit=str(day), kind=language)
