"""The two ways in which a command ends badly: the person's input is wrong (exit code 2), or we are (exit code 1)."""


class InputError(Exception):
    """The person's input is wrong. The message is one line: what is wrong, in which file, what to do about it."""
