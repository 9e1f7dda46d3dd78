"""Render a study as Kubernetes objects for KubeRay."""
