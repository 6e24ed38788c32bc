"""YaRN, the context extension of the rotary embedding."""

import math
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from qwq_jax.config.frozen import Frozen


class YarnConfig(Frozen):
    """YaRN context extension, with the fields that transformers reads and its defaults.

    Attributes:
        factor: How many times longer the context becomes.
        original_max_position_embeddings: The context length the model was trained on.
        attention_factor: What cos and sin are multiplied by. ``None`` means ``0.1 ln(factor) + 1``.
        beta_fast: Rotations over the original context above which a frequency is kept as it is.
        beta_slow: Rotations over the original context below which a frequency is divided by `factor`.
        truncate: Round the ends of the ramp between the two to whole dimensions.
    """

    factor: float = Field(ge=1.0, le=1e6)
    original_max_position_embeddings: PositiveInt
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    truncate: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} is below beta_slow {self.beta_slow}")
        return self

    @property
    def attention_scale(self) -> float:
        """What cos and sin are multiplied by: `attention_factor` or its default."""
        return default_attention_factor(self.factor) if self.attention_factor is None else self.attention_factor


def default_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's recommended multiplier of cos and sin: ``0.1 mscale ln(factor) + 1``."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
