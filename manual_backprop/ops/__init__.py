"""The calculus: forward and backward pairs on raw tensors, textbook clear.

A pair is `y, cache = name_forward(x, ...)` and `dx = name_backward(dy, cache, dweight, ...)`. The gradient of `x` is
`dx` and has its shape. A backward adds (`+=`) the gradients of parameters into the buffers that the caller passes, and
changes no other argument. A cache is private to its pair. Statistics, exponentials and sums of bfloat16 run in float32.

Tensors may have any floating-point format and be on any device. A pair does not check its arguments: shapes that do not
fit raise PyTorch's own errors (RuntimeError, IndexError), and an activation that there is not raises KeyError. The
example of a pair stands with its forward.

Read in the order in which a network uses them: embedding, normalization, linear, softmax, dropout, attention,
activations, feed_forward, loss. A llama has three parts of its own: rms_normalization, rotary_attention,
gated_feed_forward. An encoder whose output is one vector ends with pooling.
May import: common.
"""

from ..common.batch import IGNORED
from .activations import (
    bias_gelu_backward,
    bias_gelu_forward,
    gelu_backward,
    gelu_forward,
    gelu_tanh_backward,
    gelu_tanh_forward,
    relu_backward,
    relu_forward,
)
from .attention import (
    AttentionGradients,
    CrossAttentionGradients,
    attention_backward,
    attention_forward,
    cross_attention_backward,
    cross_attention_forward,
    self_attention_backward,
    self_attention_forward,
)
from .dropout import Dropout, dropout_backward, dropout_forward, keep_mask, random_key
from .embedding import (
    learned_positions_backward,
    learned_positions_forward,
    sinusoidal_positions_backward,
    sinusoidal_positions_forward,
    sinusoids,
    token_embedding_backward,
    token_embedding_forward,
)
from .feed_forward import feed_forward_backward, feed_forward_forward
from .gated_feed_forward import (
    gated_feed_forward_backward,
    gated_feed_forward_forward,
    swiglu_backward,
    swiglu_forward,
)
from .linear import linear_backward, linear_forward
from .loss import (
    cross_entropy_backward,
    cross_entropy_forward,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    squared_error_backward,
    squared_error_forward,
)
from .normalization import (
    layer_norm_backward,
    layer_norm_forward,
    residual_layer_norm_backward,
    residual_layer_norm_forward,
)
from .pooling import (
    first_position_backward,
    first_position_forward,
    mean_pooling_backward,
    mean_pooling_forward,
)
from .rms_normalization import (
    residual_rms_norm_backward,
    residual_rms_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from .rotary_attention import (
    repeat_heads_backward,
    repeat_heads_forward,
    rotary_attention_backward,
    rotary_attention_forward,
    rotary_backward,
    rotary_forward,
    rotations,
)
from .softmax import softmax_backward, softmax_forward
from .visible import CAUSAL, EVERYTHING, Visible

__all__ = [
    "CAUSAL",
    "EVERYTHING",
    "IGNORED",
    "AttentionGradients",
    "CrossAttentionGradients",
    "Dropout",
    "Visible",
    "attention_backward",
    "attention_forward",
    "bias_gelu_backward",
    "bias_gelu_forward",
    "cross_attention_backward",
    "cross_attention_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "dropout_backward",
    "dropout_forward",
    "feed_forward_backward",
    "feed_forward_forward",
    "first_position_backward",
    "first_position_forward",
    "gated_feed_forward_backward",
    "gated_feed_forward_forward",
    "gelu_backward",
    "gelu_forward",
    "gelu_tanh_backward",
    "gelu_tanh_forward",
    "keep_mask",
    "layer_norm_backward",
    "layer_norm_forward",
    "learned_positions_backward",
    "learned_positions_forward",
    "linear_backward",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "linear_forward",
    "mean_pooling_backward",
    "mean_pooling_forward",
    "random_key",
    "relu_backward",
    "relu_forward",
    "repeat_heads_backward",
    "repeat_heads_forward",
    "residual_layer_norm_backward",
    "residual_layer_norm_forward",
    "residual_rms_norm_backward",
    "residual_rms_norm_forward",
    "rms_norm_backward",
    "rms_norm_forward",
    "rotary_attention_backward",
    "rotary_attention_forward",
    "rotary_backward",
    "rotary_forward",
    "rotations",
    "self_attention_backward",
    "self_attention_forward",
    "sinusoidal_positions_backward",
    "sinusoidal_positions_forward",
    "sinusoids",
    "softmax_backward",
    "softmax_forward",
    "squared_error_backward",
    "squared_error_forward",
    "swiglu_backward",
    "swiglu_forward",
    "token_embedding_backward",
    "token_embedding_forward",
]
