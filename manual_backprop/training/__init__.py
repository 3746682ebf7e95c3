"""Training: the runner and its loop, resume, reports, plan, command line of a run, comparison of runs, sweeps.

`runner` builds everything from a config and owns the loop; `run_state` is what a checkpoint of a run holds; `run_facts`
is what report, state and summary know of it; `sweeps` starts many runs.
Not here: what is learned (`tasks`) and where it is written (`tracking`).
May import: every room but tools.
"""
