"""compare, claim, measure, audit."""
