"""Run studies as jobs of a remote Ray cluster."""
