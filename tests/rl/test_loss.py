"""Losses and gradients equal the formulas of the papers, in float64 torch, on random ragged batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.rl.loss import MAX_LOG_RATIO, PolicyTokens, kl_terms, policy_loss, report, value_loss
from tests.rl import papers
from tests.rl.samples import alone, assert_same, make_batch, ours, pack, segments_of

# float32: a log-probability of 5 is known to 5e-7, a ratio of e^1 to about 1e-6, sums are of a hundred such terms.
FLOAT32 = 5e-6


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", papers.PAPERS)
def test_each_objective_is_that_of_its_paper(name, seed):
    samples = make_batch(seed)
    value, gradients, terms = ours(ObjectiveConfig(name=name), samples)
    assert_same((value, gradients), papers.paper(papers.PAPERS[name], samples), FLOAT32)
    means = report(terms.sums, terms.peaks)
    assert name == "gspo" or 0.02 < means["rollout_capped"] < 0.5
    if name not in ("rloo", "cispo"):
        assert means["clip_low"] > 0.02 and means["clip_high"] > 0.02, "the batch must reach the bounds"


SWITCHES = {
    "two-sided clip": ({"delta": 1.3}, {"delta": 1.3}),
    "k2": ({"kl": "k2_loss"}, {"kl": papers.k2}),
    "no KL": ({"kl": "none"}, {"beta": 0.0}),
    "a KL that is only measured": ({"kl_coefficient": 0}, {"beta": 0.0}),
    "entropy": ({"entropy_coefficient": 0.3}, {"entropy": 0.3}),
    "no correction": ({"rollout_correction": "none"}, {"cap": None}),
    "a lower cap": ({"rollout_cap": 1.1}, {"cap": 1.1}),
    "clip-higher": ({"clip_low": 0.05, "clip_high": 0.4}, {"low": 0.05, "high": 0.4}),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_changes_what_it_says(name):
    switch, theirs = SWITCHES[name]
    samples = make_batch(2)
    value, gradients, _ = ours(ObjectiveConfig(name="grpo", **switch), samples)
    expected = papers.paper(papers.grpo, samples, **theirs)
    assert_same((value, gradients), expected, FLOAT32)
    plain = papers.paper(papers.grpo, samples)
    assert max(np.abs(a - b).max() for a, b in zip(expected[1], plain[1], strict=True)) > 1e-4


def test_reinforce_with_a_baseline_of_the_group_is_a_matter_of_switches():
    """REINFORCE++ with baseline (arXiv 2501.03262): group mean, scaled over the batch, k2 in the loss."""
    samples = make_batch(3)
    switches = {"baseline": "group_mean", "kl": "k2_loss", "kl_coefficient": 0.02}

    def form(policy, samples):
        raw = {}
        for i, s in enumerate(samples):
            for t in s.places:
                raw[i, t] = s.reward - np.mean(papers.group_of(samples, i))
        values = np.array(list(raw.values()))
        total = 0.0
        for (i, t), value in raw.items():
            s, logp = samples[i], policy.logp(i, t)
            gain = papers.clipped(papers.exp(logp - s.old[t]), (value - values.mean()) / (values.std() + papers.EPS))
            total += papers.tis(s, t, 2.0) * gain - 0.02 * papers.k2(logp, s.ref[t])
        return -total / len(raw)

    value, gradients, _ = ours(ObjectiveConfig(name="reinforce++", **switches), samples)
    assert_same((value, gradients), papers.paper(form, samples), FLOAT32)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "dr_grpo", "rloo", "reinforce++", "ppo"])
def test_in_the_only_update_of_a_batch_old_log_probabilities_are_the_present_ones(name):
    """Ratio 1, nothing clipped, and the gradient is REINFORCE's: weight x advantage x gradient of log p."""
    samples = make_batch(4)
    for s in samples:
        s.old[s.places] = papers.Policy([s]).tables[0].detach().numpy()[s.places - 1, s.tokens[s.places]]
    config = ObjectiveConfig(name=name, entropy_coefficient=0)
    given = ours(config, samples)
    implied = ours(config, samples, old_logp=None)
    assert_same(implied[:2], given[:2], FLOAT32)
    means = report(implied[2].sums, implied[2].peaks)
    assert means["ratio"] == 1.0 and means["max_log_ratio"] == 0.0 and means["clip_low"] == means["clip_high"] == 0.0


