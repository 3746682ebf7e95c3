"""From logits to tokens: greedy decoding, sampling, and beam search.

The decoder (`incremental.py`) reads tokens and keeps keys and values. This file only asks it for the logits of the next
token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import InputError, NotFiniteError
from .incremental import IncrementalDecoder

LENGTH_PENALTY = 0.6  # Vaswani et al. 2017, section 6.1


@dataclass(frozen=True)
class Drawing:
    """How a token is sampled: temperature, top-k, top-p and seed. Raises InputError for a value out of range."""

    temperature: float = 0.0  # 0: the likeliest token; the higher, the more often an unlikely one
    top_k: int | None = None  # sample among the k likeliest; None or 0: all
    top_p: float | None = None  # of these, among the likeliest that together have this probability; None: all
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            check_whole(name, getattr(self, name))
        if not self.temperature >= 0 or not math.isfinite(self.temperature):
            raise InputError(
                f"temperature={self.temperature}: expected 0 (the likeliest token) or more, usually 0.5 to 1.2."
            )
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: expected how many tokens to draw from, or 0 for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: expected a share of probability, more than 0 and at most 1.")


def check_whole(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63):
        raise InputError(f"{name}={value!r}: expected a whole number of at most 63 bits.")


def check_new_tokens(name: str, length: int) -> None:
    check_whole(name, length)
    if length < 0:
        raise InputError(f"{name}={length}: it counts new tokens; expected at least 0.")


def check_beams(beams: int, length_penalty: float) -> None:
    check_whole("beams", beams)
    if beams is None or beams < 1:
        raise InputError(f"beams={beams}: expected how many continuations are followed at once, at least 1.")
    if not length_penalty >= 0 or not math.isfinite(length_penalty):
        raise InputError(
            f"length_penalty={length_penalty}: expected 0 (log-probabilities as they are) or more, usually 0.6 to 1."
        )


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """logits (B, V) -> one token id for each row, (B, 1). Raises NotFiniteError if logits are not finite."""
    _check_finite(logits)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0: nothing overflows
    if top_k:
        likeliest = logits.topk(min(top_k, logits.shape[-1]))  # of equal logits, as many as fit
        logits = torch.full_like(logits, float("-inf")).scatter(-1, likeliest.indices, likeliest.values)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, places = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of the likelier tokens: the first token is always kept
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)


def _check_finite(logits: Tensor) -> None:
    if not bool(logits.isfinite().all()):
        raise NotFiniteError("The logits are not finite: the parameters have diverged, and no token can be drawn.")


def one_by_one(
    decoder: IncrementalDecoder,
    unread: Tensor,
    length: int,
    drawing: Drawing,
    end: int | None,
    padding: int | None = None,
) -> Iterator[Tensor]:
    """The next `length` tokens of each row, (B, 1) at a time, as soon as they are chosen.

    unread (B, t): the prompt. A row that has chosen `end` gets `padding` from then on (None: `end` again); when all
    rows have chosen it, generation ends. Raises NotFiniteError.
    """
    generator = torch.Generator()
    if drawing.seed is None:
        generator.seed()
    else:
        generator.manual_seed(drawing.seed)
    finished = torch.zeros(len(unread), 1, dtype=torch.bool)
    for _ in range(length):
        logits = decoder.read(unread).double().cpu()  # (B, V)
        drawn = sample(logits, drawing.temperature, drawing.top_k, drawing.top_p, generator)  # (B, 1)
        if end is not None:
            drawn = torch.where(finished, end if padding is None else padding, drawn)
            finished |= drawn == end
        unread = drawn.to(unread.device)
        yield unread
        if end is not None and bool(finished.all()):
            return


def normalizer(length: int, length_penalty: float) -> float:
    """The divisor of a log-probability that makes long and short continuations comparable:
    ((5 + length) / 6)^length_penalty (Wu et al. 2016, "Google's Neural Machine Translation System", equation 14)."""
    return ((5 + length) / 6) ** length_penalty


def beam_search(
    decoder: IncrementalDecoder, unread: Tensor, length: int, beams: int, length_penalty: float, end: int | None
) -> list[Tensor]:
    """The best continuation that the search finds for each row: its new tokens, `end` included. The best has the
    highest

        score = log p(tokens) / ((5 + number of tokens) / 6)^length_penalty

    unread (B, t): the prompts, all of the same length. A continuation is complete with `end`, or with `length` tokens.
    Every step extends the open continuations of a row by one token and keeps the `beams` likeliest; complete ones are
    set aside. A longer continuation is never more probable, so an open one with log-probability s can reach at best
    s / ((5 + length) / 6)^length_penalty: the search of a row ends when none of its open ones can win any more. Of
    equal scores the first one wins. beams=1 chooses the likeliest token each time. Raises NotFiniteError.

    -> a tensor for each row, on the CPU.
    """
    B, none = len(unread), -math.inf
    tokens = torch.empty(B, beams, 0, dtype=torch.int64)
    scores = torch.full((B, beams), none, dtype=torch.float64)  # log-probabilities of the open ones
    scores[:, 0] = 0
    best, best_scores = list(tokens[:, 0]), torch.full((B,), none, dtype=torch.float64)
    parents = torch.zeros(B, beams, dtype=torch.int64)
    for new in range(1, length + 1):
        if new == 1:
            logits = decoder.read(unread).repeat_interleave(beams, dim=0)  # each prompt is read once
            rows = torch.arange(B).repeat_interleave(beams)
            decoder.select(rows.to(unread.device))
        else:
            rows = (torch.arange(B)[:, None] * beams + parents).flatten()
            decoder.select(rows.to(unread.device))
            logits = decoder.read(tokens[:, :, -1].reshape(-1, 1).to(unread.device))
        logits = logits.double().cpu()  # (B beams, V)
        _check_finite(logits)
        V = logits.shape[-1]
        scores, places = likeliest((scores[..., None] + logits.log_softmax(-1).view(B, beams, V)).flatten(1), beams)
        parents, chosen = places // V, places % V
        tokens = torch.cat((tokens.gather(1, parents[..., None].expand(-1, -1, new - 1)), chosen[..., None]), dim=2)
        complete = torch.full_like(chosen, new == length, dtype=torch.bool)
        if end is not None:
            complete |= chosen == end
        found, which = torch.where(complete, scores / normalizer(new, length_penalty), none).max(1)
        for row in (found > best_scores).nonzero().flatten().tolist():
            best[row], best_scores[row] = tokens[row, which[row]], found[row]
        scores = scores.masked_fill(complete, none)
        can_win = scores.amax(1) / normalizer(length, length_penalty) > best_scores
        scores[~can_win] = none
        if not bool(can_win.any()):
            break
    return best


def likeliest(candidates: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest `number` entries of each row of (B, C) and their indices, (B, number) each. Of equal entries the
    first comes first, which `topk` does not guarantee."""
    values, places, left = [], [], candidates.clone()
    for _ in range(number):
        value, place = left.amax(-1, keepdim=True), left.argmax(-1, keepdim=True)
        values.append(value)
        places.append(place)
        left.scatter_(-1, place, -math.inf)
    return torch.cat(values, dim=-1), torch.cat(places, dim=-1)
