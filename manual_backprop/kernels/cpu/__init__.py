"""The fast pairs for a CPU: products by the faster library, attention in tiles, compiled pointwise functions.

One file a pair, under the name that it has in `ops`; `compiled`, `compiler` and `libraries` turn functions into C++.
Not here: memory of a step and recorded steps (`kernels.arena`, `kernels.replay`), which belong to every device.
"""
