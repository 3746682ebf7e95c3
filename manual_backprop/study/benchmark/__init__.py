"""What `python -m manual_backprop.bench` is made of. Needs torch only; transformers and matplotlib where asked for.

`cases` (what is measured), `choices` (the options that choose it), `rows` (what one measuring process does),
`process_memory` (what counts as memory), `peers` (transformers' own network), `products` (the limit), `measurement`
(all rows in turns, and whether their gradients agree), `page` (table, JSON, picture), `markdown` (README's table),
`breakdown` (where a step's time and memory go), `growth` (over sequence length and batch size) and `ablations` (the
kernels without one optimization at a time).
"""
