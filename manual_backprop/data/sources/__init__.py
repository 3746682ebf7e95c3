"""Sources of documents: the user's files, datasets of the hub, the documentation inside Python; read in one pass.

`documents` defines what a source is. Not here: tokens.
"""
