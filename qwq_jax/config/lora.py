"""Low-rank adapters: which projections get one, and how large."""

from typing import Any

from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator

from qwq_jax.config.frozen import Frozen

ALL_LINEAR = "all-linear"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraConfig(Frozen):
    """LoRA (arXiv 2106.09685): a projection W x becomes W x + scale * B (A x), and only A and B are trained.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: The scale is alpha / rank.
        target_modules: The projections, by the names that Hugging Face gives them; ``"all-linear"``, which stands for
            all of a layer, is kept as their list.
        rslora: The scale is alpha / sqrt(rank) instead (arXiv 2312.03732), under which high ranks learn as fast.
    """

    rank: PositiveInt = 32
    alpha: PositiveFloat = 32.0
    target_modules: tuple[str, ...] = MODULES
    rslora: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_dropout(cls, data: Any) -> Any:
        asked = [name for name in ("dropout", "lora_dropout") if isinstance(data, dict) and name in data]
        if asked:
            raise ValueError(f"{asked[0]}: adapters are trained without dropout here; leave the key out")
        return data

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_modules(cls, value: Any) -> tuple[str, ...]:
        if value == ALL_LINEAR:
            return MODULES
        names = tuple(value) if isinstance(value, list | tuple) else ()
        if not names or any(name not in MODULES for name in names):
            raise ValueError(f'expected "{ALL_LINEAR}" or a list of some of {", ".join(MODULES)}, got {value!r}')
        if len(set(names)) < len(names):
            raise ValueError(f"a module is named twice in {value!r}")
        return tuple(name for name in MODULES if name in names)

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
