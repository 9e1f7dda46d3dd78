"""A study as objects of Kubernetes, for KubeRay."""
