"""Finished runs beside each other: what sets them apart, how far their curves part, and a picture of that.

Reads run directories only. Not here: sweeps, which compare their own jobs with it (`training.sweeps`), and a run made a
second time (`training.reproduction`).
"""
