"""Observers of runs: they never steer a run, and a run never fails because of them."""
