"""The running of trials on Ray: the one package, with doctor and jobs, that imports it."""
