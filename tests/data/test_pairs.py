"""Sources and targets: how files become pairs, what is refused and what is left out; dates and postfix notation."""

from __future__ import annotations

import ast
import builtins
import json
import re
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import DatasetConfig, TokenizerConfig
from manual_backprop.data.sources.dates import Dates
from manual_backprop.data.sources.pairs import FilePairs, Pair
from manual_backprop.data.sources.postfix import OPERATORS, Postfix, postfix_of
from manual_backprop.data.tokens.pair_corpus import PairCorpus, open_test_split, prepare_pairs

PAIRS = [(f"{number} ein", f"eins {number}") for number in range(60)]
SOURCES, TARGETS = ([pair[side] for pair in PAIRS] for side in (0, 1))
CHAR = TokenizerConfig("char")


def write_tsv(path: Path, rows: Any = PAIRS, first: str = "") -> Path:
    path.write_text(first + "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(
    path: Path, cache: Path, tokenizer: TokenizerConfig = CHAR, shared: bool = True, **keys: Any
) -> PairCorpus:
    return prepare_pairs(DatasetConfig("pairs", path=str(path), **keys), tokenizer, shared, cache)


def texts(corpus: PairCorpus, name: str) -> list[tuple[str, str]]:
    split = corpus.splits[name]
    sides = []
    for side in ("source", "target"):
        tokens, offsets = getattr(split, side), getattr(split, f"{side}_offsets")
        decode = getattr(corpus.tokenizers, side).decode
        sides.append([decode(tokens[a:b].tolist()) for a, b in pairwise(offsets)])
    return list(zip(*sides, strict=True))


def write_all(folder: Path) -> dict[str, dict[str, Any]]:
    """The same pairs in every format, and how each is asked for."""
    write_tsv(folder / "plain.tsv")
    write_tsv(folder / "numbered.tsv", [("x", target, source) for source, target in PAIRS])
    write_tsv(folder / "usual.tsv", [(target, source) for source, target in PAIRS], "target\tsource\n")
    write_tsv(folder / "named.tsv", [(target, "x", source) for source, target in PAIRS], "\ufeffde\tnote\ten\n")
    lines = [json.dumps({"source": source, "target": target, "more": 1}) for source, target in PAIRS]
    (folder / "rows.jsonl").write_text("\n\n".join(lines))
    table = pyarrow.table({"en": SOURCES, "de": TARGETS})
    pyarrow.parquet.write_table(table, folder / "table.parquet")
    for ending, side in (("en", SOURCES), ("de", TARGETS)):
        (folder / f"both.{ending}").write_text("\r\n".join(side) + "\n", newline="")
    (folder / "many").mkdir()
    for number in range(3):
        write_tsv(folder / f"many/{number}.tsv", PAIRS[20 * number : 20 * number + 20])
    named = {"source_column": "en", "target_column": "de"}
    inside = {side: f"translation.{named[side]}" for side in named}
    both = [{"en": source, "de": target} for source, target in PAIRS]
    (folder / "inside.jsonl").write_text("\n".join(json.dumps({"translation": one}) for one in both))
    pyarrow.parquet.write_table(pyarrow.table({"id": SOURCES, "translation": both}), folder / "inside.parquet")
    return {
        "inside.jsonl": inside,
        "inside.parquet": inside,
        "plain.tsv": {},
        "usual.tsv": {},
        "numbered.tsv": {"source_column": "3", "target_column": "2"},
        "named.tsv": named,
        "rows.jsonl": {},
        "table.parquet": named,
        "both": named,
        "many": {"format": "tsv"},
    }


def test_every_format_gives_the_same_pairs(tmp_path: Path) -> None:
    """A hash of its source says in which split a pair is, whatever file it stands in."""
    asked = write_all(tmp_path)
    corpora = {name: prepared(tmp_path / name, tmp_path / "cache", **keys) for name, keys in asked.items()}
    first = corpora["plain.tsv"]
    assert sorted(texts(first, "train") + texts(first, "validation")) == sorted(PAIRS)
    assert 1 <= len(first.splits["validation"]) <= 15
    for name, corpus in corpora.items():
        assert texts(corpus, "train") == texts(first, "train"), name
        assert texts(corpus, "validation") == texts(first, "validation"), name
    assert len({corpus.dataset_digest for corpus in corpora.values()}) == len(corpora)
    again = prepared(tmp_path / "plain.tsv", tmp_path / "cache")
    assert again.dataset_digest == first.dataset_digest
    longer = write_tsv(tmp_path / "plain.tsv", [*PAIRS, ("neu", "new")])
    assert prepared(longer, tmp_path / "cache").dataset_digest != first.dataset_digest
    where = {first.splits["train"].where(row) for row in range(len(first.splits["train"]))}
    assert where < {f"{tmp_path / 'plain.tsv'}, line {line}" for line in range(1, 61)}


