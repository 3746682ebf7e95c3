"""Mutants of the kernels in C++: operators and numbers of their lines, changed one at a time; each must be noticed.

    python tests/mutate_kernels.py            all; exit 1 if one that is not listed as equivalent lives
    python tests/mutate_kernels.py TEXT ...   those with one of these texts in their names
    python tests/mutate_kernels.py --list     their names

All of them are switches (kernels/switches.h) in one library, which is compiled once, with AddressSanitizer. The
variable MUTANT of the environment has the number of the active mutant. The tests of the kernels in its file run in a
fork, since a mutant may write anywhere, or never end.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NoReturn

TESTS = Path(__file__).resolve().parent
SOURCES = TESTS.parent / "manual_backprop" / "kernels" / "cpu" / "cpp"
LIMITS = {signal.ITIMER_PROF: 60, signal.ITIMER_REAL: 600}  # [s] of a mutant's own work, and with what it waits for
SANITIZED = ("-fsanitize=address,shift-exponent", "-fsanitize-undefined-trap-on-error")
FILES = ("vectors.h", *sorted(path.name for path in SOURCES.glob("*.h") if path.name != "vectors.h"))
OPERATORS = {
    **{"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "^": "|"},
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "&&": "||", "||": "&&"},
}
USERS = ("attention.h", "products.h")  # of operands.h, which has no kernel of its own
RULES = (  # what is looked for; what the mutant has in its place; the switch
    *((rf" {re.escape(old)} ", f" {new} ", f" {old} At<N>() {old} ") for old, new in OPERATORS.items()),
    (r"\b0\.f", "1.f", "Either<N>::value(0.f, 1.f)"),
    (r"\b1\.f", "2.f", "Either<N>::value(1.f, 2.f)"),
    (r"\b0\.5f", "0.25f", "Either<N>::value(0.5f, 0.25f)"),
    (r"(?<== )0(?=;)", "1", "Either<N>::value(0, 1)"),
    (r"(?<=[ (])1(?=[ ),])", "2", "Either<N>::value(1, 2)"),
    (r"(?<=[(, ])2(?= \*)", "3", "Either<N>::value(2, 3)"),
    (r"(?<=[(, ])-(?=[a-zA-Z0-9])", "", "Either<N>::value(-1, 1) * "),
    (r"(?<=>> )\d+", "5", "Either<N>::value(OLD, 5)"),
    (r"!(?=\()", "", "Either<N>::no"),
    (r"std::min\b", "std::max", "Either<N>::min"),
    (r"std::max\b", "std::min", "Either<N>::max"),
    (r"at::vec::maximum", "at::vec::minimum", "Either<N>::maximum"),
    (r"(?<!<)\btrue\b", "false", "Either<N>::value(true, false)"),
    (r"(?<!<)\bfalse\b", "true", "Either<N>::value(false, true)"),
    (r"\.neg\(\)", "", "->*Without<N, Method::neg>()"),
    (r"\.abs\(\)", "", "->*Without<N, Method::abs>()"),
)
# Mutants that compute the same: file, line, changes, why. One that is noticed after all, or is no more, is an error.
THREADS = "how many numbers are worth a thread changes no result"
PARTS = "which thread computes what changes no result"
EQUAL_LINES: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("activations.h", "const Vec is_positive = x > Vec(0.f);", ("> -> >=",), "at 0 both gates are a half"),
    (
        "attention.h",
        "bool drops() const { return probability > 0; }",
        ("> -> >=",),
        "with probability 0 all are kept, and their factor is 1",
    ),
    (
        "operands.h",
        "const Places<int16_t, 32> FIRST_PAIRS([](int k) { return k / 2 + k % 2 * 32; });",
        ("+ -> -",),
        "the instruction takes the index modulo 64",
    ),
    (
        "operands.h",
        "const Places<int16_t, 32> LAST_PAIRS([](int k) { return 16 + k / 2 + k % 2 * 32; });",
        ("+ -> - (2)",),
        "the instruction takes the index modulo 64",
    ),
    (
        "operands.h",
        "const Places<int16_t, 32> HALVES_IN_TURNS([](int k) { return k / 2 + k % 2 * 16; });",
        ("+ -> -",),
        "the instruction takes the index modulo 32",
    ),
    (
        "operands.h",
        "if (count == WIDTH) {",
        ("== -> !=",),
        "the same pairs; what is written beyond them is memory of the thread, and written again or not read",
    ),
    ("operands.h", "for (; i + 32 <= n; i += 32) {", ("<= -> <",), "the last 32 are what is left"),
    ("operands.h", "for (; i < n; i += WIDTH) {", ("< -> <=",), "a pass more, over no number"),
    (
        "operands.h",
        "if (n < columns) std::fill(right, right + padded<T>(K) * columns, T(0.f));",
        ("< -> <=", "0.f -> 1.f"),
        "it is filled before it is written; what stays is multiplied by 0, or in a column that nobody reads",
    ),
    ("operands.h", "for (int64_t r = 0; r < R; r += SIDE) {", ("< -> <=",), "a square without rows more"),
    ("operands.h", "for (int64_t c = 0; c < C; c += SIDE) {", ("< -> <=",), "a square without columns more"),
    (
        "operands.h",
        "} else if (stride % 2 == 0) {         // pairs lie side by side (K is even): each is one number of 32 bits",
        ("% -> /",),
        "the same numbers, one at a time",
    ),
    (
        "operands.h",
        "for (int64_t k = 0; k < K; ++k) std::fill(left + k * ld + n, left + (k + 1) * ld, T(0.f));",
        ("0.f -> 1.f",),
        "its factors are 0; finite is all that it has to be",
    ),
    (
        "operands.h",
        "for (int64_t k = 0; k < K; ++k) std::fill(left + k * ld + n, left + (k + 1) * ld, T(0.f));",
        ("* -> /",),
        "what it fills too is written after it",
    ),
    ("attention.h", "for (int64_t first = 0; first < n; first += WIDTH) {", ("< -> <=",), "a pass more, over no row"),
    (
        "operands.h",
        "if (block.size() < bytes + 64) block.resize(bytes + 64);",
        ("< -> <=",),
        "to the size that it has",
    ),
    ("operands.h", "size_t next_ = 0;", ("0 -> 1",), "set before it is read"),
    (
        "attention.h",
        "all_ = visible.query_segments ? 0 : visible.keys_up_to(query + 1, block.seen);",
        ("+ -> -",),
        "fewer keys without a mask, more with one that hides none of them",
    ),
    (
        "attention.h",
        "seen_ = visible.keys_up_to(std::min(query + WIDTH, block.last), block.seen);",
        ("std::min -> std::max",),
        "more keys, which the mask hides",
    ),
    (
        "attention.h",
        "for (int64_t lane = 0; lane < WIDTH; ++lane) is_same[lane] = segments_[lane] == segment ? 1.f : 0.f;",
        ("1.f -> 2.f",),
        "it is compared with 0",
    ),
    (
        "attention.h",
        "const Vec along = load(cosine + angle, count), across = load(sine + angle, count) * Vec(direction);",
        ("* -> /",),
        "the direction is 1 or -1",
    ),
    (
        "attention.h",
        "if (head / (H / G) != prepared) {  // keys and values that the heads of a group share",
        ("/ -> *",),
        "they are prepared for each head again",
    ),
    (
        "attention.h",
        "prepared = head / (H / G), key_stride = key.position;",
        (
            "/ -> *",
            "/ -> * (2)",
        ),
        "they are prepared again sooner",
    ),
    ("attention.h", "at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {", ("1 -> 2",), THREADS),
    ("attention.h", "at::parallel_for(0, B * G, 1, [&](int64_t begin, int64_t end) {", ("1 -> 2",), THREADS),
    (
        "attention.h",
        "for (int64_t first = 0; first < visible.T; first += QUERIES) {",
        (
            "< -> <=",
            "< -> <= (2)",
        ),
        "a block more, of no query",
    ),
    (
        "attention.h",
        "std::fill(out + c * context.position, out + c * context.position + K, T(0.f));",
        ("* -> /",),
        "what comes before is 0 as well",
    ),
    (
        "attention.h",
        "for (int64_t c = 0; c < n; ++c) std::fill(dquery_rows + c * dquery.position, "
        "dquery_rows + c * dquery.position + K, T(0.f));",
        ("* -> /",),
        "what comes before is 0 as well",
    ),
    (
        "attention.h",
        "for (int64_t c = 0; c < columns; ++c) {",
        (
            "< -> <=",
            "< -> <= (2)",
        ),
        "a number more, in memory that is there and that nobody reads",
    ),
    (
        "attention.h",
        "most = where(most == Vec(-INFINITE), Vec(0.f), most) * Vec(scale);  // a query that sees no key",
        ("0.f -> 1.f",),
        "exp(-inf) is 0, whatever is subtracted",
    ),
    ("attention.h", "if (j >= column.seen()) return Vec(0.f);", (">= -> >",), "the mask hides that key"),
    (
        "attention.h",
        "const Vec one = probability(j), other = j + 1 < seen ? probability(j + 1) : Vec(0.f);",
        (
            "+ -> -",
            "< -> <=",
        ),
        "the probability of the key after the last is 0",
    ),
    (
        "attention.h",
        "where(sees, Vec(share) / sum, Vec(0.f)).store(factors + c);",
        ("0.f -> 1.f",),
        "the context of a query that sees no key is 0 before",
    ),
    (
        "embedding.h",
        "for (int64_t n = N - 1; n >= 0; --n) places[--end[token[n]]] = n;",
        (
            ">= -> >",
            "0 -> 1",
        ),
        "the place that is left is 0 already",
    ),
    (
        "embedding.h",
        "at::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / COLUMNS / N), [&](int64_t begin, int64_t stop) {",
        ("std::max -> std::min", "1 -> 2", "/ -> *", "/ -> * (2)"),
        THREADS,
    ),
    ("gradients.h", "if (R <= GROUP) {", ("<= -> <",), "one group of rows has the same sums"),
    (
        "loss.h",
        "if (smoothing > 0) for_vectors(V, [&](int64_t v, int64_t count) "
        "{ add(z + v, Vec(-everywhere * total), count); });",
        ("> -> >=",),
        "0 is added",
    ),
    (
        "loss.h",
        "if (smoothing > 0) all = all + Vec::set(Vec(0.f), x, count);",
        ("> -> >=",),
        "nothing reads that sum then",
    ),
    (
        "loss.h",
        "const float smoothed = smoothing > 0 ? smoothing * (sum_of(all) / V - largest) : 0;",
        ("> -> >=",),
        "0 times a number is 0",
    ),
    (
        "optimizers.h",
        "std::vector<float> squares((n + ROW - 1) / ROW);",
        ("- -> +",),
        "a row more, of no number",
    ),
    (
        "products.h",
        "const T pair[2] = {K % K_PER_STEP<T> != 0 ? *numbers[r] : T(0.f), T(0.f)};  // the last number has no partner",
        ("0.f -> 1.f", "0.f -> 1.f (2)"),
        "it is not used, or multiplied by 0",
    ),
    (
        "products.h",
        "const Vec second = other ? load(other + first + c, some) : Vec(0.f);",
        ("0.f -> 1.f",),
        "it is multiplied by 0",
    ),
    ("products.h", "for (int64_t r = 0; r < n; r += ROWS) {", ("< -> <=",), "a square without rows more"),
    ("products.h", "for (int64_t k = 0; k < K; k += NUMBERS) {", ("< -> <=",), "a square without numbers more"),
    (
        "products.h",
        "if (n - r >= ROWS && K - k >= NUMBERS) {",
        (">= -> >", ">= -> > (2)"),
        "the same, number by number",
    ),
    (
        "products.h",
        "for (int64_t i = k; i < std::min(even(K), k + NUMBERS); ++i) {",
        ("< -> <=", "std::min -> std::max"),
        "numbers more, which are written again or not read",
    ),
    (
        "products.h",
        "right[(i / 2 * columns + c) * 2 + i % 2] = i < K ? x[c * stride + i] : 0.f;",
        ("0.f -> 1.f",),
        "it is multiplied by 0",
    ),
    (
        "products.h",
        "constexpr int64_t tiles_in(int64_t M) { return (M + TILE_ROWS - 1) / TILE_ROWS; }",
        ("- -> +",),
        "a tile more, of no row",
    ),
    ("products.h", "for (int64_t first = 0; first < columns; first += W) {", ("< -> <=",), "a panel of no column"),
    (
        "products.h",
        "for (int64_t first = 0; first < columns; first += TILE_COLUMNS) {",
        ("< -> <=",),
        "a panel of no column",
    ),
    (
        "products.h",
        "const bool in_parts = K > DEPTH<T>, copies_left = left.column != 1;",
        ("> -> >=",),
        "one part is all of K",
    ),
    (
        "products.h",
        "const int64_t most = padded<T>(std::min(K, DEPTH<T>)), "
        "pass = in_parts ? std::min(PASS_ROWS, tiles_in(M) * TILE_ROWS) : M;",
        ("std::min -> std::max", "std::min -> std::max (2)"),
        "more memory",
    ),
    (
        "products.h",
        "if (k0 + depth == K && tile_columns == TILE_COLUMNS) {",
        ("+ -> -",),
        "the same sums, by way of the cache",
    ),
    ("products.h", "for (int64_t m0 = top; m0 < bottom; m0 += BLOCK_ROWS) {", ("< -> <=",), "a block of no row"),
    (
        "products.h",
        "const int64_t tiles_down = tiles_in(M), tiles_across = (N + TILE_COLUMNS - 1) / TILE_COLUMNS;",
        ("- -> +", "/ -> *"),
        PARTS,
    ),
    (
        "products.h",
        "const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + M * N * K / PIECE);",
        ("std::min -> std::max", "1 -> 2", "* -> /", "* -> / (2)", "/ -> *"),
        PARTS,
    ),
    (
        "products.h",
        "int64_t down = 1, least = std::numeric_limits<int64_t>::max();  // parts of the rows: those that cost least",
        ("1 -> 2",),
        PARTS,
    ),
    ("products.h", "for (int64_t parts = 1; parts <= threads; ++parts) {", ("<= -> <",), PARTS),
    (
        "products.h",
        "const int64_t rows = (tiles_down + parts - 1) / parts * TILE_ROWS, others = threads / parts;",
        ("+ -> -", "- -> +", "1 -> 2", "* -> /", "/ -> *", "/ -> * (2)"),
        PARTS,
    ),
    (
        "products.h",
        "const int64_t columns = (tiles_across + others - 1) / others * TILE_COLUMNS, "
        "cost = rows * columns + COPY_COST * (rows + columns);",
        ("+ -> -", "- -> +", "1 -> 2", "/ -> *", "* -> /", "* -> / (2)", "+ -> - (2)", "* -> / (3)", "+ -> - (3)"),
        PARTS,
    ),
    ("products.h", "if (cost < least) least = cost, down = parts;", ("< -> <=",), PARTS),
    ("products.h", "const int64_t across = threads / down;", ("/ -> *",), PARTS),
    ("products.h", "at::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {", ("1 -> 2",), THREADS),
    (
        "vectors.h",
        "at::parallel_for(0, n_rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, numbers)), "
        "[&](int64_t begin, int64_t end) {",
        ("std::max -> std::min", "1 -> 2", "/ -> *", "std::max -> std::min (2)", "1 -> 2 (2)"),
        THREADS,
    ),
    (
        "vectors.h",
        "for (; i + WIDTH <= n; i += WIDTH) f(i, WIDTH);",
        ("<= -> <",),
        "the last whole vector is what is left",
    ),
    ("vectors.h", "if (i < n) f(i, n - i);", ("< -> <=",), "a call more, for no number"),
    (
        "vectors.h",
        "if (count < WIDTH) return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(x, count));",
        ("< -> <=",),
        "the same numbers from a masked register",
    ),
    ("vectors.h", "for (; i < n; i += WIDTH) {", ("< -> <=",), "0 is added"),
    (
        "vectors.h",
        "const int64_t groups = (n_rows + GROUP - 1) / GROUP, width = C * int64_t(totals.size());",
        (
            "- -> +",
            "/ -> *",
        ),
        "groups more, over no row",
    ),
    ("vectors.h", "for_rows(groups, GROUP * C, [&](int64_t group) {", ("* -> /",), THREADS),
    (
        "vectors.h",
        "const int64_t vectors = (n + WIDTH - 1) / WIDTH;",
        (
            "- -> +",
            "/ -> *",
        ),
        "those after the last are cut off below",
    ),
    ("vectors.h", "inline void for_numbers(int64_t n, const F& f, int64_t reads = 1) {", ("1 -> 2",), THREADS),
    (
        "vectors.h",
        "at::parallel_for(0, vectors, std::max<int64_t>(1, GRAIN / WIDTH / reads), [&](int64_t begin, int64_t end) {",
        ("std::max -> std::min", "1 -> 2", "/ -> *", "/ -> * (2)"),
        THREADS,
    ),
)
EQUIVALENT = {f"{file}: {line}: {change}": why for file, line, changes, why in EQUAL_LINES for change in changes}


@dataclass(frozen=True)
class Mutant:
    number: int  # from 1; 0: all is right
    file: str
    name: str  # file: line: old -> new


def mutants_of(file: str, first: int, is_wanted: Callable[[str], bool]) -> tuple[list[Mutant], str]:
    """Those of a file, numbered from there, and its text with their switches."""
    found: list[Mutant] = []
    lines = (SOURCES / file).read_text(encoding="utf-8").splitlines()
    names: Counter[str] = Counter()
    until_its_end = False
    for place, line in enumerate(lines):
        code = line.partition("//")[0]
        is_function = code.rstrip().endswith("}") or "{" in code
        if code.startswith(("#", "template", "namespace", "using")) or (
            code.lstrip().startswith(("constexpr", "static_assert")) and not is_function
        ):
            continue
        prefetches = "prefetch" in code.lower()
        if prefetches and code.rstrip().endswith("{") and not code.startswith(" "):  # the whole function, or struct
            until_its_end = True
        until_its_end &= not code.startswith("}")
        if until_its_end or prefetches:  # it computes nothing
            continue
        matches = [(match, *rule) for pattern, *rule in RULES for match in re.finditer(pattern, code)]
        switched, end = "", 0
        for match, new, switch in sorted(matches, key=lambda one: one[0].start()):
            name = f"{file}: {line.strip()}: {match[0].strip()} -> {new.strip()}"
            names[name] += 1
            name += f" ({names[name]})" if names[name] > 1 else ""
            if is_wanted(name):
                found.append(Mutant(first + len(found), file, name))
                switch = switch.replace("<N", f"<{found[-1].number}").replace("OLD", match[0])
                switched += code[end : match.start()] + switch
                end = match.end()
        if end:  # what has a switch is no constant
            lines[place] = re.sub("^constexpr", "inline", switched + code[end:])
    return found, "\n".join(lines) + "\n"


def kernels_of(file: str) -> set[str]:
    """The names of the kernels that are written there, as the library's table calls them."""
    written = set(re.findall(r"^(?:inline )?void (\w+?)(?:_of)?\(", (SOURCES / file).read_text(encoding="utf-8"), re.M))
    rows = re.findall(r"IN_ALL_FORMATS\((\w+), (\w+),", (SOURCES / "library.cpp").read_text(encoding="utf-8"))
    return {name for name, function in rows if function in written or file == "vectors.h"}


