"""The parts of `python -m manual_backprop.bench`. It needs only torch; transformers and matplotlib are optional.

`cases` define what is measured, and `rows` what one measuring process does. `measurement` compares the gradients of all
rows, then measures them in turns. `page` and `markdown` print it. `breakdown` profiles a step, `growth` measures over
lengths and batch sizes, and `ablations` without one optimization at a time.
"""