def test_no_source_is_in_two_splits(tmp_path: Path) -> None:
    twice = [*PAIRS, *((source, f"{target} again") for source, target in PAIRS)]
    corpus = prepared(write_tsv(tmp_path / "a.tsv", twice), tmp_path, validation=0.3)
    train, validation = ({source for source, _ in texts(corpus, name)} for name in ("train", "validation"))
    assert len(train) + len(validation) == 60
    assert len(validation) > 8


def test_splits_in_files_of_their_own(tmp_path: Path) -> None:
    (
        write_tsv(tmp_path / "train.tsv"),
        write_tsv(tmp_path / "valid.tsv", PAIRS[:7]),
        write_tsv(tmp_path / "t.tsv", PAIRS[:3]),
    )
    keys = {"validation": str(tmp_path / "valid.tsv"), "test": str(tmp_path / "t.tsv")}
    corpus = prepared(tmp_path / "train.tsv", tmp_path / "cache", **keys)
    assert texts(corpus, "validation") == PAIRS[:7]
    assert len(corpus.splits["train"]) == 60
    dataset = DatasetConfig("pairs", path=str(tmp_path / "train.tsv"), **keys)
    split, notes = open_test_split(dataset, corpus, tmp_path / "cache")
    assert (len(split), notes) == (3, ())
    with (tmp_path / "t.tsv").open("a") as file:
        file.write("a\t\n")
    split, notes = open_test_split(replace(dataset, on_bad_row="skip"), corpus, tmp_path / "cache")
    assert (len(split), notes[0][:30]) == (3, "1 of 4 rows left out as bad, t")
    with pytest.raises(InputError, match=r"t\.tsv, line 4: the target is empty"):
        open_test_split(dataset, corpus, tmp_path / "cache")
    with pytest.raises(InputError, match=r"dataset\.test=PATH to the run or as --test PATH"):
        open_test_split(replace(dataset, test=None), corpus, tmp_path / "cache")


@pytest.mark.parametrize("name", ["char", "bpe", "byte"])
def test_tokenizers_of_both_sides_or_one(name: str, tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [("ab" * n, "xyz" * n) for n in range(1, 40)])
    config = TokenizerConfig(name, vocab_size=260 if name == "bpe" else None)
    one, two = (prepared(path, tmp_path / "cache", config, shared) for shared in (True, False))
    assert texts(one, "train") == texts(two, "train")
    assert one.tokenizers.shared
    assert one.tokenizers.files == ("tokenizer.json",)
    assert not two.tokenizers.shared
    assert two.tokenizers.files == ("tokenizer.json", "source_tokenizer.json")
    sizes = {"char": (5, 2, 3), "bpe": (260, 260, 260), "byte": (257, 257, 257)}[name]
    found = one.tokenizers.target, two.tokenizers.source, two.tokenizers.target
    assert tuple(tokenizer.vocab_size for tokenizer in found) == sizes
    assert len({one.tokenizers.digest, two.tokenizers.digest}) == 2
    if name == "bpe":  # each has learned its own side
        assert two.tokenizers.source.encode("abab") != two.tokenizers.target.encode("abab")


# What is wrong with rows


def test_a_row_that_is_no_pair_is_named_and_may_be_left_out(tmp_path: Path) -> None:
    rows: dict[str, tuple[Any, str]] = {
        "a.tsv": ("x\t \n", "a.tsv, line 61: the target is empty"),
        "b.tsv": ("x\n", "b.tsv, line 61: this line has 1 cell, but the first one has 2 cells"),
        "c.tsv": ("x\ty\tz\n", "c.tsv, line 61: this line has 3 cells"),
        "d.tsv": (b"x\ty\xff\n", r"d.tsv, line 61: byte 3 of the line is 0xff, which is not UTF-8"),
    }
    for name, (line, said) in rows.items():
        path = write_tsv(tmp_path / name)
        with path.open("ab") as file:
            file.write(line if isinstance(line, bytes) else line.encode())
        with pytest.raises(InputError, match=re.escape(said)) as raised:
            prepared(path, tmp_path / "cache")
        assert "dataset.on_bad_row=skip" in str(raised.value)
        corpus = prepared(path, tmp_path / "cache", on_bad_row="skip")
        assert corpus.notes[0].startswith(f"1 of 61 rows left out as bad, the first: {path}, line 61")
        assert corpus.counts == {"rows": 61, "bad_rows": 1}
        with pytest.raises(InputError, match="1 of 61 rows left out as bad"):  # also where another run has skipped it
            prepared(path, tmp_path / "cache")
    (tmp_path / "first.tsv").write_bytes(b"\xff\n" + b"".join(b"%d\tx\n" % n for n in range(60)))
    with pytest.raises(InputError, match=r"first\.tsv, line 1: byte 0 of the line is 0xff, which is not UTF-8"):
        prepared(tmp_path / "first.tsv", tmp_path / "cache")
    assert prepared(tmp_path / "first.tsv", tmp_path / "cache", on_bad_row="skip").counts["bad_rows"] == 1
    (tmp_path / "e.jsonl").write_text('{"source": "a", "target": null}\n{"source": "a"}\n')
    with pytest.raises(InputError, match=r"e\.jsonl, line 1: 'target' should be text but is null"):
        prepared(tmp_path / "e.jsonl", tmp_path / "cache")
    with pytest.raises(InputError, match=r"no pairs for training in .* \(rows read: 2, of these bad: 2\)"):
        prepared(tmp_path / "e.jsonl", tmp_path / "cache", on_bad_row="skip")


