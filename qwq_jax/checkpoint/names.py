"""THE table: every Hugging Face tensor and the one parameter it becomes, read in either direction.

| Hugging Face                             | shape      | parameter                           | shape     |
|------------------------------------------|------------|-------------------------------------|-----------|
| model.embed_tokens.weight                | [V, D]     | embed.embedding                     | [V, D]    |
| ...layers.i.input_layernorm.weight       | [D]        | layers.i.attention_norm.scale       | [D]       |
| ...layers.i.self_attn.{q,k,v}_proj.weight| [N*H, D]   | layers.i.attention.{q,k,v}_kernel   | [D, N, H] |
| ...layers.i.self_attn.{q,k,v}_proj.bias  | [N*H]      | layers.i.attention.{q,k,v}_bias     | [N, H]    |
| ...layers.i.self_attn.o_proj.weight      | [D, N*H]   | layers.i.attention.o_kernel         | [N, H, D] |
| ...layers.i.post_attention_layernorm.weight| [D]      | layers.i.mlp_norm.scale             | [D]       |
| ...layers.i.mlp.{gate,up}_proj.weight    | [F, D]     | layers.i.mlp.{gate,up}_kernel       | [D, F]    |
| ...layers.i.mlp.down_proj.weight         | [D, F]     | layers.i.mlp.down_kernel            | [F, D]    |
| model.norm.weight                        | [D]        | final_norm.scale                    | [D]       |
| lm_head.weight (untied only)             | [V, D]     | head.kernel                         | [V, D]    |
| score.weight (reward models, as the head)| [1, D]     | score.kernel                        | [D]       |

(k and v have K heads in place of N.) A tensor is split into its factors, then its dimensions are permuted; nothing is
computed, so both directions keep every bit.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from qwq_jax.config.model import ModelConfig

TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class NamePair:
    """One row of the table.

    Example:
        `q_proj.weight` [N*H, D] is `NamePair(source=..., path=..., source_shape=(N*H, D), factors=(N, H, D),
        order=(2, 0, 1))`: reshaped to `factors`, then permuted by `order` to [D, N, H].
    """

    source: str
    path: str
    source_shape: tuple[int, ...]
    factors: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.factors[axis] for axis in self.order)

    @property
    def inverse(self) -> tuple[int, ...]:
        """The permutation that turns the parameter's dimensions back into `factors`."""
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))

    def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, as a view of the Hugging Face tensor."""
        return tensor.reshape(self.factors).transpose(self.order)

    def to_source(self, parameter: np.ndarray) -> np.ndarray:
        """The Hugging Face tensor of a parameter."""
        return parameter.transpose(self.inverse).reshape(self.source_shape)


def name_table(config: ModelConfig) -> tuple[NamePair, ...]:
    """Every row for this architecture, in the order in which Hugging Face lists the tensors."""
    width, vocab = config.hidden_size, config.vocab_size
    rows = [_same(EMBEDDING, "embed.embedding", (vocab, width))]
    for index in range(config.num_layers):
        rows += _layer(config, f"model.layers.{index}.", f"layers.{index}.")
    rows.append(_same("model.norm.weight", "final_norm.scale", (width,)))
    if config.scalar_head:
        rows.append(NamePair("score.weight", "score.kernel", (1, width), (width,), (0,)))
    elif not config.tie_word_embeddings:
        rows.append(_same(TIED_HEAD, "head.kernel", (vocab, width)))
    assert len({row.source for row in rows}) == len(rows) == len({row.path for row in rows})
    return tuple(rows)


def check_leaves(table: Iterable[NamePair], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Asserts that the table fills every leaf of the model's abstract tree once, with its shape."""
    filled = {row.path: row.shape for row in table}
    assert filled == dict(shapes), sorted(set(filled.items()) ^ set(shapes.items()))[:4]


def match_tensors(config: ModelConfig, present: Mapping[str, tuple[int, ...]], where: str) -> tuple[NamePair, ...]:
    """Checks the tensors of a checkpoint against the table and returns the table.

    A tied checkpoint may also hold the head that it does not need; whether that head equals the embedding, as it must,
    is for the reader of the bytes to check (transformers would otherwise not tie them).

    Args:
        config: The architecture that config.json announces.
        present: Shape of each tensor in the checkpoint.
        where: Names the checkpoint in errors.

    Raises:
        ValueError: A tensor is missing, unknown, or contradicts config.json in its shape.
    """
    table = name_table(config)
    expected = {row.source: row.source_shape for row in table}
    known = dict(expected)
    if config.tie_word_embeddings:
        known[TIED_HEAD] = expected[EMBEDDING]
    _refuse(f"{where}: unknown extra tensor", [name for name in present if name not in known])
    _refuse(f"{where}: missing tensor", [name for name in expected if name not in present])
    for name, shape in present.items():
        if tuple(shape) != known[name]:
            raise ValueError(
                f"{where}: {name} has shape {list(shape)}, but config.json says it should be {list(known[name])}"
            )
    return table


def _refuse(complaint: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"{complaint} {names[0]}{more}")


def _same(source: str, path: str, shape: tuple[int, ...]) -> NamePair:
    return NamePair(source, path, shape, shape, tuple(range(len(shape))))


def _layer(config: ModelConfig, source: str, path: str) -> list[NamePair]:
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    rows = [_same(f"{source}input_layernorm.weight", f"{path}attention_norm.scale", (width,))]
    for letter, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
        there, here = f"{source}self_attn.{letter}_proj.", f"{path}attention.{letter}_"
        rows.append(_split(f"{there}weight", f"{here}kernel", (heads, head, width), order=(2, 0, 1)))
        if config.qkv_bias:
            rows.append(_split(f"{there}bias", f"{here}bias", (heads, head), order=(0, 1)))
    there, here = f"{source}self_attn.o_proj.weight", f"{path}attention.o_kernel"
    factors = (width, config.num_heads, head)
    rows.append(NamePair(there, here, (width, config.num_heads * head), factors, (1, 2, 0)))
    rows.append(_same(f"{source}post_attention_layernorm.weight", f"{path}mlp_norm.scale", (width,)))
    for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        rows.append(NamePair(f"{source}mlp.{name}_proj.weight", f"{path}mlp.{name}_kernel", shape, shape, (1, 0)))
    return rows


def _split(source: str, path: str, factors: tuple[int, ...], *, order: tuple[int, ...]) -> NamePair:
    return NamePair(source, path, (math.prod(factors[:2]), *factors[2:]), factors, order)
