"""The report of a study: what it found, as one HTML file that opens offline."""
