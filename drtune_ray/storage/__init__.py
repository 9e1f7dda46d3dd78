"""What lasts of a study: its record, its lock, the search's storage, artifacts."""
