"""Whole datasets: found by name, described, downloaded, analysed, pretokenized, and tokenizers trained on them.

Not here: what a run reads step by step (`data.tokens`).
"""
