"""Batch inference: requests of token ids in, completions out, by continuous batching over a paged cache.

`request` and `step` say what goes in and out, `pages` and `scheduler` decide what runs (plain Python), `runner` holds
the one compiled step, `engine` is the loop. Imports nothing, so that the plain parts do not bring JAX in.
"""
