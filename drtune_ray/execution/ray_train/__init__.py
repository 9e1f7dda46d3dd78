"""Trials of several workers, on Ray Train."""
