"""One step of backpropagation, traced statement by statement and written as a page with every number.

`trace` records the functions, `autograd` computes the same gradients for comparison, `listing`, `numbers`, `words` and
`page` turn them into text; `example` is the explained step. Not here: the command (`manual_backprop.explain`).
"""
