"""The network by hand and its mirror under autograd, statement by statement: what autograd does for you.

`statements` splits a function into statements and `alignment` aligns those of two functions. `recorded` lists the nodes
that autograd records for a pair, and what it keeps for backward. `page` collects all of it; `markdown` and `html` write
it. Not here: the command (`tools.side_by_side`), and one step with its numbers (`study.explain`).
"""