def test_what_is_reported_is_what_happened():
    samples = make_batch(5)
    config = ObjectiveConfig(name="grpo", delta=1.25)
    _, _, terms = ours(config, samples)
    means = report(terms.sums, terms.peaks)
    policy = papers.Policy(samples)
    rows = []
    for i, s in enumerate(samples):
        for t in s.places:
            rows.append(
                [policy.logp(i, t).item(), s.old[t], s.rollout[t], s.ref[t], papers.grpo_advantage(samples, i)]
                + [policy.entropy(i, t).item()]
            )
    logp, old, rollout, ref, advantage, entropy = np.array(rows).T
    ratio, mismatch, gap = np.exp(logp - old), np.exp(old - rollout), np.abs(old - rollout)
    expected = {
        "ratio": ratio.mean(),
        "clip_low": np.mean((ratio < 0.8) & (advantage < 0)),
        "clip_high": np.mean((ratio > 1.2) & (advantage > 0)),
        "clip_delta": np.mean((ratio > 1.25) & (advantage < 0)),
        "update_kl": np.mean(ratio - 1 - np.log(ratio)),
        "reference_kl": np.mean(np.exp(ref - logp) - 1 - (ref - logp)),
        "entropy": entropy.mean(),
        "rollout_gap": gap.mean(),
        "rollout_ratio": mismatch.mean(),
        "rollout_capped": np.mean(mismatch > 2),
        "rollout_sample_size": mismatch.sum() ** 2 / (mismatch**2).sum() / len(mismatch),
        "max_log_ratio": np.abs(logp - old).max(),
        "max_rollout_gap": gap.max(),
    }
    assert means.keys() == expected.keys()
    assert means == pytest.approx(expected, rel=2e-5)
    assert all(value > 0 for value in expected.values())
    assert float(terms.sums["count"]) == len(rows)


def test_a_gradient_ends_where_the_ratio_is_beyond_its_bounds():
    """Advantage +1 above 1 + clip_high, and -1 below 1 - clip_low: nothing; the other way round: everything."""
    config = ObjectiveConfig(name="grpo", kl="none", rollout_correction="none", delta=2.5)
    logp, advantages, one = (np.zeros((16, 32), np.float32) for _ in range(3))
    logp[0, :6] = np.log([1.5, 0.5, 1.5, 0.5, 3.0, 1.0])
    advantages[0, :6] = [1.0, -1.0, -1.0, 1.0, -1.0, 1.0]
    one[0, :6] = 1.0
    weights, ids = jnp.asarray(one), jnp.asarray(one, jnp.int32)
    tokens = PolicyTokens(weights > 0, ids, jnp.asarray(advantages), weights, old_logp=jnp.zeros((16, 32)))
    gradient = jax.grad(lambda x: policy_loss(config, logp=x, entropy=0 * x, tokens=tokens).value)(jnp.asarray(logp))
    np.testing.assert_allclose(gradient[0, :6], [0.0, 0.0, 1.5, -0.5, 0.0, -1.0], atol=1e-6)


@pytest.mark.parametrize("name", papers.PAPERS)
def test_slots_that_are_not_trained_may_hold_anything(name):
    """NaN in padding, prompts and holes, and other neighbours in the row: the same loss and gradients."""
    samples = make_batch(6)
    config = ObjectiveConfig(name=name)
    packed, _ = pack(segments_of(config, samples))
    clean = ours(config, samples)
    dirty = {column: jnp.where(packed.loss_mask, value, jnp.nan) for column, value in packed.columns.items()}
    poisoned = ours(config, samples, **dirty)
    assert poisoned[0] == clean[0]
    for left, right in zip(poisoned[1], clean[1], strict=True):
        np.testing.assert_array_equal(left, right)
    assert_same(ours(config, samples, layout=alone)[:2], clean[:2], 1e-6)


@pytest.mark.parametrize("name", papers.PAPERS)
def test_absurd_ratios_stay_finite(name):
    samples = make_batch(7)
    for i, s in enumerate(samples):
        s.old[:] = (-200.0, 0.0)[i % 2]
        s.logits[:] = (0.0, 200.0)[i % 2] * np.eye(s.logits.shape[1])[0]
        s.rollout[:] = s.ref[:] = -100.0
    value, gradients, terms = ours(ObjectiveConfig(name=name), samples)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert all(np.isfinite(x) for x in report(terms.sums, terms.peaks).values())
    assert float(terms.peaks["log_ratio"]) > MAX_LOG_RATIO


# KL estimators. Over all words of a small categorical the expectation is a sum, so nothing is left to chance.


def expected_gradient(form, logits, ref):
    """Average over words drawn from softmax(logits) of the gradient of `form`; in float64 by torch."""
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    value = form(torch.log_softmax(logits, -1), torch.tensor(ref))
    value.backward()
    return logits.grad.numpy()


