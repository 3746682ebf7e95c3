"""The network by hand and its mirror under autograd, statement beside statement: what autograd does.

`statements` reads functions as statements, `alignment` puts those of two functions side by side, `recorded` asks
autograd what it records for a pair and keeps for its backward; `page` puts all of it together, `markdown` and `html`
write it. Not here: the command (`tools.side_by_side`), and one step with its numbers (`study.explain`).
"""
