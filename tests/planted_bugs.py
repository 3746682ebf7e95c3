"""Named bugs that hand-written backward passes tend to have: each is a text of the package and its replacement.

`mutate.py` plants them one at a time; `pytest -m gradients` must catch every one. The old text occurs exactly once in
its file, inside a function, so that a bug whose text no longer exists is noticed.
"""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    file: str  # below manual_backprop/
    old: str
    new: str


LINEAR, NORM, SOFTMAX = "ops/linear.py", "ops/normalization.py", "ops/softmax.py"
VISIBLE = "ops/visible.py"
DROPOUT, ATTENTION, ACTIVATIONS = "ops/dropout.py", "ops/attention.py", "ops/activations.py"
EMBEDDING, LOSS, FEED_FORWARD = "ops/embedding.py", "ops/loss.py", "ops/feed_forward.py"
RMS, ROTARY, GATED = "ops/rms_normalization.py", "ops/rotary_attention.py", "ops/gated_feed_forward.py"
POOLING = "ops/pooling.py"
ENCODERS = "models/custom_encoders.py"
CUSTOM, NETWORK, STEP = "models/custom.py", "models/network.py", "models/step.py"
FUSED_ATTENTION, FUSED_LOSS, ARENA = "kernels/cpu/attention.py", "kernels/cpu/loss.py", "kernels/arena.py"
REPLAY = "kernels/replay.py"

