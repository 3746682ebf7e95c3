"""Sampling a token: temperature, top_k and top_p, with ties; and planted bugs that the tests must notice."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manual_backprop.common.errors import NotFiniteError
from manual_backprop.models.decoding import generation

Sample = Callable[..., Tensor]
NEVER = -1e4  # a logit so far below the others that its probability is 0, also in float64
CLOSE = {"atol": 0.035, "rtol": 0.0}  # five standard deviations of DRAWS draws
DRAWS = 5_000
PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64)  # in no order


def drawn(sample: Sample, logits: Tensor, temperature: float = 1.0, **limits: Any) -> Tensor:
    """DRAWS tokens of these logits (V,)."""
    generator = torch.Generator().manual_seed(1)
    tokens = sample(logits.double().expand(DRAWS, -1), temperature, limits.get("top_k"), limits.get("top_p"), generator)
    assert tokens.shape == (DRAWS, 1)
    return tokens.flatten()


def shares(sample: Sample, logits: Tensor, temperature: float = 1.0, **limits: Any) -> Tensor:
    return drawn(sample, logits, temperature, **limits).bincount(minlength=len(logits)).double() / DRAWS


def likely(*wanted: float) -> Tensor:
    """Probabilities that are in these ratios."""
    return torch.tensor(wanted, dtype=torch.float64) / sum(wanted)


def check_temperature(sample: Sample) -> None:
    logits = PROBABILITIES.log()
    for temperature in (0.5, 1.0, 2.0):
        want = (logits / temperature).softmax(0)
        torch.testing.assert_close(shares(sample, logits, temperature), want, **CLOSE)


def check_top_k(sample: Sample) -> None:
    logits = PROBABILITIES.log()
    wanted = {1: likely(0, 1, 0, 0), 2: likely(0, 0.5, 0, 0.3), 3: likely(0.15, 0.5, 0, 0.3)}
    for top_k, want in wanted.items():
        torch.testing.assert_close(shares(sample, logits, top_k=top_k), want, **CLOSE)
    for everything in (None, 0, 4, 99):
        torch.testing.assert_close(shares(sample, logits, top_k=everything), PROBABILITIES, **CLOSE)


def check_top_p(sample: Sample) -> None:
    """0.5 is less than 0.79 and 0.8 is not: the smallest set that reaches it has two."""
    logits = PROBABILITIES.log()
    wanted = {1e-9: likely(0, 1, 0, 0), 0.79: likely(0, 0.5, 0, 0.3), 0.81: likely(0.15, 0.5, 0, 0.3)}
    for top_p, want in wanted.items():
        torch.testing.assert_close(shares(sample, logits, top_p=top_p), want, **CLOSE)
    for everything in (None, 0.96, 1.0):
        torch.testing.assert_close(shares(sample, logits, top_p=everything), PROBABILITIES, **CLOSE)


def check_top_p_of_top_k(sample: Sample) -> None:
    """Of the two likeliest the first has 0.625."""
    logits = PROBABILITIES.log()
    torch.testing.assert_close(shares(sample, logits, top_k=2, top_p=0.6), likely(0, 1, 0, 0), **CLOSE)
    torch.testing.assert_close(shares(sample, logits, top_k=2, top_p=0.63), likely(0, 0.5, 0, 0.3), **CLOSE)
    # after the temperature: 0.5 and 0.3 are then as 0.25 and 0.09, of which the first has 0.735
    squared = {"temperature": 0.5, "top_k": 2}
    torch.testing.assert_close(shares(sample, logits, top_p=0.7, **squared), likely(0, 1, 0, 0), **CLOSE)
    torch.testing.assert_close(shares(sample, logits, top_p=0.74, **squared), likely(0, 0.25, 0, 0.09), **CLOSE)


def check_equal_logits_and_top_k(sample: Sample) -> None:
    """Of equal logits any that fit into top_k; larger ones always."""
    for top_k in (1, 3, 50):
        assert len(drawn(sample, torch.zeros(50), top_k=top_k).unique()) == top_k
    one_above = torch.zeros(50)
    one_above[17] = 1
    found = drawn(sample, one_above, top_k=3).unique().tolist()
    assert len(found) == 3
    assert 17 in found


def check_a_set_that_reaches_top_p_exactly(sample: Sample) -> None:
    """It is the smallest such set: the next token is one too many. Equal shares of a power of two are exact."""
    for count, of in ((1, 2), (1, 4), (2, 4), (3, 4), (5, 8), (7, 8)):
        logits = torch.tensor([0.0] * of + [NEVER])
        for temperature in (0.5, 1.0, 2.0):
            found = drawn(sample, logits, temperature, top_p=count / of)
            assert len(found.unique()) == count
            assert len(drawn(sample, logits, temperature, top_p=math.nextafter(count / of, 1)).unique()) == count + 1
        assert of not in found
    # of the four likeliest of eight equal ones each has a quarter
    assert len(drawn(sample, torch.zeros(8), top_k=4, top_p=0.5).unique()) == 2


def check_temperature_0(sample: Sample) -> None:
    """The likeliest token in each row, the first of equal ones, whatever top_k and top_p are."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0], [-9.0, -8.0, -7.0, -6.0]]).double()
    for top_k, top_p in ((None, None), (2, None), (None, 0.5)):
        assert sample(logits, 0, top_k, top_p, torch.Generator()).tolist() == [[1], [0], [3]]