def gradient_of_estimator(estimator, logits, ref):
    p = np.exp(logits - np.logaddexp.reduce(logits))

    def average(x):
        return jnp.sum(p * estimator(jax.nn.log_softmax(x), jnp.asarray(ref)))

    return np.asarray(jax.grad(average)(jnp.asarray(logits)))


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("seed", range(3))
def test_the_gradients_of_kl_estimators(seed):
    rng = np.random.default_rng(seed)
    logits, other = rng.standard_normal((2, 9))
    ref = other - np.logaddexp.reduce(other)
    reverse = expected_gradient(lambda p, q: (p.exp() * (p - q)).sum(), logits, ref)
    forward = expected_gradient(lambda p, q: (q.exp() * (q - p)).sum(), logits, ref)
    of = lambda name: gradient_of_estimator(lambda p, q: kl_terms(name, p, q), logits, ref)  # noqa: E731
    scale = np.abs(reverse).max()
    np.testing.assert_allclose(of("k2"), reverse, atol=2e-6 * scale)
    np.testing.assert_allclose(of("k3"), forward, atol=2e-6 * np.abs(forward).max())
    assert cosine(of("k2"), reverse) > 0.99999 and 0.3 < cosine(of("k3"), reverse) < 0.99
    # k1 as a loss would average to nothing; in the reward it multiplies the gradient of log p, and is exact.
    assert np.abs(gradient_of_estimator(lambda p, q: p - q, logits, ref)).max() < 1e-6
    in_reward = gradient_of_estimator(lambda p, q: jax.lax.stop_gradient(p - q) * p, logits, ref)
    np.testing.assert_allclose(in_reward, reverse, atol=2e-6 * scale)


def test_kl_estimates_agree_on_the_value():
    rng = np.random.default_rng(4)
    logp, ref = (np.log(rng.dirichlet(np.full(9, 20.0))) for _ in range(2))
    true = float(np.sum(np.exp(logp) * (logp - ref)))
    of = lambda name: float(np.sum(np.exp(logp) * np.asarray(kl_terms(name, jnp.asarray(logp), jnp.asarray(ref)))))  # noqa: E731
    assert of("k3") == pytest.approx(true, rel=1e-5)  # unbiased
    assert of("k2") == pytest.approx(true, rel=0.2)  # to second order


def test_the_kl_of_policies_that_hardly_differ_is_not_lost():
    """Half the square of 1e-4 is 5e-9, below what float32 resolves beside 1; k3 is never negative."""
    apart = np.array([1e-4, -1e-4, 1e-3, 0.0], np.float32)
    ours_ = np.asarray(kl_terms("k3", jnp.asarray(apart), jnp.zeros(4)))
    np.testing.assert_allclose(ours_, np.expm1(-apart.astype(np.float64)) + apart, rtol=2e-3)


# The critic.


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_the_critics_loss_is_that_of_ppo(clip):
    samples = make_batch(8)
    config = ObjectiveConfig(name="ppo", value_clip=clip)
    returns = {}
    segments = segments_of(config, samples)
    for i, s in enumerate(samples):
        rewards = [-0.02 * (s.old[t] - s.ref[t]) for t in s.places]
        rewards[-1] += s.reward
        old = [s.old_values[t] for t in s.places]
        for t, advantage in zip(s.places, papers.gae(rewards, old, 1.0, 0.95), strict=True):
            returns[i, t] = advantage + s.old_values[t]
    leaves = [torch.tensor(s.values, dtype=torch.float64, requires_grad=True) for s in samples]
    total = 0.0
    for (i, t), target in returns.items():
        value, old = leaves[i][t], samples[i].old_values[t]
        error = (value - target) ** 2
        if clip:
            error = torch.maximum(error, (torch.clamp(value, old - clip, old + clip) - target) ** 2)
        total += error / 2
    total = total / len(returns)
    total.backward()

    packed, places = pack(segments)
    rows = {name: np.zeros(packed.tokens.shape, np.float32) for name in ("values", "old_values", "returns")}
    for i, (s, (row, start)) in enumerate(zip(samples, places, strict=True)):
        span = slice(start, start + len(s.tokens) - 1)
        rows["values"][row, span], rows["old_values"][row, span] = s.values[1:], s.old_values[1:]
        for t in s.places:
            rows["returns"][row, start + t - 1] = returns[i, t]
    mask = jnp.asarray(packed.loss_mask)

    def ours_of(values):
        known = {"old_values": rows["old_values"], "returns": rows["returns"], "weights": packed.columns["weights"]}
        terms = value_loss(values, **{k: jnp.asarray(v) for k, v in known.items()}, mask=mask, clip=clip)
        return terms.value, terms

    (value, terms), gradient = jax.value_and_grad(ours_of, has_aux=True)(jnp.asarray(rows["values"]))
    assert float(value) == pytest.approx(total.item(), rel=1e-5)
    for s, leaf, (row, start) in zip(samples, leaves, places, strict=True):
        own = np.asarray(gradient)[row, start : start + len(s.tokens) - 1]
        np.testing.assert_allclose(own, leaf.grad.numpy()[1:], atol=1e-6)
    means = report(terms.sums, terms.peaks)
    truth = np.array([returns[i, t] for i, t in returns])
    said = np.array([samples[i].values[t] for i, t in returns])
    assert means["explained_variance"] == pytest.approx(1 - np.mean((said - truth) ** 2) / truth.var(), rel=1e-4)
    assert means["value"] == pytest.approx(said.mean(), rel=1e-4)
    assert (means["value_clip"] > 0.1) == bool(clip)
