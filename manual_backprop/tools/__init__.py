"""Commands around data and measurements: `python -m manual_backprop.tools.NAME`; each takes --help.

Not here: what they measure and do, which lies in `data` and `study`.
May import: visualizer and below.
"""
