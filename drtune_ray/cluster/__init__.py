"""Ray clusters: sending studies there, and looking at one before they run."""
