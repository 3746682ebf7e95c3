"""Runs beside each other: what sets them apart, how far their curves part, a picture; and a run made a second time.

Reads run directories only. Not here: sweeps, which compare their own jobs with it (`training.sweeps`).
"""
