"""Settings of a trial and of a study: typed, frozen, unknown keys refused."""
