"""Which trial runs next, and what Optuna records of it; no Ray."""
