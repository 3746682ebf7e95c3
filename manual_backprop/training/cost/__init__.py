"""What things cost: logging, inspection and loading in a training step, the speed of preparing text, runs at once.

`tracking` (with MLflow and without), `inspection`, `loading` and `preparing` measure time; `parallel` asks whether
MLflow gets everything of eight runs at once.

A module for each: its docstring is its help, `add_options` adds what its command line takes, and `measure` measures,
prints and says whether it was good enough; `tools/cost.py` is the command. What takes turns is in `turns.py`.
"""
