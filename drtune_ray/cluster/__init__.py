"""Studies as jobs of a Ray cluster elsewhere: what is sent there, and how it is followed."""
