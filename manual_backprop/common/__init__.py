"""What every room may use: errors and exit codes, files that survive a kill, signals, digests, a batch of tokens.

Not here: anything that knows a configuration, a network or a dataset.
May import: no other room.
"""
