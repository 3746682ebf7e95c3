"""Checks and work-arounds for the user's environment, made before a command starts.

    shadowing.py  files in the working directory that Python would import in place of a library
    home.py       a user without a home directory or a name
    agg.py        matplotlib, independent of the user's backend settings
    output.py     output streams that are closed before the command has ended

Not here: what depends on the processor, its memory and GPUs.
"""
