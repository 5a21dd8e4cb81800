"""``python -m paperworks``."""

from paperworks.cli import run

run()
