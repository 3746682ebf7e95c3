"""The fast pairs for a CPU: products by the faster library, attention in tiles, compiled pointwise functions.

One file a pair, under the name that it has in `ops`. The loops are C++, in cpp/, beside the same functions in Python:
`compiled` calls the one or the other, `library` compiles, keeps and loads them.
Not here: memory of a step and recorded steps (`kernels.arena`, `kernels.replay`), which belong to every device.
"""
