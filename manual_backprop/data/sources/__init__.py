"""Sources of documents: files of the user, datasets of the hub, the documentation inside Python; read in one pass.

`documents` says what a source is. Not here: tokens.
"""
