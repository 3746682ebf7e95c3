"""What may be in the way of a command on the machine where it is given, before it does its part.

    shadowing.py  files beside the command that Python would import in place of a library
    home.py       a user without a home directory or a name
    agg.py        matplotlib, whatever its settings for windows are
    output.py     streams whose reader goes before the command has ended

Not here: what depends on the processor, its memory and GPUs.
"""
