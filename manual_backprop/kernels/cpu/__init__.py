"""The fast pairs for a CPU: products by the fastest library, attention in tiles, compiled pointwise functions.

Every pair has a file with the name that it has in `ops`. The loops are in C++ (cpp/), and the same functions in Python,
or in PyTorch: `compiled` calls one or the other; `library` compiles, caches and loads the C++.
Not here: the memory of a step and recorded steps (`kernels.arena`, `kernels.replay`), which all devices share.
"""
