"""Studying a network and its training: gradient check, benchmark, estimates, diagnosis, one step explained, both
networks side by side.

`paired_timing` is how everything is timed; `levels` and `kernel_gains` are measured pages, `api_page` is one that is
made of docstrings.

Not here: the commands that print the results, and training itself (`training`).
`gradient_check` and `benchmark` run where only torch is installed.
May import: tasks, data and below.
"""
