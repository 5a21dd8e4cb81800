"""The engine: learner, run folder, budgets, resume."""
