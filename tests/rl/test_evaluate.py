"""pass@k and maj@k against every subset, intervals against SciPy and by how often they cover the truth."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from qwq_jax.rl.evaluate import (
    ALL,
    Estimate,
    JudgedTask,
    Sample,
    compare,
    evaluate,
    majority_at_k,
    mean_interval,
    paired_interval,
    pass_at_k,
    share_interval,
    student_95,
)


def subsets(items, k):
    return list(itertools.combinations(items, k))


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(count):
    for k in range(1, count + 1):
        expected = [
            np.mean([any(subset) for subset in subsets([i < right for i in range(count)], k)])
            for right in range(count + 1)
        ]
        np.testing.assert_allclose(pass_at_k(np.arange(count + 1), count, k), expected, atol=1e-14)


def test_pass_at_k_of_many_samples_stays_exact():
    """Binomial coefficients of such numbers do not fit a float64; the product does."""
    right = np.array([0, 1, 7, 500, 1000])
    exact = [1 - math.comb(1000 - int(c), 300) / math.comb(1000, 300) for c in right]
    np.testing.assert_allclose(pass_at_k(right, 1000, 300), exact, rtol=1e-12)


def test_pass_at_k_is_unbiased():
    """1 - (1 - p)^k on average over c; the plug-in estimate with c / n falls short of it."""
    p, count, k = 0.2, 10, 4
    chances = scipy.stats.binom.pmf(np.arange(count + 1), count, p)
    assert chances @ pass_at_k(np.arange(count + 1), count, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert chances @ (1 - (1 - np.arange(count + 1) / count) ** k) < 1 - (1 - p) ** k - 0.01


def brute_majority(votes, k):
    """Over all subsets, the share of the ties that "right" wins; None does not vote."""
    wins = []
    for subset in subsets(votes, k):
        counts = Counter(vote for vote in subset if vote is not None)
        best = [vote for vote, count in counts.items() if count == max(counts.values())]
        wins.append(1 / len(best) if "right" in best else 0.0)
    return float(np.mean(wins))


@pytest.mark.parametrize(
    ("right", "wrong", "abstained"),
    [(3, [2, 2, 1], 0), (1, [1, 1, 1, 1], 2), (4, [4], 0), (2, [5], 1), (5, [], 3), (0, [3, 2], 1), (3, [3, 3], 0)],
)
def test_majority_at_k_is_the_mean_over_all_subsets(right, wrong, abstained):
    votes: list[str | None] = ["right"] * right + [None] * abstained
    votes += [f"wrong {i}" for i, size in enumerate(wrong) for _ in range(size)]
    for k in range(1, len(votes) + 1):
        assert majority_at_k(right, wrong, abstained, k) == pytest.approx(brute_majority(votes, k), abs=1e-12)


def test_majority_at_k_of_random_votes(rng):
    for _ in range(30):
        count = int(rng.integers(2, 11))
        votes = [None if v == 4 else "right" if v == 0 else f"wrong {v}" for v in rng.integers(0, 5, count).tolist()]
        sizes = Counter(votes)
        right, abstained = sizes.pop("right", 0), sizes.pop(None, 0)
        k = int(rng.integers(1, count + 1))
        found = majority_at_k(right, list(sizes.values()), abstained, k)
        assert found == pytest.approx(brute_majority(votes, k), abs=1e-12)


def test_majority_of_many_samples_agrees_with_drawing_them(rng):
    right, wrong, abstained, k = 40, [35, 20, 5, *[1] * 20], 8, 33
    votes = np.repeat(np.arange(len(wrong) + 2), [right, *wrong, abstained])
    wins = []
    for _ in range(4000):
        drawn = np.bincount(rng.permutation(votes)[:k], minlength=len(wrong) + 2)[:-1]
        best = np.flatnonzero(drawn == drawn.max())
        wins.append((0 in best) / len(best))
    assert majority_at_k(right, wrong, abstained, k) == pytest.approx(np.mean(wins), abs=4 * 0.5 / math.sqrt(4000))


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 7), (7, 7), (61, 128), (1, 1)])
def test_one_sample_a_task_has_wilsons_interval(right, count):
    expected = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
    found = share_interval(np.array([1.0] * right + [0.0] * (count - right)))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.value == right / count


def test_samples_of_a_task_count_as_far_as_they_differ():
    """Tasks that are always or never solved: 8 samples say no more than one. Tasks all alike: 8 times as much."""
    certain = np.array([1.0] * 30 + [0.0] * 20)
    assert share_interval(certain, blocks=8) == share_interval(certain)
    alike = share_interval(np.full(200, 0.5), blocks=8)
    expected = scipy.stats.binomtest(800, 1600).proportion_ci(method="wilson")
    assert (alike.low, alike.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_all_solved_is_no_certainty():
    found = share_interval(np.ones(20), blocks=8)
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx(scipy.stats.binomtest(20, 20).proportion_ci(method="wilson").low)


POPULATIONS = {
    "spread": lambda rng, shape: rng.beta(0.5, 0.5, shape),
    "middling": lambda rng, shape: rng.beta(2, 2, shape),
    "mostly hard": lambda rng, shape: rng.beta(0.3, 3, shape),
    "all alike": lambda rng, shape: np.full(shape, 0.5),
    "4 % cannot be solved": lambda rng, shape: np.where(rng.random(shape) < 0.04, 0.0, 0.995),
}


def covered(rng, name, tasks, samples, runs=600):
    """How often the interval holds the mean of the population that tasks were drawn from."""
    truth = POPULATIONS[name](rng, 400_000).mean()
    shares = rng.binomial(samples, POPULATIONS[name](rng, (runs, tasks))) / samples
    found = [share_interval(row, blocks=samples) for row in shares]
    return np.mean([each.low <= truth <= each.high for each in found])


@pytest.mark.parametrize("name", POPULATIONS)
def test_intervals_of_shares_cover_the_truth(rng, name):
    """95 % less what 600 runs leave to chance (three standard errors), for few tasks and for more."""
    for tasks, samples in ((30, 1), (30, 8), (120, 4)):
        assert covered(rng, name, tasks, samples) > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 600)


@pytest.mark.parametrize("samples", [1, 8])
def test_intervals_of_differences_cover_the_truth_and_are_narrow(rng, samples):
    before = rng.beta(0.5, 0.5, (600, 100))
    after = before + 0.3 * (1 - before)
    x, y = (rng.binomial(samples, chance) / samples for chance in (before, after))
    truth = 0.15  # 0.3 (1 - E[p]) with E[p] = 1/2
    found = [paired_interval(a, b, blocks=(samples, samples)) for a, b in zip(x, y, strict=True)]
    assert np.mean([each.low <= truth <= each.high for each in found]) > 0.95 - 0.027
    width = np.mean([each.high - each.low for each in found])
    alone = np.mean([share_interval(a, blocks=samples).high - share_interval(a).low for a in x])
    assert width < (1.15 if samples == 1 else 0.65) * alone


def test_a_difference_of_unrelated_tasks_is_the_square_and_add_of_both():
    """Newcombe's interval for independent samples; two orthogonal columns have no correlation."""
    before, after = np.array([0.0, 0.0, 1.0, 1.0] * 5), np.array([0.0, 1.0, 0.0, 1.0] * 5)
    one = scipy.stats.binomtest(10, 20).proportion_ci(method="wilson")
    half = math.hypot(0.5 - one.low, one.high - 0.5)
    found = paired_interval(before, after)
    assert (found.value, found.low, found.high) == pytest.approx((0.0, -half, half), abs=1e-9)


