"""Kernels: pure functions of arrays and static numbers, each with a plain-jnp reference of the same signature."""
