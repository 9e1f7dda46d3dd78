"""Checks that this machine, its cluster and its servers are ready for a study."""
