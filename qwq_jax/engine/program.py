"""The mathematics of a step: tokens through the model and the cache, logits through the sampler.

Three forms.  A *window* draws several tokens of each row, one after another, without the host: what a row draws is its
next input, and a row that draws one of its stop ids, or has spent its budget, is left out of the rest.  A *mixed* step
computes chunks of prompts beside one token of each row.  A *draft* step computes guesses at a row's next tokens at once
and draws at each, for the host to see how far the guesses hold.

The last token of every row stays on the devices (`Carry`), so that a step can be prepared before the tokens of the one
before it are known.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.engine.arrays import arrays_of
from qwq_jax.engine.step import MAX_TOP_LOGPROBS, EngineShape, Program
from qwq_jax.kernels.attention import Implementation
from qwq_jax.logprobs import top_logprobs
from qwq_jax.model.attention import PagedBatch, paged_attend
from qwq_jax.model.layers import Attend, take_tokens
from qwq_jax.model.transformer import Transformer
from qwq_jax.sampling import Bias, LogitEdits, Penalties, Sampled, SamplingArrays, count_tokens, sample
from qwq_jax.sharding import Layout

Arrays = Mapping[str, jax.Array]


class Carry(NamedTuple):
    """What the devices know of each row `[R, max_sequences]` and the host may not: its last token, whether it goes on.

    Attributes:
        token: int32.
        alive: bool.
    """

    token: jax.Array
    alive: jax.Array


class Outcome(NamedTuple):
    """What goes back to the host; see `StepResult`."""

    decode: Sampled
    prefill: Sampled | None = None
    scored: Sampled | None = None


class Step(NamedTuple):
    """One program on one mesh: everything but the arrays.

    Attributes:
        layout: The mesh.
        shape: The engine's sizes.
        program: This step's.
        attention: How its tokens see the cache.
    """

    layout: Layout
    shape: EngineShape
    program: Program
    attention: Implementation = Implementation.AUTO

    def run(self, model: Transformer, cache: Any, carry: Carry, packed: jax.Array) -> tuple[Any, Carry, Outcome]:
        """Carries the step out; `packed` is `[R, n]` int32, see `arrays.pack`."""
        arrays = _unpack(packed, self.shape, self.program)
        form = self._draft if self.program.drafts else self._mixed if self.program.prefill_tokens else self._window
        return form(model, cache, carry, arrays)

    def _window(self, model: Transformer, cache: Any, carry: Carry, arrays: Arrays) -> tuple[Any, Carry, Outcome]:
        D, window = self.program.decode_rows, self.shape.decode_window
        token, going, budget = _start(carry, arrays)
        generated = self._generated(arrays)
        sampled = jax.eval_shape(lambda: self._sample(model, self._no_hidden(model, D), arrays, generated, 0))
        out = jax.tree.map(lambda x: jnp.zeros((window, *x.shape), x.dtype), sampled)

        def more(state: Any) -> jax.Array:
            i, _, going, *_ = state
            return (i < jnp.max(arrays["steps"])) & jnp.any(going & (i < budget))

        def advance(state: Any) -> Any:
            i, token, going, generated, out, cache = state
            active = going & (i < budget)
            position = arrays["position"] + i
            hidden, cache = self._decode(model, cache, token, position, jnp.where(active, position + 1, 0), arrays)
            drawn = self._sample(model, hidden, arrays, generated, position + 1)
            out = jax.tree.map(lambda all, new: all.at[i].set(new), out, drawn)
            token = jnp.where(active, drawn.tokens, token)
            going &= ~(active & _ends(drawn.tokens, arrays["stop_ids"]))
            return i + 1, token, going, _count(generated, drawn.tokens, active), out, cache

        state = (jnp.int32(0), token, going, generated, out, cache)
        # A window of one is no loop: see docs/benchmarks/decode_step.md for what a loop costs on tpu7x.
        final = advance(state) if window == 1 else jax.lax.while_loop(more, advance, state)
        _, token, going, _, out, cache = final
        carry = Carry(*(all.at[:, :D].set(new) for all, new in zip(carry, (token, going), strict=True)))
        return cache, carry, Outcome(jax.tree.map(lambda x: x.swapaxes(0, 1), out))

    def _mixed(self, model: Transformer, cache: Any, carry: Carry, arrays: Arrays) -> tuple[Any, Carry, Outcome]:
        D, Tp = self.program.decode_rows, self.program.prefill_tokens
        token, going, budget = _start(carry, arrays)
        active = going & (budget > 0)
        positions = jnp.concatenate([arrays["position"], arrays["prompt_position"]], axis=1)
        kv_length = jnp.concatenate([jnp.where(active, arrays["position"] + 1, 0), arrays["prompt_length"]], axis=1)
        rows = jnp.broadcast_to(jnp.arange(D, dtype=jnp.int32), token.shape)
        query_start = jnp.concatenate([rows, D + arrays["prompt_start"]], axis=1)
        batch = PagedBatch(arrays["page_table"], kv_length, query_start, positions)
        tokens = jnp.concatenate([token, arrays["prompt_token"]], axis=1)
        last = jnp.concatenate([rows, jnp.maximum(D + arrays["prompt_start"][:, 1:] - 1, 0)], axis=1)
        attend = self._attend(model, cache, batch, decode_rows=D, max_query=Tp)
        scores = self.program.score  # then the hidden states of all of the prompts' tokens are wanted
        hidden, cache = model(tokens, positions, attend, cache, kept=None if scores else last)
        sampled_hidden = take_tokens(hidden, last) if scores else hidden
        drawn_at = jnp.concatenate([arrays["position"] + 1, arrays["prompt_length"]], axis=1)
        drawn = self._sample(model, sampled_hidden, arrays, self._generated(arrays), drawn_at)
        ended = _ends(drawn.tokens, arrays["stop_ids"])
        token = jnp.where(active, drawn.tokens[:, :D], token)
        carry = Carry(carry.token.at[:, :D].set(token), carry.alive.at[:, :D].set(going & ~(active & ended[:, :D])))
        into = jnp.where(arrays["into"] < 0, carry.token.shape[1], arrays["into"])  # beyond the rows: nowhere
        put = jax.vmap(lambda all, index, new: all.at[index].set(new, mode="drop"))
        carry = Carry(put(carry.token, into, drawn.tokens[:, D:]), put(carry.alive, into, ~ended[:, D:]))
        decode = jax.tree.map(lambda x: x[:, None, :D], drawn)
        scored = self._score(model, hidden[:, D:], arrays["target"]) if scores else None
        return cache, carry, Outcome(decode, jax.tree.map(lambda x: x[:, D:], drawn), scored)

    def _draft(self, model: Transformer, cache: Any, carry: Carry, arrays: Arrays) -> tuple[Any, Carry, Outcome]:
        batch = PagedBatch(arrays["page_table"], arrays["kv_length"], arrays["query_start"], arrays["flat_position"])
        attend = self._attend(model, cache, batch, decode_rows=0, max_query=1 + self.program.drafts)
        hidden, cache = model(arrays["flat_token"], arrays["flat_position"], attend, cache)
        row = arrays["flat_row"]
        per_token = {name: _of_rows(x, row) for name, x in arrays.items() if name in _BY_ROW}
        drawn = self._sample(model, hidden, {**arrays, **per_token}, None, arrays["flat_position"] + 1)
        # The host decides how far the guesses hold, and says what comes next: nothing is carried over.
        return cache, carry, Outcome(drawn)

    def _decode(
        self,
        model: Transformer,
        cache: Any,
        token: jax.Array,
        position: jax.Array,
        kv_length: jax.Array,
        arrays: Arrays,
    ) -> tuple[jax.Array, Any]:
        D = token.shape[1]
        query_start = jnp.broadcast_to(jnp.arange(D + 1, dtype=jnp.int32), (token.shape[0], D + 1))
        batch = PagedBatch(arrays["page_table"], kv_length, query_start, position)
        return model(token, position, self._attend(model, cache, batch, decode_rows=D, max_query=0), cache)

    def _attend(self, model: Transformer, cache: Any, batch: PagedBatch, *, decode_rows: int, max_query: int) -> Attend:
        return paged_attend(
            self.layout,
            batch,
            decode_rows=decode_rows,
            max_query=max_query,
            heads=model.config.num_heads,
            layer=cache[0],
            implementation=self.attention,
        )

    def _no_hidden(self, model: Transformer, rows: int) -> jax.Array:
        return jnp.zeros((self.shape.replicas, rows, model.config.hidden_size), model.dtype)

    def _sample(
        self, model: Transformer, hidden: jax.Array, arrays: Arrays, generated: jax.Array | None, position: Any
    ) -> Sampled:
        """Draws the tokens at `position` `[R, S]` from the hidden states before them `[R, S, D]`."""
        position = jnp.broadcast_to(position, hidden.shape[:2])
        params = SamplingArrays(
            **{name: arrays[name] for name in SamplingArrays._fields if name != "position"}, position=position
        )
        num_top = MAX_TOP_LOGPROBS if self.program.top else 0
        edits = self._edits(arrays, generated, position)
        return sample(
            model.logits(hidden),
            params,
            num_top=num_top,
            edits=edits,
            layout=self.layout,
            scaled_logprobs=self.shape.scaled_logprobs,
        )

    def _edits(self, arrays: Arrays, generated: jax.Array | None, position: jax.Array) -> LogitEdits | None:
        program = self.program
        if not (program.bias or program.history or program.floor or program.mask):
            return None
        penalties = None
        if program.history:
            assert generated is not None
            prompted = self._counts(arrays, lambda at, size: at < size) > 0
            penalties = Penalties(arrays["presence"], arrays["frequency"], arrays["repetition"], generated, prompted)
        bias = Bias(arrays["bias_ids"], arrays["bias_values"]) if program.bias else None
        early = (position < arrays["floor"])[..., None] if program.floor else None
        banned = None if early is None else jnp.where(early, arrays["stop_ids"], -1)
        return LogitEdits(penalties, bias, banned, arrays["allowed"] if program.mask else None)

    def _generated(self, arrays: Arrays) -> jax.Array | None:
        """How often each row has drawn each token, `[R, S, V]`; None where no row looks back."""
        return self._counts(arrays, lambda at, size: at >= size) if self.program.history else None

    def _counts(self, arrays: Arrays, chosen: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        at = jnp.arange(self.program.history)
        ids = jnp.where(chosen(at, arrays["prompt_size"][..., None]), arrays["history"], -1)
        counts = count_tokens(ids, self.shape.vocab_size)
        return self.layout.constrain(counts, ("replica", None, "vocab"))

    def _score(self, model: Transformer, hidden: jax.Array, target: jax.Array) -> Sampled:
        """Log-probabilities `[R, Tp]` of given tokens, and of the likeliest in their place."""
        logprobs, ids, top = top_logprobs(hidden, model.head_matrix(), target, num_top=MAX_TOP_LOGPROBS)
        return Sampled(target, logprobs, ids, top)


# Arrays with one entry a sampled row.
_BY_ROW = frozenset({"temperature", "top_k", "top_p", "min_p", "seed", "stop_ids", "bias_ids", "bias_values", "floor"})


def _start(carry: Carry, arrays: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first token of each decode row, whether it goes on, and its budget."""
    told = arrays["token"] >= 0
    token, alive = (jnp.take_along_axis(x, arrays["origin"], axis=1, mode="clip") for x in carry)
    return jnp.where(told, arrays["token"], token), told | alive, arrays["budget"]


def _ends(tokens: jax.Array, stop_ids: jax.Array) -> jax.Array:
    return jnp.any(tokens[..., None] == stop_ids[:, : tokens.shape[1]], axis=-1)


def _count(generated: jax.Array | None, tokens: jax.Array, active: jax.Array) -> jax.Array | None:
    if generated is None:
        return None
    add = jax.vmap(jax.vmap(lambda counts, token, one: counts.at[token].add(one)))
    return add(generated, tokens, active.astype(generated.dtype))


def _of_rows(array: jax.Array, row: jax.Array) -> jax.Array:
    """Entries `[R, S, ...]` of each flat token's row `[R, T]`."""
    index = row.reshape(*row.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


def _unpack(packed: jax.Array, shape: EngineShape, program: Program) -> dict[str, jax.Array]:
    arrays: dict[str, jax.Array] = {}
    begin = 0
    for name, (extent, dtype) in arrays_of(shape, program).items():
        size = math.prod(extent)
        part = packed[:, begin : begin + size].reshape(-1, *extent)
        arrays[name] = part if dtype is np.int32 else jax.lax.bitcast_convert_type(part, dtype)
        begin += size
    return arrays
