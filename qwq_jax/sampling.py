"""From logits to tokens, on the device.

The transforms come in the order of the reference implementation: penalties, biases, what is forbidden, temperature,
top-k, top-p, min-p. Every order of tokens is by logit, of equal ones by id. A token's noise is a function of the row's
seed and position and of the token's id alone, so that a row's token depends neither on its batch mates nor on the mesh.

Where a mesh cuts the vocabulary, each device works on its part and the devices exchange a few numbers a row. Most rows
are drawn from the most likely tokens of each part, the candidates: they hold all that top-k, top-p or min-p leave. A
row that wants more (no cut at all, or a flat distribution) is drawn from the whole vocabulary, a few rows at a time
and only if there are any: the cut is found by bisection over the logits, which needs sums only.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec

from qwq_jax.sharding import Layout

CANDIDATES = 128
"""Enough for the cuts that people ask for of the distributions that trained models give."""
# Of the rows that are drawn from whole: more at once would need memory, fewer of a small vocabulary only turns.
_ROWS_AT_ONCE, _LOGITS_AT_ONCE = 8, 2**16
_COLDEST = 1e-6


class SamplingArrays(NamedTuple):
    """Sampling parameters of each row, all `[...]` of the same shape.

    Attributes:
        temperature: float32; 0 takes the most likely token.
        top_k: int32; 0 is off.
        top_p: float32; 1 is off.
        min_p: float32; 0 is off.
        seed: uint32.
        position: int32, position in its sequence of the token to be drawn.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    position: jax.Array


class Penalties(NamedTuple):
    """What tokens lose for having occurred, and how often they have.

    Attributes:
        presence: `[...]` float32, taken off once, of tokens generated before.
        frequency: `[...]` float32, taken off for each time.
        repetition: `[...]` float32, divides positive logits and multiplies negative ones of tokens of the prompt or
            generated; 1 is off.
        generated: `[..., V]` int32, see `count_tokens`.
        prompted: `[..., V]` bool.
    """

    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    generated: jax.Array
    prompted: jax.Array


class Bias(NamedTuple):
    """What is added to the logits of some tokens: ids `[..., E]` int32, -1 for none, and values `[..., E]` float32."""

    ids: jax.Array
    values: jax.Array


class LogitEdits(NamedTuple):
    """Changes of the logits before a token is drawn; each is None in a program that has none.

    Attributes:
        penalties: For tokens that have occurred.
        bias: For chosen tokens.
        banned: `[..., E]` int32, tokens that must not come; -1 for none.
        allowed: `[..., ceil(V / 32)]` uint32, tokens that may come: token t is bit t % 32 of word t // 32.
    """

    penalties: Penalties | None = None
    bias: Bias | None = None
    banned: jax.Array | None = None
    allowed: jax.Array | None = None


