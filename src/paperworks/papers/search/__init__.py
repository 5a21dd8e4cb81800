"""Search: networks whose architecture is found by a program."""
