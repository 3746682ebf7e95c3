"""What a run will take, before it starts: steps and epochs, memory at the peak, time on this machine.

Not here: the page of `plan=true`, which puts them together (`training.plan`).
"""
