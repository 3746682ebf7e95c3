"""The token embedding, whose backward touches only the rows of tokens in the batch."""

from torch import Tensor

from ... import ops
from ...ops.embedding import TokenEmbeddingCache
from ...ops.numerics import rows, wide


def token_embedding_backward(dy: Tensor, cache: TokenEmbeddingCache, dweight: Tensor) -> None:
    """dy (B, T, D): adds to dweight (V, D): `ops.token_embedding_backward`.

    A 16-bit dweight uses the pair of `ops`, since its sums need a float32 table. On a GPU the order of the sums in
    `index_add_` varies, unless PyTorch's deterministic algorithms are on (device.deterministic).
    """
    tokens, scale = cache
    if dweight.dtype != wide(dy[:0]).dtype:
        ops.token_embedding_backward(dy, cache, dweight)
    else:
        dweight.index_add_(0, tokens.reshape(-1), rows(wide(dy)), alpha=scale)
