"""DPO and Bradley-Terry against float64 torch, pair by pair, and against what is known of their optimum."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from qwq_jax.config.objective import DpoConfig
from qwq_jax.rl.loss import report
from qwq_jax.rl.preference import PairScores, bradley_terry_loss, count_pairs, dpo_loss, pair_ends, pair_totals

ROW = 24


@pytest.fixture
def packed(rng):
    """Rows of pairs (none in the last), with lengths, a mask with holes, and values that are NaN where none counts."""
    ids = np.zeros((4, ROW), np.int32)
    spans = {}
    for row, pairs in enumerate((3, 1, 2, 0)):
        start = 0
        for segment in range(1, 2 * pairs + 1):
            end = start + int(rng.integers(1, 5))
            ids[row, start:end] = segment
            spans[row, segment] = (start, end)
            start = end
    mask = (rng.random(ids.shape) < 0.7) & (ids > 0)
    values = np.where(mask, rng.standard_normal(ids.shape), np.nan).astype(np.float32)
    return ids, mask, values, spans


def test_totals_and_ends_of_pairs(packed):
    ids, mask, values, spans = packed
    filled = np.where(ids > 0, np.arange(ROW, dtype=np.float32), np.nan)
    totals = pair_totals(jnp.asarray(values), mask=jnp.asarray(mask), segment_ids=jnp.asarray(ids))
    ends = pair_ends(jnp.asarray(filled), segment_ids=jnp.asarray(ids))
    assert totals.chosen.shape == (4, ROW // 2)
    seen = 0
    for (row, segment), (start, end) in spans.items():
        side = "chosen" if segment % 2 else "rejected"
        at = (row, (segment - 1) // 2)
        own = values[row, start:end][mask[row, start:end]]
        assert float(vars(totals)[side][at]) == pytest.approx(own.astype(np.float64).sum(), abs=1e-6)
        assert float(vars(ends)[side][at]) == end - 1
        assert totals.present[at] and ends.present[at]
        seen += 1
    assert seen == 12 and int(totals.present.sum()) == int(ends.present.sum()) == 6
    assert float(count_pairs(jnp.asarray(ids))) == 6.0
    assert float(count_pairs(jnp.asarray(ids.reshape(2, 2, ROW)))) == 6.0
    assert float(count_pairs(jnp.zeros((2, 3), jnp.int32))) == 1.0


def test_a_row_may_be_full_of_pairs():
    ids = jnp.asarray([[1, 2, 3, 4, 4], [1, 1, 2, 2, 2]])
    totals = pair_totals(jnp.ones((2, 5)), mask=jnp.ones((2, 5), bool), segment_ids=ids)
    assert totals.chosen.tolist() == [[1.0, 1.0], [2.0, 0.0]]
    assert totals.rejected.tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert totals.present.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    "config", [DpoConfig(), DpoConfig(beta=0.5, label_smoothing=0.2), DpoConfig(loss="ipo", beta=0.3)], ids=str
)
def test_dpo_is_that_of_its_paper(packed, config, rng):
    """Down to the gradient of every token, through sums over packed rows; NaN outside the mask reaches nothing."""
    ids, mask, values, spans = packed
    ref_values = np.where(mask, rng.standard_normal(ids.shape), np.nan).astype(np.float32)
    leaf = torch.tensor(np.where(mask, values, 0.0), dtype=torch.float64, requires_grad=True)
    counted = leaf * torch.tensor(mask)
    margins, total = [], 0.0
    for row, segment in spans:
        if segment % 2 == 0:
            continue
        (a, b), (c, d) = spans[row, segment], spans[row, segment + 1]
        ref = np.where(mask, ref_values, 0.0).astype(np.float64)
        h = (counted[row, a:b].sum() - ref[row, a:b].sum()) - (counted[row, c:d].sum() - ref[row, c:d].sum())
        margins.append(config.beta * h.item())
        if config.loss == "ipo":
            total += (h - 1 / (2 * config.beta)) ** 2
        else:
            eps = config.label_smoothing
            total -= (1 - eps) * logsigmoid(config.beta * h) + eps * logsigmoid(-config.beta * h)
    total.backward()

    def ours(values):
        sides = [
            pair_totals(x, mask=jnp.asarray(mask), segment_ids=jnp.asarray(ids))
            for x in (values, jnp.asarray(ref_values))
        ]
        terms = dpo_loss(config, policy=sides[0], reference=sides[1])
        return terms.value, terms

    (value, terms), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(jnp.asarray(values))
    assert float(value) == pytest.approx(total.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-6 * np.abs(leaf.grad.numpy()).max() + 1e-7)
    means = report(terms.sums, terms.peaks)
    assert float(terms.sums["count"]) == 6.0
    assert means["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert means["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert means["chosen_reward"] - means["rejected_reward"] == pytest.approx(means["margin"], abs=1e-5)


def test_bradley_terry_is_minus_the_log_likelihood(rng):
    chosen, rejected, margin = rng.standard_normal((3, 2, 5))
    present = np.array([[True] * 5, [True, False, True, False, False]])
    left, right = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (chosen, rejected))
    terms = -logsigmoid(left - right - torch.tensor(margin)) + 0.1 * (left + right) ** 2
    total = terms[torch.tensor(present)].sum()
    total.backward()

    def ours(chosen, rejected):
        scores = PairScores(chosen, rejected, jnp.asarray(present))
        terms = bradley_terry_loss(scores, margin=jnp.asarray(margin, jnp.float32), centring=0.1)
        return terms.value, terms

    known = [jnp.asarray(np.where(present, x, np.nan), jnp.float32) for x in (chosen, rejected)]
    (value, terms), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(*known)
    assert float(value) == pytest.approx(total.item(), rel=1e-5)
    for ours_, theirs in zip(gradients, (left, right), strict=True):
        np.testing.assert_allclose(ours_, theirs.grad.numpy(), atol=1e-6)
    means = report(terms.sums, terms.peaks)
    assert means["accuracy"] == pytest.approx(np.mean((chosen > rejected)[present]))


def pairs(values):
    return jnp.asarray([values], jnp.float32)


def test_the_optimum_of_bradley_terry_is_the_log_odds():
    """Preferred in 8 of 10 cases: the loss is least, its gradient zero, where rewards differ by log(8 / 2)."""

    def loss(better):
        chosen = jnp.stack([better] * 8 + [jnp.zeros(())] * 2)[None]
        rejected = jnp.stack([jnp.zeros(())] * 8 + [better] * 2)[None]
        return bradley_terry_loss(PairScores(chosen, rejected, jnp.ones((1, 10), bool))).value

    gradient = jax.jit(jax.grad(loss))
    assert abs(float(gradient(jnp.float32(math.log(4.0))))) < 1e-5
    assert float(gradient(jnp.float32(1.0))) < -0.1 and float(gradient(jnp.float32(2.0))) > 0.1


def test_dpo_begins_at_log_2_and_ipo_ends_at_its_margin():
    one, zero = jnp.ones((1, 1), bool), jnp.zeros((1, 1))

    def of(config, x):
        reference = PairScores(zero, zero, one)
        return dpo_loss(config, policy=PairScores(jnp.full((1, 1), x), zero, one), reference=reference).value

    sigmoid, squared = DpoConfig(beta=0.2), DpoConfig(loss="ipo", beta=0.2)
    assert float(of(sigmoid, 0.0)) == pytest.approx(math.log(2))
    assert float(jax.grad(lambda x: of(sigmoid, x))(0.0)) == pytest.approx(-0.1)  # -beta / 2
    assert float(of(squared, 2.5)) == 0.0 and float(jax.grad(lambda x: of(squared, x))(2.5)) == 0.0
    # Smoothed, it has an end too: sigmoid(beta h) = 1 - smoothing.
    smoothed = DpoConfig(beta=0.2, label_smoothing=0.1)
    assert float(jax.grad(lambda x: of(smoothed, x))(math.log(9) / 0.2)) == pytest.approx(0.0, abs=1e-6)


def test_far_apart_scores_stay_finite():
    scores = PairScores(pairs([1e4, -1e4]), pairs([-1e4, 1e4]), jnp.ones((1, 2), bool))
    value, gradient = jax.value_and_grad(
        lambda s: bradley_terry_loss(PairScores(s, scores.rejected, scores.present)).value
    )(scores.chosen)
    assert float(value) == pytest.approx(2e4)
    np.testing.assert_allclose(gradient, [[0.0, -1.0]], atol=1e-6)
