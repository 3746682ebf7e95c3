"""Optimization: flat parameters, AdamW and SGD over them, PyTorch's own optimizers behind the same seam, schedules.

Not here: compiled updates (`kernels.cpu.optimizers`) and the loop that calls them (`training.runner`).
May import: ops and below.
"""
