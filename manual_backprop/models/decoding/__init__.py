"""One token after the other: `incremental` keeps keys and values between two of them, `generation` chooses them (the
likeliest, drawn ones, beam search)."""
