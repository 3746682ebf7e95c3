"""What `python -m manual_backprop.bench` is made of. Needs torch only; transformers and matplotlib where asked for.

`cases` say what is measured, `rows` what one measuring process does, `measurement` takes all rows in turns and compares
their gradients first; `page` and `markdown` show it. `breakdown`, `growth` and `ablations` measure something else.
"""
