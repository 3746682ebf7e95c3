"""`bench --gpu`: everything that takes a GPU, in the order of importance, for the few minutes that one is at hand.

`session.py` goes through the parts and writes each table down as soon as it is there; `correctness.py`, `limits.py`,
`comparison.py` (steps beside the peers, and memory) and `training.py` are the parts; `tables.py` is what they give, and
`processes.py` where they run: in processes of their own, since an error of a GPU ends the process that meets it.
Needs PyTorch alone; transformers' rows are left out where that is missing.
"""
