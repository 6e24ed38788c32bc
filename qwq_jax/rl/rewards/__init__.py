"""Verifiers and the problems they mark: plain Python, no JAX."""
