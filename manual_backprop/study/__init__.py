"""Studying a network and its training: gradient check, benchmark, estimates, diagnosis, one step explained.

Not here: the commands that print the results, and training itself (`training`).
May import: tasks, tracking, data, models, kernels and below. `gradient_check` and `benchmark` run where only torch is
installed.
"""
