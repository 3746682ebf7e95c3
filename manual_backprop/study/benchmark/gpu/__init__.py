"""`bench --gpu`: everything that needs a GPU, most important first, for a few minutes on a GPU machine.

`session.py` runs the parts and writes each table as soon as it is complete. The parts are `correctness.py`,
`limits.py`, `comparison.py` (steps compared with the peers, and memory) and `training.py`. `tables.py` defines their
results, and `processes.py` runs them in separate processes, since an error of a GPU makes its process unusable.
Needs only PyTorch; the rows of transformers are left out if it is missing.
"""
