"""Sizes of the inference engine."""

from typing import Literal

from pydantic import Field, PositiveInt

from qwq_jax.config.frozen import Frozen
from qwq_jax.config.weights import WeightName

# Of a device's memory that weights leave, the part that pages may have: the rest is for activations and programs.
CACHE_SHARE = 0.9


class EngineConfig(Frozen):
    """Everything that fixes a compiled shape of the engine or the memory it takes.

    None of these change what a request is answered, beyond rounding; 8 and 4 bits round more.

    Attributes:
        max_sequences: Rows of the decode step, per data replica.
        page_size: Tokens in one page of the key-value cache.
        num_pages: Pages per data replica. ``None`` gives every row room for `max_context` tokens, as far as there is
            memory.
        max_context: Longest prompt plus completion. ``None`` takes the model's own limit.
        prefill_chunk: Prompt tokens that one step computes, of all sequences of a data replica.
        max_prefill_sequences: Sequences that one prefill step computes, per data replica.
        decode_window: Tokens that a sequence draws before the host looks at them; a stream comes in parts so long.
            ``None`` takes 16, and 1 on tpu7x, where the loop would hold the weights a second time.
        draft_tokens: Tokens that prompt lookup guesses at once, to be checked in one step; 0 is off. Lossless.
        prefix_cache: Whether requests that begin alike share pages, and pages are kept for later ones.
        compute_dtype: Type of weights and activations on the device.
        cache_dtype: Type of the key-value cache. ``None`` takes `compute_dtype`; the 8-bit ones keep a scale a token
            and head, and halve the memory of a bfloat16 cache.
        weights: ``int8``, ``int4``, ... (see `config.weights`) quantises the projections while they are loaded.
            ``None`` leaves them as the checkpoint has them, which may itself be quantised.
        activations: ``int8`` makes inputs of 8-bit projections int8 too: twice the products a second of prompts, on
            TPUs that have them (v5e, v5p, v6e).
        logprobs: Those that are reported: of the model itself, as OpenAI's API has them, or at the request's
            ``temperature``, as training on what was drawn needs them.
    """

    max_sequences: PositiveInt = 32
    page_size: PositiveInt = 64
    num_pages: PositiveInt | None = None
    max_context: PositiveInt | None = None
    prefill_chunk: PositiveInt = 256
    max_prefill_sequences: PositiveInt = 4
    decode_window: PositiveInt | None = None
    draft_tokens: int = Field(default=0, ge=0, le=15)
    prefix_cache: bool = True
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    cache_dtype: Literal["float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"] | None = None
    weights: WeightName | None = None
    activations: Literal["int8"] | None = None
    logprobs: Literal["model", "temperature"] = "model"
