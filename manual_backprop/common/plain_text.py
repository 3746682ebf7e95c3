"""Text of others in one line of a terminal or a picture: what a terminal would obey is made visible."""


def visible(text: str, kept: str = "") -> str:
    """`text` with every character that is not printable as its escape (\\x1b, \\u2028), but those of `kept`."""
    return "".join(c if c in kept or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