@pytest.mark.parametrize("skip", ["error", "skip"])
def test_files_of_unequal_length(skip: str, tmp_path: Path) -> None:
    """Nobody can say which pairs are right then, so that there is nothing to skip."""
    (tmp_path / "p.source").write_text("a\nb\nc\n")
    (tmp_path / "p.target").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"p\.source, line 3: this row has no target: .* ends after 2 rows"):
        prepared(tmp_path / "p", tmp_path / "cache", on_bad_row=skip)


def test_files_that_cannot_be_understood(tmp_path: Path) -> None:
    write_tsv(tmp_path / "named.tsv", PAIRS, "en\tde\n")
    write_tsv(tmp_path / "one.tsv", [("a",)])
    (tmp_path / "p.dat").write_text("a\tb\n")
    (tmp_path / "half.target").write_text("a\n")
    (tmp_path / "mixed").mkdir()
    write_tsv(tmp_path / "mixed/a.tsv"), (tmp_path / "mixed/b.jsonl").write_text("{}")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("named.tsv", {"source_column": "fr"}, r"line 1: there is no column 'fr', only 'en', 'de'.*source_column=NAME"),
        ("one.tsv", {}, r"line 1: there is no column 2, the line has 1 cell; .*dataset\.target_column=1 to 1"),
        ("p.dat", {}, r"its name ends in \.dat.*Give dataset\.format=tsv"),
        ("mixed", {}, r"files of several formats \(jsonl, tsv\)"),
        ("gone", {}, r"gone: there is no such file or folder, nor .*gone\.source and .*gone\.target.*format=hub"),
        ("p.dat", {"format": "parquet"}, "damaged or not a Parquet file"),
        ("half", {}, r"half: there is .*half\.target, and no .*half\.source beside it\. Give both files"),
    ]
    for name, keys, said in cases:
        with pytest.raises(InputError, match=said):
            prepared(tmp_path / name, tmp_path / "cache", **keys)
    unknown = write_tsv(tmp_path / "new.tsv", [("0 \u00e9", "eins 0")])
    corpus = prepared(write_tsv(tmp_path / "a.tsv"), tmp_path / "cache")
    with pytest.raises(InputError, match=r"new\.tsv, line 1: The character '\u00e9'"):
        open_test_split(DatasetConfig("pairs", path="a.tsv", test=str(unknown)), corpus, tmp_path / "cache")


def test_a_dataset_of_splits(tmp_path: Path) -> None:
    import datasets

    rows = {"translation": [{"en": source, "de": target} for source, target in PAIRS]}
    few = {name: column[:8] for name, column in rows.items()}
    splits = {"train": datasets.Dataset.from_dict(rows), "validation": datasets.Dataset.from_dict(few)}
    datasets.DatasetDict(splits | {"test": datasets.Dataset.from_dict(few)}).save_to_disk(str(tmp_path / "saved"))
    keys = {"format": "saved", "source_column": "translation.en", "target_column": "translation.de"}
    corpus = prepared(tmp_path / "saved", tmp_path / "cache", **keys)
    assert texts(corpus, "train") == PAIRS
    assert texts(corpus, "validation") == PAIRS[:8]
    dataset = DatasetConfig("pairs", path=str(tmp_path / "saved"), **keys)  # type: ignore[arg-type]
    assert len(open_test_split(dataset, corpus, tmp_path / "cache")[0]) == 8
    for missing in ("fr", "translation.fr"):
        with pytest.raises(InputError, match=rf"no column '{missing}'.*dataset\.target_column=NAME"):
            list(FilePairs(replace(dataset, target_column=missing)).rows())