def check_a_tiny_temperature(sample: Sample) -> None:
    """It is greedy: dividing the logits by it overflows in no row."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [900.0, 700.0, 800.0], [-800.0, -900.0, -700.0]]).double()
    for temperature in (1e-3, 1e-310):
        assert sample(logits, temperature, None, None, torch.Generator()).tolist() == [[1], [0], [2]]
        assert sample(logits, temperature, 2, 0.9, torch.Generator()).tolist() == [[1], [0], [2]]


def check_each_row_by_itself(sample: Sample) -> None:
    rows = torch.stack((PROBABILITIES, PROBABILITIES.flip(0), likely(1, 1, 1, 1))).log()
    generator = torch.Generator().manual_seed(2)
    tokens = sample(rows.repeat(DRAWS, 1), 1.0, 3, 0.85, generator).view(DRAWS, 3)
    for column, want in enumerate((likely(0.15, 0.5, 0, 0.3), likely(0.3, 0, 0.5, 0.15))):
        got = tokens[:, column].bincount(minlength=4).double() / DRAWS
        torch.testing.assert_close(got, want, **CLOSE)
    assert len(tokens[:, 2].unique()) == 3


def check_the_generator_decides(sample: Sample) -> None:
    state, logits = torch.random.get_rng_state(), torch.zeros(40, 50).double()
    first, again, other = (sample(logits, 1.0, None, None, torch.Generator().manual_seed(n)) for n in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's randomness is touched"


def check_what_is_not_finite(sample: Sample) -> None:
    for value in (math.nan, math.inf, -math.inf):
        logits = torch.zeros(3, 4).double()
        logits[1, 2] = value
        for temperature in (0, 1.0):
            with pytest.raises(NotFiniteError, match="not finite"):
                sample(logits, temperature, None, None, torch.Generator())


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sample(check: Callable[[Sample], None]) -> None:
    check(generation.sample)


BUGS = {  # a text of `sample`, which stands there once, and what is written in its place
    "a set that reaches top_p gets one more": ("before >= top_p", "before > top_p"),
    "the token that reaches top_p is left out": (" - ordered  #", "  #"),
    "what is unlikely is kept": ("descending=True", "descending=False"),
    "the tokens keep the places of the order": (".scatter(-1, places, ordered)", " + ordered"),
    "top_p of all in place of top_k's": ("    probabilities = logits.softmax(-1)", ""),
    "top_p is not looked at": ("top_p < 1", "top_p > 1"),
    "top_p begins at a half": ("top_p < 1", "top_p < 0.5"),
    "the row's largest is thrown away": ("ordered.masked_fill(before", "ordered.masked_fill(ordered.cumsum(-1)"),
    "one too few of top_k": ("min(top_k, logits.shape[-1])", "max(min(top_k, logits.shape[-1]) - 1, 1)"),
    "one too many of top_k": ("min(top_k, logits.shape[-1])", "min(top_k + 1, logits.shape[-1])"),
    "top_k of more than there are": ("min(top_k, logits.shape[-1])", "top_k"),
    "all that are as likely as the last of top_k": (
        "torch.full_like(logits, float('-inf')).scatter(-1, likeliest.indices, likeliest.values)",
        "logits.masked_fill(logits < likeliest.values[:, -1:], float('-inf'))",
    ),
    "the unlikeliest of top_k": ("logits.shape[-1]))", "logits.shape[-1]), largest=False)"),
    "top_k rows": ("min(top_k, logits.shape[-1])", "min(top_k, logits.shape[-1]), 0"),
    "the temperature forgotten": (" / temperature", ""),
    "the temperature upside down": (" / temperature", " * temperature"),
    "the temperature's root": (" / temperature", " / temperature**0.5"),
    "the largest is not taken off": ("(logits - logits.amax(-1, keepdim=True)) / t", "logits / t"),
    "the largest of all rows is taken off": ("logits.amax(-1, keepdim=True)", "logits.amax()"),
    "the smallest is taken off": ("logits.amax(-1", "logits.amin(-1"),
    "temperature 0 takes the last of equal ones": (
        "logits.argmax(-1, keepdim=True)",
        "logits.shape[-1] - 1 - logits.flip(-1).argmax(-1, keepdim=True)",
    ),
    "temperature 0 takes the unlikeliest": ("logits.argmax", "logits.argmin"),
    "temperature 0 is no case of its own": ("if temperature == 0:", "if temperature < 0:"),
    "a low temperature is 0": ("temperature == 0", "temperature < 1"),
    "another generator": ("generator=generator)", "generator=None)"),
    "a draw that is always the same": ("generator=generator)", "generator=torch.Generator().manual_seed(0))"),
    "the likeliest in place of a draw": ("torch.multinomial(probabilities, 1, generator=generator)",
                                         "probabilities.argmax(-1, keepdim=True)"),
    "any number that is finite": ("bool(logits.isfinite().all())", "bool(logits.isfinite().any())"),
    "only NaN is looked for": ("not bool(logits.isfinite().all())", "bool(logits.isnan().any())"),
}  # fmt: skip


def broken(old: str, new: str) -> Sample:
    functions = (generation._check_finite, generation.sample)
    source = "".join(map(inspect.getsource, functions)).replace('"-inf"', "'-inf'")
    assert source.count(old) == 1, "the planted bug has lost its place"
    names = dict(vars(generation))
    exec(source.replace(old, new), names)
    return names["sample"]


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_noticed(name: str) -> None:
    old, new = BUGS[name]
    sample = broken(old, new)
    noticed = []
    for check in CHECKS:
        try:
            check(sample)
        except (Exception, pytest.fail.Exception) as error:  # the latter: it did not raise
            noticed.append(f"{check.__name__}: {error}")
            break
    assert noticed, f"no check notices: {name}"


def test_sample_as_it_is_passes_where_bugs_are_planted() -> None:
    """The checks above notice the bug and not the way in which it is planted."""
    for check in CHECKS:
        check(broken("-> Tensor", "-> Tensor"))
