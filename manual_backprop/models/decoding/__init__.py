"""Text token by token: `incremental` computes logits with a key-value cache, `generation` chooses the tokens (greedy,
sampling, beam search)."""
