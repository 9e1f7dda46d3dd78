"""What outlasts a run of a study: its record, lock, trials and artifacts."""
