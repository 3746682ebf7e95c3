"""Tokens: tokenizers, the cached corpus of token ids, its splits, batches and their order.

Not here: how text is read (`data.sources`), and tools for whole datasets (`data.datasets`).
"""