# Data that comes with the package


def test_dates() -> None:
    """What CLDR says of some days; a source has one target; the days of a split are its own."""
    pairs = list(islice(Dates(["de", "fr", "ja"]).rows(), 3 * 1000))
    found = {pair.source: pair.target for pair in pairs}
    assert len(found) == len(pairs) == 3000
    known = {
        "<de> Friday, January 2, 1970": "Freitag, 2. Januar 1970",
        "<de> Jan 1, 1970": "01.01.1970",
        "<fr> Jan 1, 1970": "1 janv. 1970",
        "<ja> January 2, 1970": "1970\u5e741\u67082\u65e5",
    }
    assert known.items() <= found.items()
    assert {pair.kind for pair in pairs} == {"de", "fr", "ja"}
    assert all(pair.source.startswith(f"<{pair.kind}> ") for pair in pairs[:9])
    with pytest.raises(InputError, match=r"has no language 'germn'"):
        Dates(["germn"])
    with pytest.raises(InputError, match="give each language once"):
        Dates(["de", "de"])


def test_a_day_is_in_one_split(tmp_path: Path) -> None:
    dataset = DatasetConfig("dates", languages=("de", "fr"), subset_size=4000)
    corpus = prepare_pairs(dataset, CHAR, True, tmp_path)
    days: dict[str, set[str]] = {}
    for name, split in corpus.splits.items():
        days[name] = {split.where(row) for row in range(len(split))}
        assert np.bincount(split.kinds).tolist() == [len(days[name])] * 2  # each day in both languages
    assert sum(map(len, days.values())) == len(set.union(*days.values())) == 2000
    assert 60 < len(days["test"]) < 140
    assert 60 < len(days["validation"]) < 140
    assert corpus.splits["train"].where(0).startswith("the dates, 1970-01-0")


def test_dates_without_babel(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "babel":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"babel, which is not installed: pip install 'manual-backprop\[dates\]'"):
        Dates(["de"])


@pytest.mark.parametrize(
    ("infix", "postfix"),
    [
        ("(lo + hi) // 2", "lo hi + 2 //"),
        ("lo + hi // 2", "lo hi 2 // +"),
        ("not a.b and -x < 2 ** (y + 1)", "a.b not x u- 2 y 1 + ** < and"),
        ("a and b and c or d", "a b and c and d or"),
        ("a - b - c", "a b - c -"),
        ("a - (b - c)", "a b c - -"),
        ("f(x)[1] is not None", "f(x)[1] None is-not"),
    ],
)
def test_postfix(infix: str, postfix: str) -> None:
    assert postfix_of(ast.parse(infix, mode="eval").body) == postfix.split()


@pytest.mark.parametrize("text", ["a < b < c", "a if b else c", "f(x, y) + 1", "a + (b if c else d)", "'a b' + c"])
def test_what_has_no_postfix(text: str) -> None:
    assert postfix_of(ast.parse(text, mode="eval").body) is None


def test_expressions_of_the_library_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back with a stack, each postfix notation means the expression that it was made of."""
    source = Postfix()
    source.source.files = [
        file for file in source.source.files if file.name in ("fractions.py", "heapq.py", "bisect.py")
    ]
    pairs = [pair for pair in source.rows() if isinstance(pair, Pair)]
    assert len(pairs) == len({pair.source for pair in pairs}) > 50
    for pair in pairs:
        assert ast.dump(ast.parse(read_back(pair.target))) == ast.dump(ast.parse(flat(pair.source))), pair
        assert re.search(r"(fractions|heapq|bisect)\.py, line \d+$", pair.where)


def read_back(postfix: str) -> str:
    """Fully in parentheses."""
    unary = {"not": "not", "~": "~", "u-": "-", "u+": "+"}
    stack: list[str] = []
    for word in postfix.split():
        if word in unary:
            stack.append(f"({unary[word]} {stack.pop()})")
        elif word in OPERATORS.values():
            right, left = stack.pop(), stack.pop()
            stack.append(f"({left} {word.replace('-', ' ') if '-' in word[1:] else word} {right})")
        else:
            stack.append(word)
    (whole,) = stack
    return whole


def flat(infix: str) -> str:
    """`a and b and c` as `(a and b) and c`, which is what postfix notation says."""

    class Nested(ast.NodeTransformer):
        def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
            self.generic_visit(node)
            whole = node.values[0]
            for value in node.values[1:]:
                whole = ast.BoolOp(node.op, [whole, value])
            return whole

    return ast.unparse(ast.fix_missing_locations(Nested().visit(ast.parse(infix))))
