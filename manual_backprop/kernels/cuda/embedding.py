"""The token embedding, whose gradient touches the rows of the tokens that are there, and no others."""

from torch import Tensor

from ... import ops
from ...ops.embedding import TokenEmbeddingCache
from ...ops.numerics import rows, wide


def token_embedding_backward(dy: Tensor, cache: TokenEmbeddingCache, dweight: Tensor) -> None:
    """dy (B, T, D): adds to dweight (V, D): `ops.token_embedding_backward`.

    A narrow dweight is the textbook's business: its sums need a table in the wide format. In which order `index_add_`
    adds, a GPU decides anew each time, unless PyTorch's deterministic algorithms are chosen (device.deterministic).
    """
    tokens, scale = cache
    if dweight.dtype != wide(dy[:0]).dtype:
        ops.token_embedding_backward(dy, cache, dweight)
    else:
        dweight.index_add_(0, tokens.reshape(-1), rows(wide(dy)), alpha=scale)