def test_nothing_changed_where_everything_was_solved_is_no_certainty_either():
    found = paired_interval(np.ones(20), np.ones(20))
    assert found.value == 0 and -0.2 < found.low < -0.1 and 0.1 < found.high < 0.2


def test_means_have_students_interval(rng):
    for count in (2, 3, 7, 9, 40):
        values = rng.normal(3.0, 2.0, count)
        expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        found = mean_interval(values)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=2e-3)
    assert mean_interval(np.array([2.0])) == Estimate(2.0)
    for freedom in range(1, 40):
        assert student_95(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=1e-3)


def judged(task_id, marks, source="a", votes=True):
    """Samples by letters: R right, W and V two wrong answers, N no answer, ? nobody says."""
    samples = [Sample(float(m == "R"), None if m == "?" else m == "R", None if m == "N" else m, 10) for m in marks]
    return JudgedTask(task_id, source, tuple(samples), votes)


def test_a_table_by_source():
    tasks = [judged("1", "RRWW"), judged("2", "RWVN"), judged("3", "WWWW", "b"), judged("4", "RRRR", "b", votes=False)]
    total, a, b = evaluate(tasks, [4, 1, 2, 2]).rows
    assert (total.source, a.source, b.source) == (ALL, "a", "b")
    assert (total.tasks, a.tasks, b.tasks, total.samples) == (4, 2, 2, 4)
    assert list(total.measures) == ["pass@1", "pass@2", "pass@4", "avg@4", "maj@2", "maj@4", "reward"]
    values = {name: estimate.value for name, estimate in total.measures.items()}
    assert values["pass@1"] == values["avg@4"] == values["reward"] == pytest.approx(7 / 16)
    assert values["pass@2"] == pytest.approx((5 / 6 + 1 / 2 + 0 + 1) / 4)
    assert values["pass@4"] == pytest.approx(3 / 4)
    # The fourth task's answers cannot vote: a third of what is left.
    assert values["maj@4"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert b.measures["maj@4"].value == 0.0 and b.measures["pass@4"].value == 0.5
    assert total.tokens == 10.0 and total.truncated == 0.0


def test_a_right_answer_is_one_answer_however_it_is_written():
    samples = (Sample(1, True, "1/2"), Sample(1, True, "0.5"), Sample(0, False, "2"), Sample(0, False, "3"))
    task = JudgedTask("1", "", samples, votes=True)
    assert evaluate([task], [4]).total.measures["maj@4"].value == 1.0


def test_what_no_reward_judges_is_left_out():
    tasks = [judged("1", "RW"), judged("2", "??", "chat")]
    total, a, chat = evaluate(tasks, [1, 2]).rows
    assert list(chat.measures) == ["reward"]
    assert total.measures["avg@2"] == a.measures["avg@2"] and total.measures["avg@2"].value == 0.5
    assert total.measures["reward"].value == 0.25


def test_an_improvement_is_counted_on_the_tasks_that_both_have():
    before = [judged("1", "RWWW"), judged("2", "WWWW", "b"), judged("gone", "WWWW"), judged("chat", "????", "c")]
    after = [judged("new", "RRRR"), judged("2", "RRWW", "b"), judged("1", "RRRR"), judged("chat", "????", "c")]
    gains = compare(before, after, [1, 4])
    assert list(gains) == [ALL, "a", "b", "c"]
    assert gains[ALL]["avg@4"].value == pytest.approx((0.75 + 0.5) / 2)
    assert gains[ALL]["pass@4"].value == pytest.approx(0.5)
    assert gains[ALL]["reward"].value == pytest.approx((0.75 + 0.5 + 0) / 3)
    assert gains["b"]["avg@4"].value == pytest.approx(0.5) and list(gains["c"]) == ["reward"]
    assert gains[ALL]["avg@4"].low < gains[ALL]["avg@4"].value < gains[ALL]["avg@4"].high


@pytest.mark.parametrize(
    ("tasks", "ks", "sentence"),
    [
        ([], [1], "there is no task to evaluate"),
        ([judged("1", "RR"), judged("2", "R")], [1], "task '2' has 1 samples where task '1' has 2"),
        ([judged("1", "RR")], [3], "k = 3 is not between 1 and the number of samples, 2"),
        ([judged("1", "RR")], [0], "k = 0 is not between"),
        ([judged("1", "")], [], "expected from 1 to 1000 samples of a task, got 0"),
    ],
)
def test_what_cannot_be_evaluated_is_said(tasks, ks, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(tasks, ks)


def test_nothing_in_common_is_said():
    with pytest.raises(ValueError, match="no task in common"):
        compare([judged("1", "R")], [judged("2", "R")], [1])
