"""One step of backpropagation, traced statement by statement and written as a page with every number.

`trace` watches the functions, `autograd` computes the same gradients for comparison, `listing`, `numbers`, `words` and
`page` turn them into text; `example` is the step that is explained. Not here: the command (`manual_backprop.explain`).
"""
