"""Bugs that kernels in Triton, and what launches them, tend to have.

test_triton.py plants each, and the tests under the interpreter must notice it. Files are below
manual_backprop/kernels/cuda/; the old text stands in one exactly once.
"""

from __future__ import annotations

from planted_bugs import Bug

NORM, LOSS, ADAMW, GATE = "triton/normalization.py", "triton/loss.py", "triton/adamw.py", "triton/gate.py"
ACTIVATIONS, CLIPPING, LAUNCHING = "triton/activations.py", "triton/clipping.py", "triton/launching.py"

BUGS = [
    # AdamW
    Bug("the decay makes weights larger", ADAMW, "p * (1 - decay)", "p * (1 + decay)"),
    Bug("the first bias decays", ADAMW, "at < decayed_size", "at <= decayed_size"),
    Bug("gradients are not clipped", ADAMW, "clip * wide(", "wide("),
    Bug(
        "epsilon is corrected with the moment",
        ADAMW,
        "tl.sqrt(second) / root_of_second_correction + EPSILON",
        "(tl.sqrt(second) + EPSILON) / root_of_second_correction",
    ),
    Bug("a step that does not count changes a moment", ADAMW, "tl.where(counts, second, second_before)", "second"),
    Bug("the narrow weights are those of before", ADAMW, "new.to(narrow_ptr", "p.to(narrow_ptr"),
    Bug("the last parameter is left out", ADAMW, "inside = at < P", "inside = at < P - 1"),
    # the gradient's norm
    Bug("the last square is left out", CLIPPING, "mask=at < P", "mask=at < P - 1"),
    Bug("a block is left out", CLIPPING, "block += programs", "block += programs + 1"),
    # cross-entropy
    Bug("the largest logit is left out", LOSS, "largest + tl.log(total)", "tl.log(total)"),
    Bug("a sum is not scaled to its new maximum", LOSS, "total * tl.exp(before - shift)", "total"),
    Bug("the share of a token is another", LOSS, "SMOOTHING) / V", "SMOOTHING) / (V + 1)"),
    Bug("padding is smoothed", LOSS, "tl.where(column < V, z, 0.0)", "z"),
    Bug("the gradient is not scaled", LOSS, "scale * (p - q - share)", "p - q - share"),
    Bug("what lies behind a row is written", LOSS, "element_ty), mask=column < V)", "element_ty))"),
    Bug(
        "a row that does not count has a loss",
        LOSS,
        "tl.where(counts, largest + tl.log(total) - expected, 0.0)",
        "largest + tl.log(total) - expected",
    ),
    # norms
    Bug("the mean is that of a block", NORM, "mean = tl.sum(x, 0) / D", "mean = tl.sum(x, 0) / BLOCK"),
    Bug("padding has a variance", NORM, "tl.where(inside, x - mean, 0.0)", "x - mean"),
    Bug("epsilon is left out", NORM, "/ D + EPSILON)", "/ D)"),
    Bug("the sum is normalized before it is rounded", NORM, "x = wide(total)  #", "x += 0.0  #"),
    Bug("dx has a part along the ones", NORM, "dx -= tl.sum(dnormalized, 0) / D", "dx -= 0.0"),
    Bug("dx is that of what is normalized", NORM, "dx *= rstd", "dx *= 1.0"),
    Bug("a row is left out", NORM, "row += groups", "row += groups + 1"),
    Bug("dbias takes the place of dweight", NORM, "(groups + group) * D", "group * D"),
    Bug(
        "the gradient of the sum is lost", NORM, "dx += wide(tl.load(dtotal_ptr", "dx += 0.0 * wide(tl.load(dtotal_ptr"
    ),
    # activations
    Bug("the cube's derivative is the square", ACTIVATIONS, "LINEAR + 3 * CUBIC", "LINEAR + CUBIC"),
    Bug("the density has the wrong sign", ACTIVATIONS, "ROOT_OF_HALF) + x * tl.exp", "ROOT_OF_HALF) - x * tl.exp"),
    Bug("a ReLU lets a gradient through its corner", ACTIVATIONS, "tl.where(x > 0, 1.0", "tl.where(x >= 0, 1.0"),
    Bug("rows of backward are left out", ACTIVATIONS, "start += groups * ROWS", "start += (groups + 1) * ROWS"),
    Bug(
        "the last bias has no gradient",
        ACTIVATIONS,
        "mask=column < F)\n\n\n@triton.jit\ndef activated",
        "mask=column < F - 1)\n\n\n@triton.jit\ndef activated",
    ),
    Bug("the gate's own slope is left out", GATE, "opening * (1 + gate * rest)", "opening"),
    Bug("both halves have one gradient", GATE, "dx_ptr + at_gate + F, dhidden", "dx_ptr + at_gate + F, dgate"),
    Bug("the hidden half is the gate", GATE, "row * 2 * F + F + column", "row * 2 * F + column"),
    # partial sums
    Bug("groups are left out", LAUNCHING, "start += ROWS", "start += 2 * ROWS"),
    Bug("sums are assigned", LAUNCHING, "(sums + values)", "(values)"),
    # what launches them, and calls PyTorch
    Bug(
        "attention has no scale",
        "attention.py",
        "context, *statistics = aten",
        "scale = 1.0\n        context, *statistics = aten",
    ),
    Bug(
        "scores are divided by the width",
        "attention.py",
        "causal, scale = visible.causal, 1 / math.sqrt(",
        "causal, scale = visible.causal, 1 / (",
    ),
    Bug(
        "seed and log-sum-exp change places",
        "attention.py",
        "None, context, logsumexp, seed",
        "None, context, seed, logsumexp",
    ),
    Bug(
        "the lengths change places",
        "attention.py",
        "seed, offset, None, cum_q, cum_k",
        "seed, offset, None, cum_k, cum_q",
    ),
    Bug(
        "shared keys have the gradients of others",
        "rotary_attention.py",
        "torch.cat(gradients, dim=2)",
        "torch.cat(gradients[::-1], dim=2)",
    ),
    Bug(
        "a chunk has the targets of the first one",
        "loss.py",
        "cross_entropy_(logits, target[part],",
        "cross_entropy_(logits, target[: len(logits)],",
    ),
    Bug("a scaled loss scales no gradient", "loss.py", "scale = share * dloss", "scale = share"),
    Bug("the loss is a sum", "loss.py", ".sum() * share, dx", ".sum(), dx"),
    Bug(
        "a hidden bias is added twice",
        "feed_forward.py",
        "rows(x) @ hidden_weight.T, hidden_bias",
        "rows(x) @ hidden_weight.T + hidden_bias.to(x.dtype), hidden_bias",
    ),
    Bug(
        "the output's bias has no gradient", "feed_forward.py", "doutput_bias += dy_rows", "doutput_bias += 0 * dy_rows"
    ),
    Bug(
        "the branch has the gradient before the norm",
        "normalization.py",
        "dsum.rounded = rounded",
        "dsum.rounded = dy.to(dtype)",
    ),
    Bug("nothing decays", "optimizers.py", "self.parameters.decayed_size - self.part.start, 0", "0, 0"),
    Bug("the first correction is missing", "optimizers.py", "1 - beta1**updates", "1 - 0 * beta1**updates"),
    Bug("a position's gradient is that of another", "embedding.py", "tokens.reshape(-1)", "tokens.reshape(-1).flip(0)"),
]