def compile_library(switched: dict[str, str], files: set[str], folder: Path, sanitized: bool) -> Path:
    """One with all switches, of the kernels in these files."""
    from manual_backprop.kernels.cpu import library

    own = folder / "cpp"
    shutil.copytree(SOURCES, own)
    for file, text in switched.items():
        (own / file).write_text(text, encoding="utf-8")
    table = (own / "library.cpp").read_text(encoding="utf-8")
    needed = set(FILES) if "vectors.h" in files else files | set(USERS if "operands.h" in files else ())
    for file in set(FILES[1:]) - needed:
        table = table.replace(f'#include "{file}"\n', "")
        for name in kernels_of(file):
            table = re.sub(rf"\n *IN_ALL_FORMATS\({name},.*", "", table)
        if file == "attention.h":
            table = table[: table.index("#define ATTENTION_SIZES")] + table[table.index("struct Kernel") :]
    (own / "library.cpp").write_text(table, encoding="utf-8")
    target = folder / "mutants.so"
    words = [word.replace(str(SOURCES), str(own)) for word in library._command(target)]
    words += ["-O1", *(SANITIZED if sanitized else ()), "-include", str(TESTS / "kernels" / "switches.h")]
    subprocess.run(words, check=True)
    return target


def tests_of(file: str) -> list[tuple[Callable[..., None], tuple]]:
    """Those of that file's kernels, with their arguments."""
    import test_compiled_kernels as tests

    if file == "operands.h":
        return [one for user in USERS for one in tests_of(user)]
    of_functions = tests.test_a_kernel_is_as_near_to_float64_as_the_function_as_it_is_written
    asked: list[tuple[Callable[..., None], tuple]] = [
        (of_functions, case) for case in product(sorted(kernels_of(file) & tests.FUNCTIONS.keys()), tests.FORMATS)
    ]
    if file == "activations.h":
        far = tests.test_the_slope_of_gelu_is_that_of_the_reference_far_from_zero_too
        asked += [(far, ("compiled", sign)) for sign in (-1, 1)]
    if file == "optimizers.h":
        asked += [
            (tests.test_a_step_that_is_not_finite_changes_nothing, (name,)) for name in ("adamw_step", "sgd_step")
        ]
        cases = product((0.5, 4.0, math.inf), (3.0, math.nan), (1.0, math.inf))
        asked += [(tests.test_a_step_is_checked_and_counted, case) for case in cases]
    if file == "embedding.h":
        of_tokens = tests.test_rows_are_added_to_those_of_their_tokens
        asked += [(of_tokens, ("compiled", precision)) for precision in tests.FORMATS]
        beyond = tests.test_a_token_beyond_the_vocabulary_is_no_number
        asked += [(beyond, case) for case in product((9, -1), tests.UNIT)]
    if file == "loss.h":
        cases = product((tests.test_cross_entropy_of_rows, tests.test_a_smoothed_target), tests.UNIT)
        asked += [(test, ("compiled", dtype)) for test, dtype in cases]
        asked += [(tests.test_a_target_beyond_the_vocabulary_is_no_number, (dtype,)) for dtype in tests.UNIT]
    if file == "attention.h":
        asked += [(tests.test_attention, (*case, dtype)) for case in tests.ATTENTION_CASES for dtype in tests.UNIT]
        rest = (
            tests.test_attention_of_large_scores_overflows_nowhere,
            tests.test_what_attention_does_not_see_may_hold_anything,
        )
        asked += product(rest, [(dtype,) for dtype in tests.UNIT])
        rotary = tests.test_rotary_attention_reads_a_key_for_all_its_queries
        asked += [(rotary, (*case, dtype)) for case in tests.ROTARY_CASES for dtype in tests.UNIT]
        asked.append((tests.test_attention_drops_an_element_from_the_same_probability_on, ()))
    if file == "products.h":
        cases = product(tests.PRODUCTS, product((False, True), repeat=2), tests.FORMATS)
        asked += [(tests.test_a_product, case) for case in cases]
    return asked


