"""Checkpoints: directories `step-NNNNNN/` of safetensors and JSON with checksums, each complete or absent.

Not here: which run a checkpoint belongs to (`tracking.run_directory`), and loading a model for use (`trained_models`).
May import: common.
"""
