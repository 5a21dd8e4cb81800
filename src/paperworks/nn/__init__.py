"""Parts that two or more papers share."""
