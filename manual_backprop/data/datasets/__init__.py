"""Whole datasets: find by name, describe, download, analyse, pretokenize, and train tokenizers on them.

Not here: the batches that a run reads step by step (`data.tokens`).
"""