def compute_what_is_expected(files: Iterable[str]) -> None:
    """It does not depend on a mutant: every fork finds it."""
    import test_compiled_kernels as tests

    for name in ("expected", "expected_attention", "expected_product"):
        setattr(tests, name, functools.cache(getattr(tests, name)))
    for test, case in (one for file in files for one in tests_of(file)):
        if test is tests.test_attention:
            tests.expected_attention(*case)
        elif test is tests.test_a_kernel_is_as_near_to_float64_as_the_function_as_it_is_written:
            tests.expected(*case)
        elif test is tests.test_a_product:
            sizes, _, precision = case
            tests.expected_product(sizes, tests.FORMATS[precision]["activation"])


def run_all(library: Path, mutants: list[Mutant], workers: int) -> Iterator[tuple[Mutant, bool, float]]:
    """Each in a fork, `workers` at a time: the mutant, whether it was noticed, after how many seconds."""
    waiting, running = list(reversed(mutants)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            mutant, start = waiting.pop(), time.monotonic()
            child = os.fork()
            if child == 0:
                _judge(library, mutant)
            running[child] = mutant, start
        child, status = os.waitpid(-1, 0)
        mutant, start = running.pop(child)
        yield mutant, status != 0, time.monotonic() - start


def _judge(path: Path, mutant: Mutant) -> NoReturn:
    import torch

    from manual_backprop.kernels.cpu import compiled, library

    code = 1
    try:
        for timer, seconds in LIMITS.items():
            signal.setitimer(timer, seconds)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ["MUTANT"] = str(mutant.number)
        if mutant.number:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        compiled._loaded[:] = [library._load(path)]
        for test, case in tests_of(mutant.file):
            torch.manual_seed(0)  # as in pytest, the numbers of a test do not depend on the tests before it
            test(*case)
        code = 0
    except BaseException as error:  # whatever a test raises
        traceback.print_exception(error)
    finally:
        os._exit(code)


def _preload_sanitizer() -> None:
    """This program once more, with the sanitizer's library, which has to be the first."""
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        from manual_backprop.kernels.cpu.library import compiler

        place = subprocess.check_output([str(compiler()), "-print-file-name=libasan.so"], text=True).strip()
        given = os.environ | {"LD_PRELOAD": place, "ASAN_OPTIONS": "detect_leaks=0"}
        os.execve(sys.executable, [sys.executable, *sys.argv], given)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Mutation test of the kernels in C++.")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="only mutants with one of these texts in their names")
    parser.add_argument("--list", action="store_true", help="say which mutants there are, and stop")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    parser.add_argument("--plain", action="store_true", help="quicker: who reads or writes beside a tensor may live")
    chosen = parser.parse_args(arguments)

    mutants: list[Mutant] = []
    switched = {}
    for file in FILES:
        found, switched[file] = mutants_of(
            file, len(mutants) + 1, lambda name: not chosen.texts or any(text in name for text in chosen.texts)
        )
        mutants += found
    if not mutants:
        parser.error(f"no mutant has {' or '.join(map(repr, chosen.texts))} in its name; --list says which there are")
    if chosen.list:
        print(*(one.name for one in mutants), sep="\n")
        return 0
    if not chosen.plain:
        _preload_sanitizer()
    import torch

    from manual_backprop.kernels.cpu.products import has_products

    torch.set_num_threads(1)  # a fork may not inherit running threads
    if not has_products():  # nor are they compiled
        mutants = [one for one in mutants if one.file != "products.h"]
    start, files = time.monotonic(), dict.fromkeys(one.file for one in mutants)
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(switched, set(files), Path(folder), not chosen.plain)
        compiled = time.monotonic() - start
        compute_what_is_expected(files)
        right = [Mutant(0, file, f"{file}: no mutant") for file in files]
        wrong = [f"noticed: {one.name}" for one, noticed, _ in run_all(library, right, chosen.workers) if noticed]
        print(*wrong, sep="\n")
        if not wrong:
            for one, noticed, seconds in run_all(library, mutants, chosen.workers):
                if noticed == (one.name in EQUIVALENT):
                    wrong.append(f"{'noticed' if noticed else 'lives'} ({seconds:.1f} s): {one.name}")
                    print(wrong[-1], flush=True)
    if not chosen.texts:
        gone = [f"no such mutant: {name}" for name in EQUIVALENT.keys() - {one.name for one in mutants}]
        print(*gone, sep="\n")
        wrong += gone
    listed = sum(one.name in EQUIVALENT for one in mutants)
    print(
        f"{len(mutants)} mutants, {listed} listed as equivalent, {len(wrong)} wrong; {time.monotonic() - start:.0f} s, "
        f"{compiled:.0f} of them to compile"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "kernels")]
    sys.exit(main(sys.argv[1:]))