class Sampled(NamedTuple):
    """What `sample` returns.

    Attributes:
        tokens: `[...]` int32.
        logprobs: `[...]` float32, of the drawn token under the unmodified logits (nothing cut), at temperature 1 or at
            the row's own, as `sample` was told.
        top_ids: `[..., num_top]` int32, the most likely tokens under them, most likely first.
        top_logprobs: `[..., num_top]` float32, theirs.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample(
    logits: jax.Array,
    params: SamplingArrays,
    *,
    num_top: int = 0,
    edits: LogitEdits | None = None,
    layout: Layout | None = None,
    candidates: int = CANDIDATES,
    scaled_logprobs: bool = False,
) -> Sampled:
    """Draws one token a row. In a row whose edits leave no token it is token 0.

    Args:
        logits: `[..., V]` float32; with a layout `[R, ..., V]`, R being its replicas.
        params: Arrays `[...]`.
        num_top: How many of the most likely tokens to report; static.
        edits: Changes of the logits that do not show in the reported log-probabilities.
        layout: The mesh that holds the logits; without one the caller's sharding is left to the compiler.
        candidates: Tokens of each part of the vocabulary from which most rows are drawn; static, and changes no token.
        scaled_logprobs: Report log-probabilities at the row's temperature, where that is not 0.
    """
    edits = edits or LogitEdits()
    V = logits.shape[-1]
    draw = functools.partial(_sample, num_top=num_top, count=min(candidates, V), scaled=scaled_logprobs)
    if layout is None:
        return draw(logits, params, edits, part=_Part((), (), V))
    spec = layout.spec(("replica", *[None] * (logits.ndim - 2), "vocab"), logits.shape)
    axes = layout.table["vocab"] if spec[-1] is not None and layout.size("vocab") > 1 else ()
    part = _Part(axes, layout.mesh.axis_names, V // layout.size("vocab") if axes else V)
    row = PartitionSpec(*spec[:-1], None)
    by_name = {"generated": spec, "prompted": spec}
    edit_specs = jax.tree.map_with_path(lambda path, x: by_name.get(path[-1].name, _cut_to(row, x.ndim)), edits)
    each: Any = _cut_to(row, logits.ndim - 1)
    listed: Any = row
    return jax.shard_map(
        functools.partial(draw, part=part),
        mesh=layout.mesh,
        in_specs=(spec, jax.tree.map(lambda x: _cut_to(row, x.ndim), params), edit_specs),
        out_specs=Sampled(each, each, listed, listed),
        check_vma=False,  # every device of a row's group computes the row's token, which the checker cannot see
    )(logits, params, edits)


def count_tokens(ids: jax.Array, vocab: int) -> jax.Array:
    """How often each token occurs: ids `[..., L]` int32, -1 for none, give `[..., vocab]` int32."""
    rows = ids.reshape(-1, ids.shape[-1])
    counts = jnp.zeros((rows.shape[0], vocab), jnp.int32)
    counts = counts.at[_each_row(rows), jnp.where(rows < 0, vocab, rows)].add(1, mode="drop")
    return counts.reshape(*ids.shape[:-1], vocab)


@dataclass(frozen=True)
class _Part:
    """The part of the vocabulary that a device holds, and what it exchanges with those that hold the others.

    Attributes:
        axes: Mesh axes that cut the vocabulary; none where a device holds all of it.
        everywhere: All mesh axes.
        width: Tokens of the part.
    """

    axes: tuple[str, ...]
    everywhere: tuple[str, ...]
    width: int

    @property
    def start(self) -> jax.Array | int:
        """The first token."""
        return jax.lax.axis_index(self.axes) * self.width if self.axes else 0

    @property
    def ids(self) -> jax.Array:
        """The tokens, `[width]` int32."""
        return self.start + jnp.arange(self.width, dtype=jnp.int32)

    def place(self, ids: jax.Array) -> jax.Array:
        """Where tokens lie in the part; `width` for those that do not."""
        local = ids - self.start
        return jnp.where((ids >= 0) & (local >= 0) & (local < self.width), local, self.width)

    def total(self, x: jax.Array) -> jax.Array:
        """Sums the last dimension, `[..., width]`, over all parts."""
        return self.join(jnp.sum(x, axis=-1), jax.lax.psum)

    def greatest(self, x: jax.Array) -> jax.Array:
        """The maximum of the last dimension over all parts."""
        return self.join(jnp.max(x, axis=-1), jax.lax.pmax)

    def first(self, where: jax.Array) -> jax.Array:
        """The lowest token of which `[..., width]` is true, int32; 0 if there is none."""
        found = self.join(jnp.min(jnp.where(where, self.ids, jnp.iinfo(jnp.int32).max), axis=-1), jax.lax.pmin)
        return jnp.where(found == jnp.iinfo(jnp.int32).max, 0, found)

    def join(self, x: jax.Array, collective: Callable[..., jax.Array]) -> jax.Array:
        """Combines what each part found."""
        return collective(x, self.axes) if self.axes else x

    def gather(self, x: jax.Array) -> jax.Array:
        """Puts the parts' `[..., n]` side by side."""
        return jax.lax.all_gather(x, self.axes, axis=x.ndim - 1, tiled=True) if self.axes else x

    def most(self, count: jax.Array) -> jax.Array:
        """The greatest of a scalar on all devices of the mesh, so that all go through the same branches and loops."""
        return jax.lax.pmax(count, self.everywhere) if self.everywhere else count

    def any(self, where: jax.Array) -> jax.Array:
        """Whether it is true anywhere on the mesh."""
        return self.most(jnp.any(where).astype(jnp.int32)) > 0


