"""Optimization: flat parameters, AdamW and SGD over them, PyTorch's optimizers with the same interface, schedules.

Not here: compiled updates (`kernels.cpu.optimizers`) and the training loop (`training.runner`).
May import: ops and below.
"""
