"""What things cost: logging, inspection and loading in a training step, and the speed of preparing text.

A module for each: its docstring is its help, `add_options` adds what its command line takes, and `measure` measures,
prints and says whether it was good enough; `tools/cost.py` is the command. What takes turns is in `turns.py`.
"""
