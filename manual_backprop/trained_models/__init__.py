"""Trained models: loaded from a run or a checkpoint, used as initial weights, exchanged with Hugging Face.

`saved_model` resolves the name of a run or checkpoint, `initial_weights` starts a run from one, `export` and
`model_card` write a model for `transformers`, MLflow calls `served`. Not here: checkpoints themselves (`checkpoints`),
and the files of MLflow's model (`tracking.mlflow_model`).
May import: study and below.
"""
