"""QwQ-32B, and the whole Qwen2 family, in JAX for TPUs.

Convert a Hugging Face checkpoint, answer prompts with it on any device mesh, fine-tune it, hand it back.

Everything that names an array dimension (einsums, shape suffixes, type annotations, sharding tables, the README) uses
one alphabet:

    ======  ==========================================
    letter  dimension
    ======  ==========================================
    ``B``   batch (sequences, or packed rows)
    ``T``   query tokens: those being computed
    ``S``   key tokens: those being attended to
    ``D``   model width (hidden size)
    ``N``   query heads
    ``K``   key-value heads
    ``G``   query heads per key-value head, ``N / K``
    ``H``   width of one head
    ``F``   feed-forward width
    ``V``   vocabulary
    ``L``   layers
    ``P``   pages of the key-value cache
    ======  ==========================================

The package imports nothing here; import the room you need, such as ``qwq_jax.config.model``.
"""

__version__ = "0.1.0"
