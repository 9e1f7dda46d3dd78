"""What may vary: the declarative search space."""
