"""Measures overhead: of logging, inspection and loading in a training step, and of preparing text and parallel runs.

`tracking` (with MLflow and without), `inspection`, `loading` and `preparing` measure time. `parallel` checks that
MLflow receives everything from eight parallel runs.

Each is a module: its docstring is its help, `add_options` adds its options, and `measure` measures, prints, and returns
whether the limit was met. `tools/cost.py` is the command. `turns.py` has the measurement in turns.
"""
