"""Clusters elsewhere: sending studies there, manifests for them, and looking at one beforehand."""
