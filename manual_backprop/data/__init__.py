"""Data: from text to tokens to batches, and from time series to windows.

`sources` reads documents. `tokens` turns them into a cached corpus of token ids, and into batches in a fixed order.
`datasets` works on whole datasets: find by name, describe, download, analyse, pretokenize. `series` reads time series.
Not here: what a batch is used for (`tasks`, `training`).
May import: config, common.
"""
