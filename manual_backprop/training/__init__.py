"""Training: the runner and its loop, resume, reports, plan, command line of a run, comparison of runs, sweeps.

`runner` builds everything from a config and owns the loop. `run_state` has the facts of a run and the content of
its checkpoint. `reproduction` repeats a run. `processes` and `worker` train one run on several processes and machines,
`sweeps` starts many runs, `comparison` compares finished runs. `inspection` records statistics of the layers, `cost`
measures the overhead of tracking, inspection and loading.
Not here: what is learned (`tasks`) and where results are written (`tracking`).
May import: trained_models and below.
"""
