"""Where trials run: all of Ray."""