def _sample(
    logits: jax.Array, params: SamplingArrays, edits: LogitEdits, *, num_top: int, count: int, scaled: bool, part: _Part
) -> Sampled:
    """`sample` on one device: logits `[..., part.width]`, all else of whole rows."""
    shape = logits.shape[:-1]
    flat = logits.reshape(-1, part.width)
    params, edits = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), (params, edits))
    peak = part.greatest(flat)
    divisor = jnp.where(params.temperature > 0, params.temperature, 1) if scaled else jnp.ones_like(peak)
    normaliser = peak / divisor + jnp.log(part.total(jnp.exp((flat - peak[:, None]) / divisor[:, None])))
    edited, untouched = _edit(flat, edits, part), all(x is None for x in edits)
    best = peak if untouched else part.greatest(edited)
    # Reported tokens and candidates are found at once where they are the same.
    top, top_ids = _likeliest(flat, max(num_top, count) if untouched else num_top, part) if num_top else (None, None)
    warm = params.temperature > 0
    greedy = part.first(edited == best[:, None])

    def draw() -> jax.Array:
        if untouched and top is not None and top_ids is not None:
            found = top[:, :count], top_ids[:, :count]
        else:
            found = _candidates(edited, warm & _cuts(params), count, part)
        return jnp.where(warm, _draw(edited, best, *found, params, part), greedy)

    tokens = jax.lax.cond(part.any(warm), draw, lambda: greedy)
    place = part.place(tokens)[:, None]
    chosen = jnp.take_along_axis(flat, jnp.minimum(place, part.width - 1), axis=-1)
    logprobs = part.total(jnp.where(place < part.width, chosen, 0)) / divisor - normaliser
    if top is None or top_ids is None:
        top, top_ids = jnp.zeros((flat.shape[0], 0), jnp.float32), jnp.zeros((flat.shape[0], 0), jnp.int32)
    top_logprobs = (top / divisor[:, None] - normaliser[:, None])[:, :num_top]
    return Sampled(*(x.reshape(*shape, *x.shape[1:]) for x in (tokens, logprobs, top_ids[:, :num_top], top_logprobs)))


def _edit(logits: jax.Array, edits: LogitEdits, part: _Part) -> jax.Array:
    """The edits in their order, on `[n, width]`."""
    if edits.penalties is not None:
        each, occurs = edits.penalties, edits.penalties.generated > 0
        factor = jnp.where(occurs | each.prompted, each.repetition[:, None], 1)
        logits = jnp.where(logits < 0, logits * factor, logits / factor)
        logits = logits - each.frequency[:, None] * each.generated - each.presence[:, None] * occurs
    if edits.bias is not None:
        ids, values = edits.bias
        logits = logits.at[_each_row(ids), part.place(ids)].add(values, mode="drop")
    if edits.banned is not None:
        logits = logits.at[_each_row(edits.banned), part.place(edits.banned)].set(-jnp.inf, mode="drop")
    if edits.allowed is not None:
        logits = jnp.where(_unpack(edits.allowed, part), logits, -jnp.inf)
    return logits


