"""Training: the runner and its loop, resume, reports, plan, command line of a run, comparison of runs, sweeps.

`runner` builds everything from a config and owns the loop; `run_state` is what a checkpoint of a run holds; `run_facts`
is what report, state and summary know of it; `reproduction` makes a run a second time; `processes` and `worker` train
one run on several processes and machines, `sweeps` starts many runs, `comparison` sets finished ones side by side,
`inspection` looks into the network, `cost` measures what things cost.
Not here: what is learned (`tasks`) and where it is written (`tracking`).
May import: trained_models and below.
"""
