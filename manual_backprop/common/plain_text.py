"""Foreign text for one line of a terminal or a picture: control characters are shown as escapes."""


def visible(text: str, kept: str = "") -> str:
    """`text` with every unprintable character replaced by its escape (\\x1b, \\u2028), except those in `kept`."""
    return "".join(c if c in kept or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
