"""TPU VM jobs and GKE manifests, from a laptop. Nothing here imports JAX; `worker` runs on the VMs, without packages."""
