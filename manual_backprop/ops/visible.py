"""Which keys a query may see: a small description, from which every tile of the scores computes its own mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALL = slice(None)


class Visible(NamedTuple):
    """A key is visible to a query where all given conditions hold. No mask of the whole (T, S) is ever needed.

    causal: the key does not come after the query. The last query has the position of the last key, so T queries may
    follow S - T earlier keys. key_lengths (B): the number of real keys of each sequence; the others are padding.
    query_segments (B, T) with key_segments (B, S): query and key are in the same segment (a document; padding is a
    segment of its own).

    >>> Visible(causal=True).mask(2, 3, torch.device("cpu"))[0, 0]
    tensor([[ True,  True, False], [ True,  True,  True]])
    >>> Visible(causal=False, key_lengths=torch.tensor([2])).mask(1, 3, torch.device("cpu"))[0, 0]
    tensor([[ True,  True, False]])
    """

    causal: bool = True
    key_lengths: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None

    @classmethod
    def within(cls, segments: Tensor | None) -> Visible:
        """What the self-attention of a decoder sees: no later position, and only its own segment. segments (B, T)."""
        return cls(True, None, segments, segments)

    @property
    def is_only_causal(self) -> bool:
        """Whether a key's place alone decides."""
        return self.causal and self.key_lengths is None and self.query_segments is None

    def may_leave_none(self, T: int, S: int) -> bool:
        """Whether a query may see no key at all. In causal self-attention every query sees at least itself."""
        if self.key_lengths is not None or (self.causal and T > S):
            return True
        return self.query_segments is not None and (self.query_segments is not self.key_segments or T != S)

    def keys_up_to(self, query: int, T: int, S: int) -> int:
        """The number of keys, from the first, that the queries before position `query` can see at most."""
        return min(max(query + S - T, 0), S) if self.causal else S

    def mask(
        self,
        T: int,
        S: int,
        device: torch.device,
        sequences: slice = ALL,
        queries: slice = ALL,
        keys: slice = ALL,
    ) -> Tensor | None:
        """True where a key is visible, for one tile of the scores of T queries and S keys; None if all are visible.

        -> (b, 1, t, s), with b = 1 where all sequences have the same mask.
        """
        query = torch.arange(T, device=device)[queries, None]  # (t, 1)
        key = torch.arange(S, device=device)[keys]  # (s)
        seen: Tensor | None = None
        if self.causal:
            seen = (key <= query + (S - T))[None]  # (1, t, s)
        if self.key_lengths is not None:
            there = key < self.key_lengths[sequences, None, None]  # (b, 1, s)
            seen = there if seen is None else seen & there
        if self.query_segments is not None and self.key_segments is not None:
            same = self.query_segments[sequences, queries, None] == self.key_segments[sequences, None, keys]
            seen = same if seen is None else seen & same
        return None if seen is None else seen.expand(-1, len(query), -1)[:, None]


CAUSAL = Visible()  # every position sees the earlier ones and itself
EVERYTHING = Visible(causal=False)
