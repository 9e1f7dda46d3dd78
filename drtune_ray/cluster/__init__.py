"""Ray clusters that others run: Kubernetes manifests of a study."""
