"""What things cost: logging, inspection and loading in a training step, and the speed of preparing text.

A module for each. `add_options` adds what its command line takes beside --help, and `measure` measures, prints and says
whether it was good enough; `tools/cost.py` is the command. What is measured by turns is in `turns.py`.
"""
