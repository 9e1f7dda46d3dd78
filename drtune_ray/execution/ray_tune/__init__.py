"""A queue of trials, on Ray Tune."""
