"""Random ragged batches for the losses: per completion for references, and packed in rows as training packs them.

The policy of the tests is a softmax with a logit of its own for every token of every sequence, so gradients with
respect to logits show what each token receives.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax import logprobs
from qwq_jax.rl import advantage, loss
from qwq_jax.train import packing
from qwq_jax.train.packing import Segment, plan_rows

VOCABULARY = 7
LONGEST = 16
TEMPERATURE = 0.6

# What is tested: a copy of it with a mistake in it must not pass.
CODE = SimpleNamespace(advantage=advantage, loss=loss, packing=packing, logprobs=logprobs)


@dataclass
class Sample:
    """A prompt and a completion of ``n`` tokens together; arrays ``[n]`` are given at the token they belong to."""

    tokens: np.ndarray
    trained: np.ndarray
    logits: np.ndarray  # [n - 1, V]: row t - 1 predicts token t
    old: np.ndarray
    rollout: np.ndarray
    ref: np.ndarray
    values: np.ndarray
    old_values: np.ndarray
    reward: float
    group: int
    kept: bool = True
    extra: dict = field(default_factory=dict)

    @property
    def places(self) -> np.ndarray:
        return np.flatnonzero(self.trained)

    @property
    def length(self) -> int:
        return int(self.trained.sum())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def make_sample(rng, *, group=0, reward=0.0, noise=0.3, length=None, temperature=TEMPERATURE) -> Sample:
    """One sequence, with a hole in its mask if it is long enough (a second turn of the user)."""
    prompt = int(rng.integers(1, 4))
    n = prompt + (length or int(rng.integers(1, 13)))
    tokens = rng.integers(0, VOCABULARY, n).astype(np.int32)
    trained = np.arange(n) >= prompt
    if n - prompt > 5:
        trained[prompt + 2 : prompt + 4] = False
    logits = rng.standard_normal((n - 1, VOCABULARY))
    logp = np.concatenate([[0.0], log_softmax(logits / temperature)[np.arange(n - 1), tokens[1:]]])
    near = lambda scale: logp + scale * rng.standard_normal(n)  # noqa: E731
    old = near(noise)
    return Sample(
        tokens=tokens,
        trained=trained,
        logits=logits,
        old=old,
        rollout=old + 2 * noise * rng.standard_normal(n),
        ref=near(0.5),
        values=rng.standard_normal(n),
        old_values=rng.standard_normal(n),
        reward=reward,
        group=group,
    )


def make_batch(seed=0, *, groups=4, size=4, noise=0.3, **options) -> list[Sample]:
    """Groups of completions, shuffled among each other; the rewards of the last group are equal."""
    rng = np.random.default_rng(seed)
    samples = []
    for group in range(groups):
        rewards = rng.choice([0.0, 0.3, 0.7, 1.0], size)
        rewards[:2] = (0.0, 0.7)
        if group == groups - 1:
            rewards[:] = 0.7
        samples += [make_sample(rng, group=10 * group, reward=float(r), noise=noise, **options) for r in rewards]
    return [samples[i] for i in rng.permutation(len(samples))]


def advantages_of(config, samples, code=CODE):
    """Advantages and weights, as the loop computes them."""
    kept = np.array([s.kept for s in samples])
    lengths = [s.length for s in samples]
    advantages = code.advantage.token_advantages(
        config,
        rewards=[s.reward for s in samples],
        groups=[s.group for s in samples],
        lengths=lengths,
        log_ratios=[(s.old - s.ref)[s.trained] for s in samples],
        values=[s.old_values[s.trained] for s in samples],
        kept=kept,
    )
    return advantages, code.advantage.token_weights(config.aggregation, lengths, kept=kept, longest=LONGEST)


def segments_of(config, samples, code=CODE) -> list[Segment]:
    """Sequences with the columns that `policy_tokens` reads."""
    advantages, weights = advantages_of(config, samples, code)
    segments = []
    for sample, by_token, weight in zip(samples, advantages.tokens, weights, strict=True):
        columns = {
            "advantages": code.advantage.to_column(by_token, sample.trained),
            "weights": code.advantage.to_column(weight, sample.trained),
            "old_logp": sample.old.astype(np.float32),
            "rollout_logp": sample.rollout.astype(np.float32),
            "ref_logp": sample.ref.astype(np.float32),
        }
        segments.append(Segment(sample.tokens, sample.trained & sample.kept, columns))
    return segments


def pack(segments, *, row_length=32, rows=16, pad=0, code=CODE):
    """Rows as training packs them, and where each sequence lies: (row, first slot)."""
    plan = plan_rows([s.slots for s in segments], row_length=row_length)
    assert len(plan) <= rows
    plan += [[]] * (rows - len(plan))
    places = {}
    for r, row in enumerate(plan):
        start = 0
        for index in row:
            places[index] = (r, start)
            start += segments[index].slots
    packed = code.packing.fill_rows([[segments[i] for i in row] for row in plan], row_length=row_length, pad=pad)
    return packed, [places[i] for i in range(len(segments))]


def alone(segments, *, row_length=32, code=CODE):
    """A row for each sequence."""
    packed = code.packing.fill_rows([[segment] for segment in segments], row_length=row_length)
    return packed, [(i, 0) for i in range(len(segments))]


def token_values(logits, targets, temperature):
    """Log-probabilities and entropies, in JAX."""
    logp = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, -1)


def policy_tokens(packed, code=CODE, **changes):
    known = {name: jnp.asarray(value) for name, value in packed.columns.items()} | changes
    return code.loss.PolicyTokens(
        mask=jnp.asarray(packed.loss_mask), segment_ids=jnp.asarray(packed.segment_ids), **known
    )


def scatter(values, places, shape):
    """Per-sequence arrays ``[n - 1, ...]`` at their slots in rows."""
    rows = np.zeros((*shape, *values[0].shape[1:]), np.float32)
    for value, (row, start) in zip(values, places, strict=True):
        rows[row, start : start + len(value)] = value
    return rows


def gather(rows, places, lengths):
    return [np.asarray(rows)[row, start : start + n] for (row, start), n in zip(places, lengths, strict=True)]


def ours(config, samples, *, layout=pack, code=CODE, temperature=TEMPERATURE, **changes):
    """The loss, its gradient with respect to the logits of each sequence, and what it reports."""
    packed, places = layout(segments_of(config, samples, code), code=code)
    logits = jnp.asarray(scatter([s.logits for s in samples], places, packed.tokens.shape))
    tokens = policy_tokens(packed, code, **changes)

    def value(logits):
        logp, entropy = token_values(logits, jnp.asarray(packed.targets), temperature)
        terms = code.loss.policy_loss(config, logp=logp, entropy=entropy, tokens=tokens)
        return terms.value, terms

    (total, terms), gradient = jax.value_and_grad(value, has_aux=True)(logits)
    return float(total), gather(gradient, places, [len(s.logits) for s in samples]), terms


def assert_same(left, right, tolerance):
    """Equal losses, and gradients whose largest difference is small beside the largest gradient."""
    assert abs(left[0] - right[0]) <= tolerance * max(1.0, abs(right[0])), (left[0], right[0])
    scale = max(np.abs(g).max() for g in right[1])
    assert scale > 0
    for ours_, theirs in zip(left[1], right[1], strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=0, atol=tolerance * scale)
