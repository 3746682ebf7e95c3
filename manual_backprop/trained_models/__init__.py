"""Trained models: opened from a run or a checkpoint, taken as a start, exported, exchanged with Hugging Face.

`saved_model` resolves what a user names, `initial_weights` starts a run from it, `export` and `model_card` write it for
others, `served` is what MLflow calls. Not here: checkpoints themselves (`checkpoints`), and the files of MLflow's model
(`tracking.mlflow_model`).
May import: study and below.
"""
