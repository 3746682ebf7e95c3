"""One step of backpropagation, traced statement by statement and written as a page with every number.

`trace` watches the functions, `autograd` computes the same gradients for comparison, `listing`, `numbers`, `words`,
`page` and `encoder_page` turn them into text; `example` has the steps that are explained, one for each task. Not here:
the command (`manual_backprop.explain`).
"""
