"""The results of a study: trials, winner, evaluation."""
