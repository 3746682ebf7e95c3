"""The fast pairs for an NVIDIA GPU: few launches, mostly of PyTorch's own kernels, called by name.

Every pair has a file with the name that it has in `ops`; a pair that is missing here is that of `ops`. A step copies
nothing from the host and never waits, so that it can be captured as one CUDA graph (`graph`). Memory comes from
PyTorch's allocator, which reuses freed memory at once; a graph keeps its own.
No line of it has run on a GPU yet: docs/guide/cuda.md says what has been proved, and how.
"""

# ruff: noqa: F401  the names are exported
from .attention import (
    attention_backward,
    attention_forward,
    cross_attention_backward,
    cross_attention_forward,
    self_attention_backward,
    self_attention_forward,
    told,
)
from .embedding import token_embedding_backward
from .feed_forward import (
    feed_forward_backward,
    feed_forward_forward,
    gated_feed_forward_backward,
    gated_feed_forward_forward,
)
from .linear import linear_backward, linear_forward
from .loss import linear_cross_entropy, linear_cross_entropy_backward, linear_cross_entropy_forward
from .normalization import (
    layer_norm_backward,
    layer_norm_forward,
    residual_layer_norm_backward,
    residual_layer_norm_forward,
    residual_rms_norm_backward,
    residual_rms_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from .rotary_attention import rotary_attention_backward, rotary_attention_forward
