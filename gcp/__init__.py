"""TPU VM jobs and GKE manifests, from a laptop, without JAX; `worker` runs on the VMs, without any packages."""
