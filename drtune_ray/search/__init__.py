"""Which trial is next, and what Optuna is told of it: Optuna only, no Ray."""
