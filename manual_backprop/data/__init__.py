"""Data: from text to tokens to batches, and from series of numbers to windows.

`sources` reads documents, `tokens` turns them into a cached corpus of token ids and into batches in a fixed order,
`datasets` works on a dataset as a whole: find it by name, describe, download, analyse, pretokenize.
`series` are numbers over time.
Not here: what a batch is used for (`tasks`, `training`).
May import: config, common.
"""
