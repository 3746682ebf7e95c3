"""Checkpoints: directories `step-NNNNNN/` of safetensors and JSON that are complete or absent, with checksums.

Not here: which run a checkpoint belongs to (`tracking.run_directory`), and models that are opened for use
(`trained_models`).
May import: common.
"""
