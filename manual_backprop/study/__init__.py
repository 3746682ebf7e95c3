"""Tools to study a network and its training: gradient check, benchmark, estimates, diagnosis, one step explained.

`paired_timing` times everything; `levels` and `kernel_gains` write pages from measurements.

Not here: the commands that print the results, and training itself (`training`).
`gradient_check` and `benchmark` run where only torch is installed.
May import: tasks, data and below.
"""
