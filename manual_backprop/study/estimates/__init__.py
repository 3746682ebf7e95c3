"""Estimates of a run before it starts: steps and epochs, peak memory, time on this machine.

Not here: the page of `plan=true`, which shows them (`training.plan`).
"""
