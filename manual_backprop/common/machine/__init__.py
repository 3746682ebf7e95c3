"""What may be wrong with the machine of whoever gives a command, and the way around it.

    shadowing.py  files beside the command that Python would import in place of a library
    home.py       a user without a home directory or a name
    agg.py        matplotlib, whatever its settings for windows are

Not here: what depends on the processor and its memory. Each needs little before it does its part.
"""
