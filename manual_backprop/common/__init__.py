"""What every package may use: errors and exit codes, durable files, signals, digests, a batch of tokens.

Not here: anything that knows a configuration, a network or a dataset.
May import: no other room.
"""
