"""The decoder: embedding, blocks, final norm, and a head over the vocabulary or, of a reward model, a scalar one.

The same module serves two arrangements of its weights. *Unrolled*, one set of arrays a layer, is what checkpoints and
decoding use: a scan over layers would copy the whole KV cache. *Stacked*, one array with a leading L axis a weight, is
what training uses: one layer is compiled, and rematerialisation wraps it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.weights import WeightFormat
from qwq_jax.model.embedding import look_up
from qwq_jax.model.layers import Attend, Block, RMSNorm, kernel, param
from qwq_jax.model.rope import rotary_tables
from qwq_jax.sharding import Layout


class Embed(nnx.Module):
    """Token embedding `[V, D]`."""

    def __init__(self, config: ModelConfig):
        """Declares the table."""
        self.embedding = param((config.vocab_size, config.hidden_size), ("vocab", "embed"))


class Head(nnx.Module):
    """Output projection `[V, D]`, row-major by token as the embedding is; in 8 bits with one scale a token."""

    def __init__(self, config: ModelConfig, weights: WeightFormat | None = None):
        """Declares the matrix."""
        shape = (config.vocab_size, config.hidden_size)
        self.kernel, self.kernel_scale = kernel(
            shape, ("vocab", "embed"), weights if weights and weights.head else None
        )


class Score(nnx.Module):
    """What a reward model has for a head: a direction `[D]`."""

    def __init__(self, config: ModelConfig):
        """Declares the direction."""
        self.kernel = param((config.hidden_size,), ("embed",))


class Transformer(nnx.Module):
    """A Qwen2 decoder. Build it with `qwq_jax.model.params.bind`, which puts real arrays in."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        stacked: bool = False,
        dtype: Any = jnp.float32,
        remat: bool = False,
        weights: WeightFormat | None = None,
        lora: LoraConfig | None = None,
        fused: bool = False,
    ):
        """Declares all arrays.

        Args:
            config: The architecture.
            stacked: Whether the arrays of the layers come stacked, `[L, ...]`.
            dtype: Dtype of the activations; weights are cast to it where they are used.
            remat: Whether the backward pass recomputes each layer instead of keeping its activations (stacked only).
            weights: How projections are quantised, which only decoding uses; None: they are not.
            lora: Which projections have an adapter beside them; None: none has.
            fused: Whether the arrays are as `fuse_projections` gives them (unrolled only).

        Raises:
            ValueError: These projections cannot be quantised so.
        """
        assert not (stacked and weights), "training needs weights of full precision"
        if weights is not None and weights.head and (config.tie_word_embeddings or config.scalar_head):
            head = "a direction" if config.scalar_head else "its embedding"
            raise ValueError(f"weights {weights.name}: this model's head is {head}, which is not quantised")
        self.config = config
        self.stacked = stacked
        self.dtype = dtype
        self.remat = remat
        self.embed = Embed(config)
        self.layers: Any  # one block whose arrays are stacked, or a list of blocks
        if stacked:
            self.layers = Block(config, lora=lora)
        else:
            self.layers = nnx.List([Block(config, weights, lora, fused=fused) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.scalar_head:
            self.score = Score(config)
        elif not config.tie_word_embeddings:
            self.head = Head(config, weights)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: tuple[Any, ...] | None = None,
        *,
        layout: Layout | None = None,
        kept: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...] | None]:
        """Runs the decoder up to its final norm.

        Args:
            tokens: `[B, T]` int32 token ids.
            positions: `[B, T]` int32, of each token in its own sequence.
            attend: How tokens see each other; see `qwq_jax.model.attention`.
            cache: One entry a layer, handed to `attend` (unrolled only).
            layout: The mesh of training (stacked only): what one layer hands to the next, which the backward pass keeps
                of each, is cut over tokens by the devices that share a layer (arXiv 2205.05198, section 4.2.2).
            kept: `[B, S]` int32, the tokens whose hidden states are wanted (unrolled only); None: all. Of the others
                the last layer computes keys and values, and nothing after its attention.

        Returns:
            Hidden states `[B, T, D]`, or `[B, S, D]`, in the activation dtype, and the cache.
        """
        x = look_up(self.embed.embedding[...], tokens, self.dtype)
        rotary = rotary_tables(positions, self.config)
        if self.stacked:
            assert cache is None, "a scan over layers would copy the cache"
            assert kept is None, "layers of a scan are alike"
            x = self._scan(x, rotary, attend, layout)
        else:
            entries = cache if cache is not None else (None,) * len(self.layers)
            x, updated = self._unrolled(x, rotary, attend, entries, kept)
            cache = updated if cache is not None else None
        return self.final_norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of the next token: `[..., D]` to float32 `[..., V]`."""
        scores = jnp.einsum(
            "...d,vd->...v", hidden, self._stored_head().astype(self.dtype), preferred_element_type=jnp.float32
        )
        scale = self._head_scale()
        return scores if scale is None else scores * scale

    def head_matrix(self) -> jax.Array:
        """The output projection `[V, D]`: the embedding where the two are tied; float32 where it is quantised."""
        head, scale = self._stored_head(), self._head_scale()
        return head if scale is None else head * scale[:, None]

    def scores(self, hidden: jax.Array) -> jax.Array:
        """What a reward model says of the text up to each token: `[..., D]` to float32 `[...]`.

        The product is float32 whatever the activations are: rewards are compared, and differ by little.
        """
        assert self.config.scalar_head, "the model has no scalar head"
        return jnp.einsum(
            "...d,d->...",
            hidden.astype(jnp.float32),
            self.score.kernel[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )

    def _stored_head(self) -> jax.Array:
        if self.config.scalar_head:
            raise ValueError("this is a reward model: it scores texts, and has no logits to generate or to learn from")
        return self.embed.embedding[...] if self.config.tie_word_embeddings else self.head.kernel[...]

    def _head_scale(self) -> jax.Array | None:
        if self.config.tie_word_embeddings or self.head.kernel_scale is None:
            return None
        return self.head.kernel_scale[...]

    def _unrolled(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        attend: Attend,
        entries: tuple[Any, ...],
        kept: jax.Array | None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        graph, updated = nnx.split(self.layers[0])[0], []

        @jax.jit
        def run(weights: nnx.State, x: jax.Array, entry: Any, kept: jax.Array | None) -> tuple[jax.Array, Any]:
            return nnx.merge(graph, weights)(x, rotary, attend, entry, kept)

        # All layers call one function, which is traced and lowered once (twice, where the last one keeps fewer tokens);
        # the compiler inlines it.
        keep = [None] * (len(entries) - 1) + [kept]
        for block, entry, of_layer in zip(self.layers, entries, keep, strict=True):
            x, entry = run(nnx.state(block), x, entry, of_layer)
            updated.append(entry)
        return x, tuple(updated)

    def _scan(
        self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend, layout: Layout | None
    ) -> jax.Array:
        graph, stacked = nnx.split(self.layers)

        def place(x: jax.Array) -> jax.Array:
            return x if layout is None else layout.constrain(x, ("batch", "sequence", None))

        def body(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            return place(nnx.merge(graph, weights)(x, rotary, attend, None)[0]), None

        return jax.lax.scan(jax.checkpoint(body) if self.remat else body, place(x), stacked)[0]
