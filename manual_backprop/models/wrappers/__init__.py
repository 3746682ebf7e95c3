"""Models seen from outside: data in, losses, predictions and checkpoints out; no `nn.Module`.

`wrapper` is what they have in common; `language_model` continues texts.
"""