BUGS = [
    # encoders, and what reads them
    Bug(
        "the memory's gradient from one block alone",
        CUSTOM,
        'ops.linear_backward(dkey_value, key_value_cache, *linear_of(d, "cross_attention.key_value"), dx=dmemory)',
        'dmemory.copy_(ops.linear_backward(dkey_value, key_value_cache, *linear_of(d, "cross_attention.key_value")))',
    ),
    Bug(
        "the memory's gradient never reaches the encoder",
        ENCODERS,
        """        self._hidden_backward(dmemory, encoder_cache, "encoder.")
        self.on_gradients_complete(None)
        return loss""",
        """        self._hidden_backward(dmemory.zero_(), encoder_cache, "encoder.")
        self.on_gradients_complete(None)
        return loss""",
    ),
    Bug(
        "padding of a source is seen",
        ENCODERS,
        """        visible = Visible(causal=False, key_lengths=lengths)
        return self._training_step(source,""",
        """        visible = Visible(causal=False)
        return self._training_step(source,""",
    ),
    Bug(
        "cross-attention has the masks of self-attention",
        CUSTOM,
        'place = f"{block}.cross_attention."',
        'place = f"{block}.attention."',
    ),
    Bug(
        "an encoder sees no later place",
        ENCODERS,
        """        visible = Visible(causal=False, key_lengths=lengths)
        x, stack_cache""",
        """        visible = Visible(causal=True, key_lengths=lengths)
        x, stack_cache""",
    ),
    # cross-attention, pooling, squared error
    Bug(
        "gradient of the first reader of a key only",
        ATTENTION,
        "by_reader.sum(4).flatten(2)",
        "by_reader[..., 0, :].flatten(2)",
    ),
    Bug(
        "keys and values change places",
        ATTENTION,
        "torch.stack((dkey, dvalue), dim=2)",
        "torch.stack((dvalue, dkey), dim=2)",
    ),
    Bug("gradient of another reader lost", LINEAR, "dx += part", "dx.copy_(part)"),
    Bug(
        "mean over padding too",
        POOLING,
        "lengths.clamp(min=1)[:, None]",
        "torch.full_like(lengths, x.shape[1])[:, None]",
    ),
    Bug(
        "padding gets its share",
        POOLING,
        "return torch.where(real, (dy / count)[:, None], 0)",
        "return (dy / count)[:, None].expand(*real.shape[:2], -1).clone()",
    ),
    Bug("every position gets the first one's gradient", POOLING, "dx[:, 0] = dy", "dx[:] = dy[:, None]"),
    Bug("half the slope of a square", LOSS, "(2 * dloss / denominator)", "(dloss / denominator)"),
    # linear
    Bug(
        "bias gradient averaged over the rows",
        LINEAR,
        "dy_rows.sum(0, dtype=dbias.dtype)",
        "dy_rows.mean(0, dtype=dbias.dtype)",
    ),
    Bug(
        "bias gradient of the first row only",
        LINEAR,
        "dbias += dy_rows.sum(0, dtype=dbias.dtype)",
        "dbias += dy_rows[0]",
    ),
    Bug("bias gradient never computed", LINEAR, "if dbias is not None:", "if dbias is None:"),
    Bug("weight gradient assigned", LINEAR, "dweight += dy_rows.T @ rows(x)", "dweight.copy_(dy_rows.T @ rows(x))"),
    Bug(
        "weight gradient of the last sequence",
        LINEAR,
        "dweight += dy_rows.T @ rows(x)",
        "dweight += dy[-1:].reshape(-1, dy.shape[-1]).T @ x[-1:].reshape(-1, x.shape[-1])",
    ),
    Bug(
        "weight gradient into a copy",
        LINEAR,
        "dweight += dy_rows.T @ rows(x)",
        "dweight = dweight + dy_rows.T @ rows(x)",
    ),
    Bug(
        "the forward changes its input", LINEAR, "y = rows(x) @ transposed if", "y = rows(x.mul_(1.5)) @ transposed if"
    ),
    # normalization
    Bug(
        "mean of the gradient not taken off",
        NORM,
        "(dnormalized - along_ones - normalized",
        "(dnormalized - normalized",
    ),
    Bug("part along the normalized vector not taken off", NORM, " - normalized * along_normalized)", ")"),
    Bug("gain forgotten on the way back", NORM, "dnormalized = dy_wide * wide(weight)", "dnormalized = dy_wide"),
    Bug(
        "gain's gradient from x in place of normalized x", NORM, "rows(dy_wide * normalized)", "rows(dy_wide * wide(x))"
    ),
    Bug(
        "gain's gradient assigned",
        NORM,
        "dweight += rows(dy_wide * normalized)",
        "dweight[:] = rows(dy_wide * normalized)",
    ),
    Bug(
        "division by the variance, not by its root", NORM, "along_normalized) * rstd", "along_normalized) * rstd * rstd"
    ),
    Bug(
        "normalized in place",
        NORM,
        "normalized = centered * rstd\n    y =",
        "normalized = x.copy_(centered * rstd)\n    y =",
    ),
    Bug(
        "mean by D - 1",
        NORM,
        "along_ones = dnormalized.mean(-1, keepdim=True)",
        "along_ones = dnormalized.sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)",
    ),
    Bug(
        "epsilon only in the cache",
        NORM,
        "return y.to(x.dtype), (x, mean, rstd, weight)",
        "return y.to(x.dtype), (x, mean, (rstd**-2 + epsilon).rsqrt(), weight)",
    ),
    Bug(
        "the usual epsilon in place of the one that is given",
        NORM,
        "keepdim=True) + epsilon)",
        "keepdim=True) + EPSILON)",
    ),
    Bug(
        "epsilon not handed on",
        NORM,
        "layer_norm_forward(total, weight, bias, epsilon)",
        "layer_norm_forward(total, weight, bias)",
    ),
    Bug(
        "epsilon added to the root",
        NORM,
        "torch.rsqrt(centered.square().mean(-1, keepdim=True) + epsilon)",
        "1 / (centered.square().mean(-1, keepdim=True).sqrt() + epsilon)",
    ),
    Bug("the skip connection's gradient forgotten", NORM, "dsum if dtotal is None else dsum + dtotal", "dsum"),
    Bug(
        "the skip connection's gradient in place",
        NORM,
        "dsum if dtotal is None else dsum + dtotal",
        "dsum if dtotal is None else dtotal.add_(dsum)",
    ),
    Bug(
        "only the skip connection's gradient",
        NORM,
        "dsum if dtotal is None else dsum + dtotal",
        "dsum if dtotal is None else dtotal",
    ),
    Bug(
        "norm of the branch alone",
        NORM,
        "layer_norm_forward(total, weight, bias, epsilon)",
        "layer_norm_forward(x, weight, bias, epsilon)",
    ),
    Bug("branch added into x", NORM, "x if branch is None else x + branch", "x if branch is None else x.add_(branch)"),
    # softmax
    Bug(
        "softmax as if its entries were independent",
        SOFTMAX,
        "dx = y_wide * (dy_wide - weighted_mean)",
        "dx = y_wide * (1 - y_wide) * dy_wide",
    ),
    Bug(
        "plain mean in place of the weighted one",
        SOFTMAX,
        "(dy_wide * y_wide).sum(-1, keepdim=True)",
        "dy_wide.mean(-1, keepdim=True)",
    ),
    Bug(
        "weighted mean over the wrong axis",
        SOFTMAX,
        "(dy_wide * y_wide).sum(-1, keepdim=True)",
        "(dy_wide * y_wide).sum(-2, keepdim=True)",
    ),
    Bug("probability forgotten", SOFTMAX, "dx = y_wide * (dy_wide - weighted_mean)", "dx = dy_wide - weighted_mean"),
    Bug(
        "the cached probabilities changed",
        SOFTMAX,
        "dx = y_wide * (dy_wide - weighted_mean)",
        "dx = y_wide.mul_(dy_wide - weighted_mean)",
    ),
    # dropout
    Bug(
        "dropout not applied to the gradient",
        DROPOUT,
        "return dy * mask / (1 - dropout.probability)",
        "return dy",
    ),
    Bug(
        "another mask in backward",
        DROPOUT,
        "mask = keep_mask(tuple(dy.shape), dropout, dy.device)",
        "mask = keep_mask(tuple(dy.shape), dropout._replace(key=dropout.key + 1), dy.device)",
    ),
    Bug(
        "backward's mask starts at row 0",
        DROPOUT,
        "mask = keep_mask(tuple(dy.shape), dropout, dy.device)",
        "mask = keep_mask(tuple(dy.shape), dropout._replace(first=()), dy.device)",
    ),
    Bug("kept gradients not scaled up", DROPOUT, "return dy * mask / (1 - dropout.probability)", "return dy * mask"),
    Bug(
        "divided by the probability to drop",
        DROPOUT,
        "return dy * mask / (1 - dropout.probability)",
        "return dy * mask / dropout.probability",
    ),
    Bug(
        "a new mask each time",
        DROPOUT,
        "return h >= int(",
        "return torch.rand(shape) > dropout.probability if shape else h >= int(",
    ),
    Bug(
        "mask does not know where its rows are",
        DROPOUT,
        "dropout.first[dimension] if dimension < len(dropout.first) else 0",
        "0",
    ),
    # attention
    Bug("a position does not see itself", VISIBLE, "key <= query + (S - T)", "key < query + (S - T)"),
    Bug("a position sees the next one", VISIBLE, "key <= query + (S - T)", "key <= query + (S - T) + 1"),
    Bug("segments ignored", VISIBLE, "same if seen is None else seen & same", "same if seen is None else seen"),
    Bug("the future seen within a segment", VISIBLE, "same if seen is None else seen & same", "same"),
    Bug("query's gradient not scaled", ATTENTION, "(dscores @ key) * scale", "(dscores @ key)"),
    Bug("key's gradient not scaled", ATTENTION, "dscores.mT @ (query * scale)", "dscores.mT @ query"),
    Bug(
        "key's gradient scaled twice", ATTENTION, "dscores.mT @ (query * scale)", "dscores.mT @ (query * scale) * scale"
    ),
    Bug(
        "scale of the model's width, not of the head's",
        ATTENTION,
        "scale = 1 / math.sqrt(query.shape[-1])\n    (probabilities,)",
        "scale = 1 / math.sqrt(query.shape[-1] * query.shape[1])\n    (probabilities,)",
    ),
    Bug(
        "query's and key's gradients exchanged",
        ATTENTION,
        "AttentionGradients(dquery.transpose(1, 2), dkey.",
        "AttentionGradients(dkey.transpose(1, 2), dquery.",
    ),
    Bug(
        "value's gradient from probabilities before dropout",
        ATTENTION,
        "dropped.mT @ dcontext",
        "probabilities.mT @ dcontext",
    ),
    Bug(
        "dropout of the probabilities has no backward",
        ATTENTION,
        "dprobabilities = dropout_backward(ddropped, dropout_cache)",
        "dprobabilities = ddropped",
    ),
    Bug("value's gradient never computed", ATTENTION, "dvalue = dropped.mT @ dcontext", "dvalue = 0 * value"),
    Bug("query scaled in place", ATTENTION, "(query * scale) @ key.mT  # (B, H, T, S)", "query.mul_(scale) @ key.mT"),
    Bug(
        "masked scores keep a finite value",
        ATTENTION,
        "torch.where(seen, scores, -math.inf)",
        "torch.where(seen, scores, -10.0)",
    ),
    Bug(
        "heads and their width exchanged",
        ATTENTION,
        "dcontext = dcontext.unflatten(2, (n_heads, -1))",
        "dcontext = dcontext.unflatten(2, (-1, n_heads)).transpose(2, 3)",
    ),
    # activations
    Bug("relu lets negative gradients through", ACTIVATIONS, "return dy * (x > 0)", "return dy.clamp(min=0) * (x > 0)"),
    Bug("relu's slope from the gradient", ACTIVATIONS, "return dy * (x > 0)", "return dy * (dy > 0)"),
    Bug("gelu without its density", ACTIVATIONS, "density.mul_(x_wide).add_(cumulative)", "cumulative"),
    Bug("gelu's cube without the 3", ACTIVATIONS, "(squared * (3 * GATE_CUBIC))", "(squared * GATE_CUBIC)"),
    Bug("gelu's inner slope forgotten", ACTIVATIONS, "rest.mul_(slope)", "rest"),
    Bug(
        "the approximation's derivative for the exact gelu",
        ACTIVATIONS,
        "gelu_derivative = gelu_tanh_backward if tanh else gelu_backward",
        "gelu_derivative = gelu_tanh_backward",
    ),
    Bug(
        "gelu's slope without the bias",
        ACTIVATIONS,
        "dx = gelu_derivative(dy, (wide(x) + wide(bias),))",
        "dx = gelu_derivative(dy, (wide(x),))",
    ),
    Bug("gelu's bias gradient before the slope", ACTIVATIONS, "dbias += rows(dx).sum(0)", "dbias += rows(dy).sum(0)"),
    # embedding and positions
    Bug(
        "a repeated token counted once",
        EMBEDDING,
        "drows.index_add_(0, tokens.reshape(-1), dy_rows)",
        "drows[tokens.reshape(-1)] = dy_rows",
    ),
    Bug("the embedding's scale forgotten", EMBEDDING, "rows(wide(dy)) * scale", "rows(wide(dy))"),
    Bug(
        "the embedding's gradient assigned: the tied head's share is lost",
        EMBEDDING,
        "dweight += drows",
        "dweight.copy_(drows)",
    ),
    Bug("positions one too late", EMBEDDING, "dweight[: dy.shape[1]] +=", "dweight[-dy.shape[1] :] +="),
    Bug("positions of one sequence", EMBEDDING, "dy.sum(0, dtype=dweight.dtype)", "dy[0].to(dweight.dtype)"),
    Bug("positions averaged", EMBEDDING, "dy.sum(0, dtype=dweight.dtype)", "dy.mean(0, dtype=dweight.dtype)"),
    # loss
    Bug(
        "the target not taken off",
        LOSS,
        "dz.scatter_add_(1, on_target, torch.full_like(on_target, label_smoothing - 1, dtype=dz.dtype))  # p - q",
        "pass",
    ),
    Bug("smoothing's share on the target forgotten", LOSS, "label_smoothing - 1, dtype", "-1, dtype"),
    Bug("smoothing's share of the others forgotten", LOSS, "dz -= share", "pass"),
    Bug(
        "smoothing over the rows",
        LOSS,
        "share = label_smoothing / (z.shape[1]",
        "share = label_smoothing / (z.shape[0]",
    ),
    Bug("padding has a share of the smoothing", LOSS, "dz[:, padding] += share", "pass"),
    Bug(
        "ignored targets count",
        LOSS,
        "dz.masked_fill_(~counts, 0)",
        "pass",
    ),
    Bug("ignored targets multiplied by 0", LOSS, "dz.masked_fill_(~counts, 0)", "dz *= counts"),
    Bug("the denominator forgotten", LOSS, "dz *= dloss / denominator", "dz *= dloss"),
    Bug("the denominator is the number of rows", LOSS, "dz *= dloss / denominator", "dz *= dloss / z.shape[0]"),
    Bug(
        "the denominator is this piece's own",
        LOSS,
        "dz *= dloss / denominator",
        "dz *= dloss / counts.sum().clamp(min=1)",
    ),
    Bug("the upstream gradient forgotten", LOSS, "dz *= dloss / denominator", "dz /= denominator"),
    Bug(
        "the cached logits become probabilities",
        LOSS,
        "(wide(z) - logsumexp[:, None]).exp_()",
        "wide(z).sub_(logsumexp[:, None]).exp_()",
    ),
    # feed-forward
    Bug(
        "the hidden bias forgotten with relu",
        FEED_FORWARD,
        "linear_backward(dhidden, hidden_cache, dhidden_weight, dhidden_bias, hidden_feedback)",
        "linear_backward(dhidden, hidden_cache, dhidden_weight, None, hidden_feedback)",
    ),
    Bug(
        "a bias counted twice",
        FEED_FORWARD,
        "return linear_backward(dhidden, hidden_cache, dhidden_weight, feedback=hidden_feedback)\n",
        "return linear_backward(dhidden, hidden_cache, dhidden_weight, dhidden_bias, hidden_feedback)\n",
    ),
    Bug(
        "the activation skipped",
        FEED_FORWARD,
        "dhidden = activation_backward(dactivated, activation_cache)",
        "dhidden = dactivated",
    ),
    # RMS normalization
    Bug("rms: the part along the normalized vector not taken off", RMS, " - normalized * along_normalized)", ")"),
    Bug("rms: gain forgotten on the way back", RMS, "dnormalized = dy_wide * wide(weight)", "dnormalized = dy_wide"),
    Bug("rms: gain's gradient from x", RMS, "rows(dy_wide * normalized)", "rows(dy_wide * wide(x))"),
    Bug(
        "rms: gain's gradient assigned",
        RMS,
        "dweight += rows(dy_wide * normalized)",
        "dweight[:] = rows(dy_wide * normalized)",
    ),
    Bug(
        "rms: the mean taken off as in layer norm",
        RMS,
        "x_wide * rrms\n    y",
        "(x_wide - x_wide.mean(-1, True)) * rrms\n    y",
    ),
    Bug(
        "rms: the gradient's mean taken off as in layer norm",
        RMS,
        "dx = (dnormalized - normalized",
        "dx = (dnormalized - dnormalized.mean(-1, keepdim=True) - normalized",
    ),
    Bug("rms: the mean square, not its root", RMS, "along_normalized) * rrms", "along_normalized) * rrms * rrms"),
    Bug(
        "rms: epsilon only in the cache",
        RMS,
        "(x, rrms, weight)\n\n\ndef rms_norm_backward",
        "(x, (rrms**-2 + epsilon).rsqrt(), weight)\n\n\ndef rms_norm_backward",
    ),
    Bug(
        "rms: the usual epsilon in place of the one that is given",
        RMS,
        "keepdim=True) + epsilon)",
        "keepdim=True) + RMS_EPSILON)",
    ),
    Bug(
        "rms: epsilon not handed on", RMS, "rms_norm_forward(total, weight, epsilon)", "rms_norm_forward(total, weight)"
    ),
    Bug("rms: normalized in place", RMS, "normalized = x_wide * rrms", "normalized = x.copy_(x_wide * rrms)"),
    Bug("rms: the skip connection's gradient forgotten", RMS, "dsum if dtotal is None else dsum + dtotal", "dsum"),
    Bug(
        "rms: only the skip connection's gradient",
        RMS,
        "dsum if dtotal is None else dsum + dtotal",
        "dsum if dtotal is None else dtotal",
    ),
    # rotary positions, shared keys and values
    Bug("rotary: the usual base in place of the one that is given", ROTARY, "1 / base **", "1 / BASE **"),
    Bug(
        "rotary: speeds as if a head were as wide as its pairs are many",
        ROTARY,
        "(even / d_head)",
        "(even * 2 / d_head)",
    ),
    Bug(
        "rotary: turned further in place of back",
        ROTARY,
        "    dfirst = dturned_1 * cosine + dturned_2 * sine\n    dsecond = dturned_2 * cosine - dturned_1 * sine",
        "    dfirst = dturned_1 * cosine - dturned_2 * sine\n    dsecond = dturned_2 * cosine + dturned_1 * sine",
    ),
    Bug(
        "rotary: not turned back",
        ROTARY,
        "return joined(dfirst, dsecond, dvalues).to(dy.dtype)",
        "return dy.clone()",
    ),
    Bug(
        "rotary: the halves exchanged on the way back",
        ROTARY,
        "return joined(dfirst, dsecond, dvalues)",
        "return joined(dsecond, dfirst, dvalues)",
    ),
    Bug(
        "rotary: values turned back as well",
        ROTARY,
        "dvalues = halves(wide(dy), 2 * rotation.shape[-1], n_turned)",
        "dvalues = halves(wide(dy), 2 * rotation.shape[-1], dy.shape[-1] // (2 * rotation.shape[-1]))",
    ),
    Bug(
        "rotary: positions counted from the end on the way back",
        ROTARY,
        "rotation[:, : dy.shape[1], None]",
        "rotation[:, -dy.shape[1] :, None]",
    ),
    Bug(
        "rotary: neighbours paired in place of halves",
        ROTARY,
        "first, second = heads[:, :, :n_turned].chunk(2, dim=-1)",
        "first, second = heads[:, :, :n_turned, 0::2], heads[:, :, :n_turned, 1::2]",
    ),
    Bug(
        "rotary: keys not turned",
        ROTARY,
        "rotary_forward(qkv, rotation, n_heads + n_kv_heads)",
        "rotary_forward(qkv, rotation, n_heads)",
    ),
    Bug(
        "a shared head's gradient of one reader only",
        ROTARY,
        "dshared = by_reader.sum(3)",
        "dshared = by_reader[:, :, :, 0]",
    ),
    Bug("a shared head's gradient averaged", ROTARY, "dshared = by_reader.sum(3)", "dshared = by_reader.mean(3)"),
    Bug(
        "a shared head's gradient summed over heads far apart",
        ROTARY,
        "by_reader = wide(drepeated).unflatten(2, (2 * n_kv_heads, -1))",
        "by_reader = wide(drepeated).unflatten(2, (-1, 2 * n_kv_heads)).transpose(2, 3)",
    ),
    Bug(
        "heads read in turns in place of groups",
        ROTARY,
        "shared.repeat_interleave(n_heads // n_kv_heads, dim=2)",
        "shared.repeat(1, 1, n_heads // n_kv_heads, 1)",
    ),
    Bug(
        "attention's gradient not turned back",
        ROTARY,
        "return rotary_backward(dturned, rotary_cache)",
        "return dturned",
    ),
    # the feed-forward network with a gate
    Bug(
        "the gate's gradient without the hidden layer",
        GATED,
        "dgate = dy_wide * hidden * opening",
        "dgate = dy_wide * opening",
    ),
    Bug("the gate's slope is the sigmoid", GATED, "opening * (1 + gate * rest)", "opening"),
    Bug("the gate's slope is the sigmoid's", GATED, "opening * (1 + gate * rest)", "opening * rest"),
    Bug(
        "the hidden layer's gradient without the gate", GATED, "dhidden = dy_wide * gate * opening", "dhidden = dy_wide"
    ),
    Bug(
        "the hidden layer's gradient of a plain sigmoid",
        GATED,
        "dhidden = dy_wide * gate * opening",
        "dhidden = dy_wide * opening",
    ),
    Bug(
        "gate and hidden layer exchanged",
        GATED,
        "torch.cat((dgate, dhidden), dim=-1)",
        "torch.cat((dhidden, dgate), dim=-1)",
    ),
    Bug(
        "the gate skipped",
        GATED,
        "dgated = swiglu_backward(dactivated, swiglu_cache)",
        "dgated = torch.cat((dactivated, dactivated), dim=-1)",
    ),
    Bug(
        "the gate changed in the cache",
        GATED,
        "gate.sigmoid(), gate.neg().sigmoid()",
        "gate.sigmoid(), gate.neg_().sigmoid()",
    ),
    # the network
    Bug("the config's epsilon forgotten", STEP, "epsilon=config.epsilon,", ""),
    Bug("the config's base forgotten", NETWORK, "config.d_head, config.base)", "config.d_head)"),
    Bug(
        "the tied head's gradient goes astray",
        STEP,
        "self.head, self.dhead = self.matrices[head], self.gradients[head]",
        "self.head, self.dhead = self.matrices[head], self.gradients[head].clone()",
    ),
    Bug(
        "the head's gradient replaces what is there",
        STEP,
        "dx = self.ops.linear_cross_entropy_backward(dloss, loss_cache,",
        "self.dhead.zero_()\n            dx = self.ops.linear_cross_entropy_backward(dloss, loss_cache,",
    ),
    Bug(
        "blocks from first to last",
        CUSTOM,
        "for block in reversed(self.stacks[stack]):\n                with blocks.last() as block_cache:\n"
        "                    dx = self._post",
        "for block in self.stacks[stack]:\n                with blocks.last() as block_cache:\n"
        "                    dx = self._post",
    ),
    Bug(
        "pre-norm blocks from first to last",
        CUSTOM,
        "for block in reversed(self.stacks[stack]):\n                with blocks.last() as block_cache:\n"
        "                    dx = dbranch = self._pre",
        "for block in self.stacks[stack]:\n                with blocks.last() as block_cache:\n"
        "                    dx = dbranch = self._pre",
    ),
    Bug("every block has the first block's cache", STEP, "kept = self._kept.pop()", "kept = self._kept[0]"),
    Bug(
        "the skip around the feed-forward forgotten",
        CUSTOM,
        "dx = dx + self._feed_forward_backward(dbranch, block, feed_forward_cache)",
        "dx = self._feed_forward_backward(dbranch, block, feed_forward_cache)",
    ),
    Bug(
        "the skip around attention forgotten",
        CUSTOM,
        "dx = dx + self._attention_backward(dattended, block, attention_cache)",
        "dx = self._attention_backward(dattended, block, attention_cache)",
    ),
    Bug(
        "pre-norm: the sum's own gradient forgotten",
        CUSTOM,
        "self.norm_backward(dx, dnormed, feed_forward_norm_cache",
        "self.norm_backward(None, dnormed, feed_forward_norm_cache",
    ),
    Bug("the embedding's dropout forgotten", CUSTOM, "        dx = self.ops.dropout_backward(dx, dropout_cache)\n", ""),
    Bug(
        "the attention's dropout forgotten",
        CUSTOM,
        "dy = ops.dropout_backward(self.narrow(dy), dropout_cache)\n        dcontext = ops.linear_backward(dy, "
        'output_cache, *linear_of(d, "attention',
        'dcontext = ops.linear_backward(dy, output_cache, *linear_of(d, "attention',
    ),
    Bug(
        "the feed-forward's dropout forgotten",
        CUSTOM,
        "        # y = dropout(feed_forward(x))\n        dy = ops.dropout_backward(",
        "        dy, _ = (",
    ),
    Bug(
        "the embedding's gradient never computed",
        CUSTOM,
        "            self.ops.token_embedding_backward(dx, token_cache, self.gradients[table])",
        "            pass",
    ),
    Bug(
        "both norms' gradients in one place",
        CUSTOM,
        'self.norm_backward(None, dx, attention_norm_cache, *norm_of(d, "attention_norm"))',
        'self.norm_backward(None, dx, attention_norm_cache, *norm_of(d, "feed_forward_norm"))',
    ),
    Bug(
        "a stale cache: backward of the forward before",
        STEP,
        "self._cache = cache, outputs.shape",
        "self._cache = self._cache or (cache, outputs.shape)",
    ),
    Bug(
        "every place drops the same elements in backward only",
        CUSTOM,
        'dcontext = ops.linear_backward(dy, output_cache, *linear_of(d, "attention',
        "dy = dy if dropout_cache is None else ops.dropout_backward(dy, dropout_cache._replace(key=1))\n"
        '        dcontext = ops.linear_backward(dy, output_cache, *linear_of(d, "attention',
    ),
    # the fused kernels
    Bug(
        "fused: scores not scaled",
        FUSED_ATTENTION,
        "rows, scale = tile.rows, 1 / math",
        "rows, scale = tile.rows, 1 or 1 / math",
    ),
    Bug(
        "fused: the key's gradient not scaled",
        FUSED_ATTENTION,
        "queries[:, rows], adds, scale)",
        "queries[:, rows], adds)",
    ),
    Bug("fused: blocks of queries from the first", FUSED_ATTENTION, "in reversed(blocks)", "in blocks"),
    Bug("fused: sums over blocks written, not added", FUSED_ATTENTION, "seen].add_(part", "seen].copy_(part"),
    Bug(
        "fused: every tile masked as the first",
        FUSED_ATTENTION,
        "scores[..., self.seen - size :].add_(",
        "scores[..., :size].add_(",
    ),
    Bug(
        "fused: probabilities recomputed across documents",
        FUSED_ATTENTION,
        "_fill(probabilities, queries, keys, tile)\n",
        "_fill(probabilities, queries, keys, _Tile(scores._replace(visible=CAUSAL), T, S, sequences, rows))\n",
    ),
    Bug(
        "fused: the documents of the first sequences for all",
        FUSED_ATTENTION,
        "device, self.sequences, self.rows, slice(self.seen)",
        "device, slice(self.sequences.stop - self.sequences.start), self.rows, slice(self.seen)",
    ),
    Bug(
        "fused: the last rows have no loss",
        FUSED_LOSS,
        "pieces(len(x_rows), _rows",
        "pieces(max(1, len(x_rows) - 1), _rows",
    ),
    Bug("fused: all that is kept in one place", ARENA, "self._next, self._next + 1", "self._next, 1"),
    Bug("fused: the stack does not grow", ARENA, "self._top = block, start + size,", "self._top = block, start,"),
    Bug("fused: a gradient over the caller's tensor", ARENA, "_current.get() is None or not x", "not x"),
    Bug(
        "fused: the input's gradient over the input before the weight's",
        "kernels/cpu/linear.py",
        "    add_product(dweight, dy_rows.T, rows(x))\n    if dx is not None:\n",
        "    if dx is None:\n        torch.mm(dy_rows, back, out=rows(in_place_of(x)))\n"
        "    add_product(dweight, dy_rows.T, rows(x))\n    if dx is not None:\n",
    ),
    Bug(
        "fused: a block's output in memory that the next block overwrites",
        STEP,
        "outputs.clone() if",
        "outputs if",
    ),
    # steps that are replayed
    Bug("a step that is replayed has the first one's tokens", REPLAY, "mine.copy_(given)", "mine.copy_(mine)"),
    Bug("what is new in a step stays as it was", REPLAY, "x.copy_(result)", "x.copy_(x)"),
    Bug(
        "drawn numbers are not drawn again",
        REPLAY,
        "return not any(tag in function.tags for tag in NOT_REPLAYABLE)",
        "return True",
    ),
    Bug("what a step changes counts as what stays", REPLAY, " and not _storages(made) & self._changed", ""),
    Bug("a step with the settings of another", STEP, "return *settings, self.norm_forward", "return self.norm_forward"),
    # masks, tiles of any queries and keys, and the weights that gradients go through
    Bug(
        "mask counts its rows in the tensor's sizes",
        DROPOUT,
        "zip((1, *dropout.sizes), shape[:-1], strict=True)",
        "zip((1, *shape[1:-1]), shape[:-1], strict=True)",
    ),
    Bug("the first query beside the first key", VISIBLE, "key <= query + (S - T)", "key <= query"),
    Bug("padding leaves every query a key", VISIBLE, "if self.key_lengths is not None or (", "if ("),
    Bug("every causal query has a key", VISIBLE, " or (self.causal and T > S)", ""),
    Bug(
        "other segments leave every query a key",
        VISIBLE,
        "(self.query_segments is not self.key_segments or T != S)",
        "False",
    ),
    Bug("padding seen", VISIBLE, "there = key < self.", "there = key <= self."),
    Bug("key lengths ignored where it is causal", VISIBLE, "there if seen is None else seen & there", "seen"),
    Bug("the first sequences' key lengths for all", VISIBLE, "self.key_lengths[sequences,", "self.key_lengths[:1,"),
    Bug(
        "every tile of queries masked as the first",
        VISIBLE,
        "device=device)[queries, None]",
        "device=device)[: len(range(T)[queries]), None]",
    ),
    Bug("the last key never seen", VISIBLE, "max(query + S - T, 0)", "max(query + S - T - 1, 0)"),
    Bug(
        "a row without a finite score is NaN",
        SOFTMAX,
        ".clamp(min=torch.finfo(x_wide.dtype).min)",
        "",
    ),
    Bug("a row without a finite score is divided by 0", SOFTMAX, "keepdim=True).clamp(min=1)).to", "keepdim=True)).to"),
    Bug("blocks have their caches from first to last", STEP, "kept = self._kept.pop()", "kept = self._kept.pop(0)"),
    Bug(
        "the key's gradient in the value's place",
        ATTENTION,
        "dvalue.copy_(gradients.dvalue)",
        "dvalue.copy_(gradients.dkey)",
    ),
    Bug(
        "dx through the weight itself, whatever is given", LINEAR, "weight if feedback is None else feedback", "weight"
    ),
    Bug("the output's feedback not handed on", FEED_FORWARD, "doutput_bias, output_feedback)", "doutput_bias, None)"),
    Bug(
        "fused: dx through the weight itself, whatever is given",
        "kernels/cpu/linear.py",
        "cache[1] if feedback is None else for_products(feedback, dy.dtype)",
        "cache[1]",
    ),
    Bug(
        "fused: the loss goes through the weight itself, whatever is given",
        FUSED_LOSS,
        "weight if feedback is None else for_products(feedback, x.dtype)",
        "weight",
    ),
    Bug(
        "fused: the first block adds to what is there", FUSED_ATTENTION, "adds = number != blocks[-1][0]", "adds = True"
    ),
    Bug("fused: every block writes over the sums", FUSED_ATTENTION, "adds = number != blocks[-1][0]", "adds = False"),
    Bug(
        "fused: the mask of the first queries for all",
        FUSED_ATTENTION,
        "device, self.sequences, self.rows, slice(self.seen)",
        "device, self.sequences, slice(self.rows.stop - self.rows.start), slice(self.seen)",
    ),
    Bug(
        "fused: kept gradients not scaled up", FUSED_ATTENTION, "ddropped.mul_(mask).div_(share)", "ddropped.mul_(mask)"
    ),
    Bug("fused: a query that sees no key is NaN", FUSED_ATTENTION, "    tile.empty_(probabilities)\n", ""),
    Bug(
        "fused: every tile drops the same elements", FUSED_ATTENTION, "tile(sequences.start, 0, rows.start)", "tile(0)"
    ),
    Bug(
        "fused: dropout's mask of the first queries for all",
        FUSED_ATTENTION,
        "tile(sequences.start, 0, rows.start)",
        "tile(sequences.start)",
    ),
    Bug(
        "fused: a branch that is not added",
        STEP,
        "x, inputs = x + inputs[0], (None, *inputs[1:])",
        "inputs = None, *inputs[1:]",
    ),
]
