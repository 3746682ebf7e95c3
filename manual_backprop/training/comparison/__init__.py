"""Compares finished runs: their settings that differ, the largest difference of their curves, and a picture.

Reads run directories only. Not here: sweeps, which use it to compare their jobs (`training.sweeps`), and the comparison
of a run with its repetition (`training.reproduction`).
"""
