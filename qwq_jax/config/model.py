"""The architecture: one class for the whole family. Its translation to and from ``config.json`` is in `huggingface`."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from qwq_jax.config.frozen import Frozen, describe
from qwq_jax.config.huggingface import read_huggingface, write_huggingface
from qwq_jax.config.yarn import YarnConfig

__all__ = ["ModelConfig", "YarnConfig"]


class ModelConfig(Frozen):
    """A Qwen2-family decoder. Equal configs compute the same function of the same weights.

    Attributes:
        vocab_size: ``V``, rows of the embedding; often more than the tokenizer has tokens.
        hidden_size: ``D``.
        num_layers: ``L``.
        num_heads: ``N``, query heads.
        num_kv_heads: ``K``, key-value heads; divides `num_heads`.
        head_dim: ``H``.
        intermediate_size: ``F``.
        rope_theta: Base of the rotary frequencies.
        yarn: Context extension, or ``None``.
        rms_norm_eps: Added to the mean square in each norm.
        tie_word_embeddings: The output head is the embedding.
        qkv_bias: q, k and v have a bias. Nothing else ever has one.
        max_position_embeddings: Longest context, before YaRN.
        bos_token_id: First token of a text, if the family uses one.
        eos_token_ids: Tokens that end a completion.
        pad_token_id: Filler token.
        scalar_head: The model scores texts, as reward models do: in place of the output head it has one number a token.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    rope_theta: float = Field(gt=1.0)
    yarn: YarnConfig | None = None
    rms_norm_eps: PositiveFloat
    tie_word_embeddings: bool
    qkv_bias: bool = True
    max_position_embeddings: PositiveInt
    bos_token_id: NonNegativeInt | None = None
    eos_token_ids: tuple[NonNegativeInt, ...] = ()
    pad_token_id: NonNegativeInt | None = None
    scalar_head: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot be shared by {self.num_kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotary embedding turns pairs")
        for token in (self.bos_token_id, *self.eos_token_ids, self.pad_token_id):
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"special token {token} lies outside the vocabulary of {self.vocab_size}")
        return self

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `scalar_head` out where it is false: earlier versions of the program refuse what they do not know."""
        fields = write(self)
        return fields if self.scalar_head else {name: value for name, value in fields.items() if name != "scalar_head"}

    @property
    def max_context(self) -> int:
        """Longest context the positions are made for, YaRN included."""
        if self.yarn is None:
            return self.max_position_embeddings
        extended = int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, extended)

    @property
    def num_parameters(self) -> int:
        """Weights of the model, a tied embedding counted once."""
        heads = self.num_heads + 2 * self.num_kv_heads
        attention = self.hidden_size * self.head_dim * (heads + self.num_heads)
        bias = heads * self.head_dim if self.qkv_bias else 0
        layer = attention + bias + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        own_head = self.vocab_size * self.hidden_size if not self.tie_word_embeddings else 0
        head = self.hidden_size if self.scalar_head else own_head
        return self.num_layers * layer + self.vocab_size * self.hidden_size + head + self.hidden_size

    @classmethod
    def from_huggingface(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Reads the contents of ``config.json``, in the style of transformers 4 or 5.

        Special tokens of `generation_config` win over those of `config`, as they do in transformers' ``generate``.

        Raises:
            ValueError: A field is missing, has the wrong type, asks for mathematics that this model does not do, or is
                unknown and so might.
        """
        fields = read_huggingface(config, generation_config or {})
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ValueError(f"config.json: {describe(error)}") from None

    def to_huggingface(self, dtype: str) -> dict[str, Any]:
        """Returns the contents of a ``config.json`` for weights stored as `dtype`, such as ``"bfloat16"``.

        Written in the style of transformers 4, as QwQ's own, which every version and vLLM read.

        Raises:
            ValueError: The config is not a Qwen2 model.
        """
        return write_huggingface(self.model_dump(), dtype)
