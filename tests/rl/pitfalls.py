"""What goes wrong in others' losses, as checks of a piece of code; each raises AssertionError if it goes wrong there.

`code` holds the modules ``advantage``, ``loss``, ``packing`` and ``logprobs``: ours, or a copy with a mistake in it.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.sharding import make_mesh, train_layout
from qwq_jax.train.batch import place_batch
from qwq_jax.train.packing import Segment
from qwq_jax.train.step import accumulate_gradients
from tests.rl import papers
from tests.rl.samples import (
    VOCABULARY,
    alone,
    assert_same,
    log_softmax,
    make_batch,
    make_sample,
    ours,
    pack,
    policy_tokens,
    segments_of,
    token_values,
)

FLOAT32 = 5e-6
ON_POLICY = 1e-4  # largest log-ratio between float64 and our float32 of the same logits; measured 1e-6


def check_on_policy(code, temperature):
    """Before the first update the trainer says what the rollout said: ratio 1, nothing clipped, nothing capped."""
    rng = np.random.default_rng(0)
    samples = make_batch(1)
    head = rng.standard_normal((VOCABULARY, 8))
    hidden = [rng.standard_normal((len(s.logits), 8)) for s in samples]
    for s, h in zip(samples, hidden, strict=True):
        logp = log_softmax(h @ head.T / temperature)  # as a sampler at this temperature
        s.old[1:] = s.rollout[1:] = logp[np.arange(len(h)), s.tokens[1:]]
    config = ObjectiveConfig(name="dapo")
    packed, places = pack(segments_of(config, samples, code), code=code)
    rows = np.zeros((*packed.tokens.shape, 8), np.float32)
    for h, (row, start) in zip(hidden, places, strict=True):
        rows[row, start : start + len(h)] = h
    logp, entropy = code.logprobs.token_logprobs(
        jnp.asarray(rows), jnp.asarray(head, jnp.float32), jnp.asarray(packed.targets), temperature=temperature
    )
    for changes in ({}, {"old_logp": None}):
        tokens = policy_tokens(packed, code, **changes)
        terms = code.loss.policy_loss(config, logp=logp, entropy=entropy, tokens=tokens)
        means = code.loss.report(terms.sums, terms.peaks)
        assert means["max_log_ratio"] < ON_POLICY and means["max_rollout_gap"] < ON_POLICY
        assert abs(means["ratio"] - 1) < ON_POLICY and abs(means["rollout_ratio"] - 1) < ON_POLICY
        assert means["clip_low"] == means["clip_high"] == means["rollout_capped"] == 0.0
        assert means["rollout_sample_size"] > 1 - ON_POLICY


def rollout_means(code, trainer, engine, counts):
    """Reports of a batch in which token ``i`` was drawn ``counts[i]`` times."""
    drawn = np.repeat(np.arange(len(counts)), counts)
    values = lambda p: jnp.asarray(np.log(p)[drawn][None], jnp.float32)  # noqa: E731
    one = jnp.ones((1, len(drawn)))
    tokens = code.loss.PolicyTokens(
        mask=one > 0, segment_ids=one.astype(int), advantages=one, weights=one, rollout_logp=values(engine)
    )
    terms = code.loss.policy_loss(ObjectiveConfig(name="dapo"), logp=values(trainer), entropy=one, tokens=tokens)
    return code.loss.report(terms.sums, terms.peaks)


def check_support(code):
    """The mean importance ratio is 1 whatever trainer and engine are, and the kept mass where top-k cut the rest."""
    trainer = np.array([0.5, 0.3, 0.1, 0.1])
    whole = rollout_means(code, trainer, np.array([1, 2, 3, 4]) / 10, [1, 2, 3, 4])
    assert abs(whole["rollout_ratio"] - 1.0) < 1e-6, "E[ratio] is 1"
    assert whole["rollout_sample_size"] < 0.8 and whole["rollout_capped"] == 0.1
    cut = rollout_means(code, trainer, np.array([5, 3, 1e-9, 1e-9]) / 8, [5, 3, 0, 0])
    assert abs(cut["rollout_ratio"] - 0.8) < 1e-6, "the mass of the two tokens kept"


def check_pad_is_end(code, pad=3):
    """Where padding and end are one token, a finished completion still learns to end, once, and a cut one does not."""
    rng = np.random.default_rng(2)
    samples = [make_sample(rng, reward=float(i % 2)) for i in range(8)]
    for i, s in enumerate(samples):
        s.tokens[s.tokens == pad] = pad + 1
        s.tokens[-1] = pad if i < 5 else pad + 1  # five that ended, three that ran into the limit
    config = ObjectiveConfig(name="dapo", uninformative_groups="keep")
    segments = segments_of(config, samples, code)
    packed, places = pack(segments, pad=pad, code=code)
    for i, (s, (row, start)) in enumerate(zip(samples, places, strict=True)):
        own = slice(start, start + len(s.tokens) - 1)
        ends = packed.loss_mask[row, own] & (packed.targets[row, own] == pad)
        assert ends.sum() == (1 if i < 5 else 0)
    assert packed.loss_mask.sum() == sum(s.length for s in samples)
    results = [
        ours(config, samples, layout=lambda segments, code, p=p: pack(segments, pad=p, code=code), code=code)[:2]
        for p in (pad, 0)
    ]
    assert results[0][0] == results[1][0]
    assert_same(results[0], papers.paper(papers.dapo, samples), FLOAT32)


def check_left_out(code, name):
    """A batch with completions that are left out is the batch without them: gradients, and the denominator too."""
    samples = make_batch(3)
    left_out = [replace(s, kept=i % 3 != 1) for i, s in enumerate(samples)]
    config = ObjectiveConfig(name=name, mask_truncated=True)
    value, gradients, terms = ours(config, left_out, code=code)
    kept = [s for s in left_out if s.kept]
    alone_value, alone_gradients, alone_terms = ours(config, kept, code=code)
    assert not any(g.any() for g, s in zip(gradients, left_out, strict=True) if not s.kept)
    of_kept = [g for g, s in zip(gradients, left_out, strict=True) if s.kept]
    assert_same((value, of_kept), (alone_value, alone_gradients), 1e-6)
    assert float(terms.sums["count"]) == float(alone_terms.sums["count"])
    assert_same((value, of_kept), papers.paper(papers.PAPERS[name], kept), FLOAT32)


def table_gradients(code, config, packed, *, accumulation=1, devices=1):
    """Loss and gradient of a table of logits, by the micro-batches and devices of training."""
    layout = train_layout(make_mesh(MeshConfig(data=devices)))
    table = jax.random.normal(jax.random.key(3), (VOCABULARY, VOCABULARY))

    def loss(params, batch):
        logp, entropy = token_values(params["table"][batch.tokens], batch.targets, 1.0)
        terms = code.loss.policy_loss(config, logp=logp, entropy=entropy, tokens=code.loss.policy_tokens(batch))
        return terms.value, terms.sums

    batch = place_batch(packed, accumulation=accumulation, layout=layout)
    run = jax.jit(lambda params, batch: accumulate_gradients(loss, params, batch, denominator=jnp.float32(1.0)))
    gradients = run({"table": table}, batch)
    return float(gradients.value), [np.asarray(gradients.params["table"])], float(gradients.means["count"])


def check_split(code, name, *, accumulation=1, devices=1):
    """However ragged completions are spread over micro-batches and devices, the gradient is the same."""
    samples = make_batch(4, groups=8)
    config = ObjectiveConfig(name=name)
    packed, _ = pack(segments_of(config, samples, code), row_length=16, rows=32, code=code)
    counts = packed.loss_mask.reshape(2, -1).sum(axis=1)
    assert counts[0] > 1.5 * counts[1] > 0, "parts of equal weight would hide it"
    whole = table_gradients(code, config, packed)
    parts = table_gradients(code, config, packed, accumulation=accumulation, devices=devices)
    assert_same(parts[:2], whole[:2], 2e-6)
    assert parts[2] == whole[2] == packed.loss_mask.sum()
    # The whole is right too: the table gathers what the logits of each token receive, by the token before it.
    for s in samples:
        s.logits = np.asarray(jax.random.normal(jax.random.key(3), (VOCABULARY, VOCABULARY)))[s.tokens[:-1]]
    value, by_token = papers.paper(papers.PAPERS[name], samples, temperature=1.0)
    table = np.zeros((VOCABULARY, VOCABULARY))
    for s, gradient in zip(samples, by_token, strict=True):
        np.add.at(table, s.tokens[:-1], gradient)
    assert_same(whole[:2], (value, [table]), FLOAT32)


def check_groups(code):
    """Advantages follow completions wherever they stand; equal rewards say exactly nothing; 0.0 and 0.7 survive."""
    rng = np.random.default_rng(5)
    groups = np.repeat([4, 9, 2], 4)
    rewards = np.array([0.0, 0.7, 0.7, 0.0, *[0.1] * 4, 0.7, 1.0, 0.3, 0.3])
    order = rng.permutation(12)
    for baseline in ("group_mean", "leave_one_out"):
        for scale in ("none", "group_std"):
            of = lambda r, g, b=baseline, s=scale: code.advantage.group_advantages(r, g, baseline=b, scale=s)  # noqa: E731
            straight = of(rewards, groups)
            np.testing.assert_array_equal(of(rewards[order], groups[order]), straight[order])
            assert not straight[4:8].any(), "equal rewards"
            assert (straight[:4] != 0).all() and abs(straight[0] + straight[1]) < 1e-12
            three = of([0.7, 0.7, 0.7], [0, 0, 0]), of([0.1] * 49, [0] * 49)
            assert not np.concatenate(three).any()
    np.testing.assert_allclose(code.advantage.group_advantages([0.0, 0.7], [0, 0], scale="none"), [-0.35, 0.35])
    assert code.advantage.is_informative([0.0, 0.7]) and not code.advantage.is_informative([0.7, 0.7])


def check_kl(code):
    """Over all words of a small categorical: the gradient of k2 is that of KL(p, ref), of k3 that of KL(ref, p)."""
    rng = np.random.default_rng(6)
    logits, other = rng.standard_normal((2, 9))
    logp, ref = log_softmax(logits), log_softmax(other)
    p, q = np.exp(logp), np.exp(ref)
    reverse = p * (logp - ref - np.sum(p * (logp - ref)))  # d KL(p, ref) / d logits
    forward = p - q  # d KL(ref, p) / d logits
    for name, analytic, agreement in (("k2", reverse, 0.99999), ("k3", forward, 0.99999)):

        def average(x, name=name):
            return jnp.sum(p * code.loss.kl_terms(name, jax.nn.log_softmax(x), jnp.asarray(ref, jnp.float32)))

        ours_ = np.asarray(jax.grad(average)(jnp.asarray(logits, jnp.float32)))
        assert ours_ @ analytic / np.linalg.norm(ours_) / np.linalg.norm(analytic) > agreement
        np.testing.assert_allclose(ours_, analytic, atol=2e-6)
    terms = np.asarray(code.loss.kl_terms("k3", jnp.asarray(logp), jnp.asarray(ref)))
    assert terms.min() >= 0.0


def check_packing(code, name):
    """Packed, alone, or beside another neighbour: the same loss and gradient for each completion, holes and all."""
    samples = make_batch(7)
    config = ObjectiveConfig(name=name)
    assert any((np.diff(s.places) > 1).any() for s in samples), "a mask with a hole"
    segments = segments_of(config, samples, code)
    packed, _ = pack(segments, code=code)
    assert packed.segment_ids.max() > 2
    together = ours(config, samples, code=code)[:2]
    assert_same(together, ours(config, samples, layout=alone, code=code)[:2], 1e-6)
    assert_same(together, papers.paper(papers.PAPERS[name], samples), FLOAT32)
    beside = [neighbour_changed(config, segments, seed, code) for seed in (0, 1)]
    for left, right in zip(*beside, strict=True):
        np.testing.assert_array_equal(left, right)


def neighbour_changed(config, segments, seed, code):
    """Gradients of two segments with respect to their log-probabilities, with another between them."""
    rng = np.random.default_rng(seed)
    other = Segment(
        rng.integers(0, VOCABULARY, 9).astype(np.int32),
        np.arange(9) > 2,
        {name: rng.standard_normal(9).astype(np.float32) for name in segments[0].columns},
    )
    row = [segments[0], other, segments[1]]
    packed = code.packing.fill_rows([row], row_length=64)
    tokens = policy_tokens(packed, code)
    noise = np.random.default_rng(9).standard_normal((3, 64)).astype(np.float32)
    logp = np.zeros((1, 64), np.float32)
    for number in (1, 2, 3):
        at = packed.segment_ids[0] == number
        logp[0, at] = noise[number - 1, : at.sum()] + (seed if number == 2 else 0)

    def value(x):
        return code.loss.policy_loss(config, logp=x, entropy=jnp.zeros_like(x), tokens=tokens).value

    gradient = np.asarray(jax.grad(value)(jnp.asarray(logp)))[0]
    return [gradient[packed.segment_ids[0] == number] for number in (1, 3)]


def check_paper(code, name, **switches):
    """The loss and gradient of the paper; `switches` are those of its function and of the config alike."""
    samples = make_batch(8)
    form, config = papers.PAPERS[name], ObjectiveConfig(name=name, **switches)
    renamed = {"delta": "delta", "entropy_coefficient": "entropy"}
    options = {renamed[key]: value for key, value in switches.items()}
    value, gradients, _ = ours(config, samples, code=code)
    assert_same((value, gradients), papers.paper(form, samples, **options), FLOAT32)
