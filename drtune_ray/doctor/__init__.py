"""Whether this machine, its cluster and its servers are fit for a study."""
