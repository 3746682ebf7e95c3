"""Commands for data and measurements: `python -m manual_backprop.tools.NAME`; each takes --help.

Not here: the code that they call, in `data`, `study` and `training.cost`.
May import: visualizer and below.
"""