def _unpack(words: jax.Array, part: _Part) -> jax.Array:
    """The bits of this part, `[n, width]` bool, of the mask of the whole vocabulary."""
    needed = part.width // 32 + 2  # the part may begin within a word
    words = jnp.pad(words, ((0, 0), (0, needed)))
    words = jax.lax.dynamic_slice_in_dim(words, part.start // 32, needed, axis=1)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = jax.lax.dynamic_slice_in_dim(bits.reshape(words.shape[0], -1), part.start % 32, part.width, axis=1)
    return bits > 0


def _likeliest(logits: jax.Array, count: int, part: _Part) -> tuple[jax.Array, jax.Array]:
    """The `count` greatest logits of each row with their tokens, `[n, count]`; of equal ones the lowest id is first."""
    values, places = _top(logits, min(count, part.width))
    if not part.axes:
        return values, places
    # The parts lie in the order of their ids, and top_k takes the first of equal ones.
    values, ids = part.gather(values), part.gather(places + part.start)
    values, places = _top(values, count)
    return values, jnp.take_along_axis(ids, places, axis=-1)


def _cuts(params: SamplingArrays) -> jax.Array:
    """Whether a row draws from less than the whole vocabulary."""
    return (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)


def _candidates(logits: jax.Array, wanted: jax.Array, count: int, part: _Part) -> tuple[jax.Array, jax.Array]:
    """`_likeliest`, if any row wants it: candidates never suffice a row that draws from the whole vocabulary."""
    find = lambda: _likeliest(logits, count, part)  # noqa: E731
    if part.axes or count == part.width:  # a collective more would cost what it saves; all tokens do suffice
        return find()
    shape = (logits.shape[0], count)
    return jax.lax.cond(jnp.any(wanted), find, lambda: (jnp.zeros(shape, logits.dtype), jnp.zeros(shape, jnp.int32)))


def _top(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`, behind a barrier: the compiler for CPUs would merge later slices into it and make it a sort."""
    values, places = jax.lax.top_k(x, count)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(places)


def _draw(
    logits: jax.Array, best: jax.Array, values: jax.Array, ids: jax.Array, params: SamplingArrays, part: _Part
) -> jax.Array:
    """A token a row: from the candidates, `[n, C]`, where they suffice, else from all of `[n, width]`."""
    V = part.total(jnp.ones((part.width,), jnp.int32))
    params = params._replace(temperature=jnp.maximum(params.temperature, _COLDEST), top_k=_rank_limit(params.top_k, V))
    best = jnp.where(jnp.isfinite(best), best, 0)  # of a row that has no token left
    nucleus = (params.top_k == V) & (params.top_p < 1)
    mass = jax.lax.cond(
        part.any(nucleus),
        lambda: part.total(_weight(logits, best, params)),
        lambda: jnp.ones_like(best),
    )
    tokens, enough = _draw_from_candidates(values, ids, mass, params, V)
    waiting = ~enough
    order = jnp.argsort(enough, stable=True)  # rows that wait come first
    step = min(max(_ROWS_AT_ONCE, _LOGITS_AT_ONCE // part.width), order.shape[0])

    def some(turn: jax.Array, tokens: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(order, turn * step, step)
        few = jax.tree.map(lambda x: x[rows], params)
        drawn = _draw_from_all(logits[rows], best[rows], few, V, part)
        return tokens.at[rows].set(jnp.where(waiting[rows], drawn, tokens[rows]))

    turns = part.most((jnp.sum(waiting, dtype=jnp.int32) + step - 1) // step)
    if step == order.shape[0]:  # a loop whose turns are all alike would be computed before it, whether it turns or not
        return jax.lax.cond(turns > 0, lambda: some(jnp.zeros_like(turns), tokens), lambda: tokens)
    return jax.lax.fori_loop(0, turns, some, tokens)


def _rank_limit(top_k: jax.Array, V: jax.Array) -> jax.Array:
    return jnp.where(top_k > 0, jnp.minimum(top_k, V), V)


def _weight(logits: jax.Array, best: jax.Array, params: SamplingArrays) -> jax.Array:
    """Probabilities `[n, m]` by that of the most likely token."""
    return jnp.exp((logits - best[:, None]) / params.temperature[:, None])


def _draw_from_candidates(
    values: jax.Array, ids: jax.Array, mass: jax.Array, params: SamplingArrays, V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A token a row, and whether all tokens that the cuts leave were among the candidates, which come by rank.

    `mass` is the sum of all weights in rows with top-p alone.
    """
    C = values.shape[-1]
    best = jnp.where(jnp.isfinite(values[:, 0]), values[:, 0], 0)
    weight = _weight(values, best, params)
    in_top_k = jnp.arange(C) < params.top_k[:, None]
    whole = jnp.where(params.top_k <= C, jnp.sum(jnp.where(in_top_k, weight, 0), axis=-1), mass)
    upto = jnp.cumsum(weight, axis=-1)
    target = (params.top_p * whole)[:, None]
    in_top_p = (upto - weight < target) | (params.top_p >= 1)[:, None]
    likely = weight >= params.min_p[:, None]
    drawn = _gumbel_max(values, ids, in_top_k & in_top_p & likely, params)
    token = jnp.min(jnp.where(drawn == jnp.max(drawn, axis=-1, keepdims=True), ids, V), axis=-1)
    beyond_min_p = ~likely[:, -1]
    # With top-k beyond the candidates the whole that top-p is a part of is not known here.
    known = (params.top_k == V) | (params.top_p >= 1)
    beyond_top_p = (params.top_k == V) & (params.top_p < 1) & (upto[:, -1] >= target[:, 0])
    return jnp.where(token < V, token, 0), (params.top_k <= C) | (known & beyond_min_p) | beyond_top_p


def _draw_from_all(logits: jax.Array, best: jax.Array, params: SamplingArrays, V: jax.Array, part: _Part) -> jax.Array:
    """A token a row from whole rows, `[n, width]`."""
    cut = (params.top_k < V) | (params.top_p < 1)
    weight = _weight(logits, best, params)
    keep = jax.lax.cond(
        part.any(cut),
        lambda: _kept(logits, weight, params, V, part),
        lambda: jnp.ones(logits.shape, bool),
    )
    drawn = _gumbel_max(logits, part.ids, keep & (weight >= params.min_p[:, None]), params)
    return part.first(drawn == part.greatest(drawn)[:, None])


def _kept(logits: jax.Array, weight: jax.Array, params: SamplingArrays, V: jax.Array, part: _Part) -> jax.Array:
    """What top-k and top-p leave of `[n, width]`, bool.

    A cut is the logit of its last token, and how many tokens of just that logit stay. The logit is found bit by bit, by
    the number or the mass of the tokens that are as great; then the id up to which tokens stay, by their number.
    """
    order = _ordered(logits)

    def number(where: jax.Array) -> jax.Array:
        return part.total(where.astype(jnp.int32))

    def above(bound: jax.Array) -> jax.Array:
        return order > bound[:, None]

    def ties(bound: jax.Array) -> jax.Array:
        return order == bound[:, None]

    last_k = _bisect(lambda bound: number(order >= bound[:, None]) >= params.top_k, params.top_k, 32)
    room_k = params.top_k - number(above(last_k))
    each = part.greatest(jnp.where(ties(last_k), weight, 0))
    whole = part.total(jnp.where(above(last_k), weight, 0)) + room_k * each
    target = params.top_p * whole
    last_p = _bisect(
        lambda bound: part.total(jnp.where(order >= bound[:, None], weight, 0)) >= target, params.top_k, 32
    )
    missing = target - part.total(jnp.where(above(last_p), weight, 0))
    each = part.greatest(jnp.where(ties(last_p), weight, 0))
    room_p = jnp.ceil(jnp.minimum(missing / jnp.maximum(each, jnp.finfo(jnp.float32).tiny), V)).astype(jnp.int32)
    room_p = jnp.where(params.top_p < 1, jnp.maximum(room_p, 1), V)
    last_p = jnp.where(params.top_p < 1, last_p, 0)

    last = jnp.maximum(last_k, last_p)
    room = jnp.minimum(jnp.where(last_k == last, room_k, V), jnp.where(last_p == last, room_p, V))
    end = _bisect(lambda end: number(ties(last) & (part.ids < end[:, None])) <= room, params.top_k, 31)
    return above(last) | (ties(last) & (part.ids < end[:, None]))


def _bisect(holds: Callable[[jax.Array], jax.Array], like: jax.Array, bits: int) -> jax.Array:
    """The greatest number of so many bits, one a row, up to which `holds` is true; it is true of 0.

    Of the type of the ids, int32, with 31 bits, else uint32.
    """
    start = jnp.zeros(like.shape, jnp.int32 if bits < 32 else jnp.uint32)

    def one_bit(turn: jax.Array, bound: jax.Array) -> jax.Array:
        larger = bound | (jnp.ones((), bound.dtype) << (bits - 1 - turn).astype(bound.dtype))
        return jnp.where(holds(larger), larger, bound)

    return jax.lax.fori_loop(0, bits, one_bit, start)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 as uint32 of the same order; both zeros are one number."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _gumbel_max(logits: jax.Array, ids: jax.Array, keep: jax.Array, params: SamplingArrays) -> jax.Array:
    """Scores `[n, m]`, the greatest of which is a draw from softmax(logits / temperature) over the kept tokens."""
    noise = _gumbel(params.seed[:, None], params.position[:, None], jnp.broadcast_to(ids, logits.shape))
    return jnp.where(keep, logits / params.temperature[:, None] + noise, -jnp.inf)


def _gumbel(seed: jax.Array, position: jax.Array, ids: jax.Array) -> jax.Array:
    """Noise of each token, finite float32: Threefry with the key (seed, position) and the token as its counter.

    -log(E) is Gumbel if E is exponential. E = -log(1 - u) is exact to 2^-32 where it is small, and there the greatest
    noise among many tokens is decided.
    """
    words = (
        jnp.broadcast_to(word.astype(jnp.uint32), ids.shape) for word in (seed, position, ids, jnp.zeros_like(ids))
    )
    bits: Any = threefry2x32_p.bind(*words)[0]
    u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-u))


def _each_row(x: jax.Array) -> jax.Array:
    return jnp.arange(x.shape[0])[:, None]


def _cut_to(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    return PartitionSpec(*spec[:ndim])
