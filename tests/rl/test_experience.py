"""From groups to packed rows: what counts, what is trained, what stands beside each token, and where it lies."""

import numpy as np
import pytest

from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.rl.experience import RowPlan, advantages_of, gather, segments_of, split
from qwq_jax.train.packing import Segment
from tests.rl.scripted import END, make_group, make_sample, random_groups

GRPO = ObjectiveConfig(name="grpo", kl="none")
DAPO = ObjectiveConfig(name="dapo", uninformative_groups="keep")
LONGEST = 12


def columns_of(experience, seed=0):
    """A column whose values tell completion and token apart."""
    return {"advantages": [100.0 * i + np.arange(n) + 1 for i, n in enumerate(experience.lengths)]}


def segments(experience, objective=GRPO, indices=None, columns=None):
    indices = range(len(experience.samples)) if indices is None else indices
    return segments_of(
        experience, indices, columns=columns or columns_of(experience), objective=objective, longest=LONGEST
    )


def test_completions_lie_side_by_side_and_never_change():
    groups = random_groups(0)
    experience = gather(groups, GRPO)
    assert experience.groups.tolist() == np.repeat(np.arange(6), 4).tolist()
    flat = [(group, sample) for group in groups for sample in group.samples]
    for i, (group, sample) in enumerate(flat):
        tokens, trained = experience.sequence(i)
        prompt, drawn = group.prompt.token_ids, sample.completion.token_ids
        assert tokens.tolist() == [*prompt, *drawn], "token in, token out"
        assert trained.tolist() == [False] * len(prompt) + [
            i not in sample.completion.forced for i in range(len(drawn))
        ]
        assert experience.lengths[i] == len(drawn) - len(sample.completion.forced)
    assert experience.rewards.dtype == np.float64 and 0.7 in experience.rewards and 0.3 in experience.rewards


def test_the_end_is_learnt_once_where_there_is_one():
    """Also where padding and prompt hold the same token: only that of the completion is in the mask."""
    whole, cut = make_sample([5, 6, END], 1.0), make_sample([5, 6, 7], 0.0, index=1)
    experience = gather([make_group(0, whole, cut, prompt=(END, 9, END))], GRPO)
    packed = next(RowPlan.of(parts := segments(experience), row_length=16, rows_per_micro_batch=1).micro_batches(parts))
    learnt = packed.targets[packed.loss_mask]
    assert sorted(learnt.tolist()) == sorted([5, 6, END, 5, 6, 7])
    for number, ends in ((1, 1), (2, 0)):
        own = packed.loss_mask & (packed.segment_ids == number)
        assert (packed.targets[own] == END).sum() == ends


def test_truncated_completions_count_or_not_as_the_objective_says():
    groups = random_groups(1)
    truncated = [sample.reply.truncated for group in groups for sample in group.samples]
    assert 0 < sum(truncated) < len(truncated)
    assert gather(groups, GRPO).kept.all()
    masking = GRPO.model_copy(update={"mask_truncated": True})
    experience = gather(groups, masking)
    assert experience.kept.tolist() == [not cut for cut in truncated]
    kept = segments(experience, masking)
    assert len(kept) == sum(experience.kept) and all(part.tokens[-1] == END for part in kept)
    # The denominator is that of those which are left.
    assert sum(part.columns["weights"].sum() for part in kept) == pytest.approx(1.0)


def test_dropped_groups_are_out_of_the_denominator_and_kept_ones_in_it():
    alike = make_group(0, make_sample([5, END], 0.7), make_sample([6, END], 0.7, index=1))
    telling = make_group(1, make_sample([5, END], 0.0), make_sample([6, END], 0.7, index=1))
    for choice, kept in (("keep", [True] * 4), ("drop", [False, False, True, True]), ("refill", [True] * 4)):
        objective = ObjectiveConfig(name="grpo", kl="none", uninformative_groups=choice)
        experience = gather([alike, telling], objective)
        assert experience.kept.tolist() == kept, choice
        weights = [part.columns["weights"][-1] for part in segments(experience, objective)]
        assert weights == pytest.approx([1 / sum(kept) / 2] * sum(kept))


def test_a_group_that_differs_only_in_what_is_masked_is_dropped_too():
    samples = make_sample([5, END], 0.7), make_sample([6, END], 0.7, index=1), make_sample([6, 7], 0.0, index=2)
    objective = ObjectiveConfig(name="grpo", kl="none", uninformative_groups="drop", mask_truncated=True)
    assert not gather([make_group(0, *samples)], objective).kept.any()


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, 2),
        ({"kl": "k1_reward", "kl_coefficient": 0.1}, 2),
        ({"kl": "k2_loss", "kl_coefficient": 0.1}, 4),
        ({"kl": "k3_loss", "kl_coefficient": 0.1}, 4),
        ({"entropy_coefficient": 0.1}, 4),
        ({"baseline": "critic", "scale": "none"}, 4),
    ],
)
def test_completions_without_a_gradient_are_left_out_where_only_advantages_teach(changes, left):
    alike = make_group(0, make_sample([5, END], 0.7), make_sample([6, END], 0.7, index=1))
    telling = make_group(1, make_sample([5, END], 0.0), make_sample([6, END], 0.7, index=1))
    objective = ObjectiveConfig(**({"name": "grpo", "kl": "none"} | changes))
    experience = gather([alike, telling], objective)
    columns = {"advantages": [np.full(n, 0.0 if i < 2 else 1.0) for i, n in enumerate(experience.lengths)]}
    parts = segments(experience, objective, columns=columns)
    assert len(parts) == left
    # They are in the denominator none the less.
    assert all(part.columns["weights"][part.trained] == pytest.approx(1 / 4 / 2) for part in parts)


def test_columns_stand_at_the_tokens_they_belong_to():
    groups = random_groups(2)
    experience = gather(groups, DAPO)
    flat = [sample for group in groups for sample in group.samples]
    trained = sum(experience.lengths)
    for i, part in enumerate(segments(experience, DAPO)):
        start = len(experience.prompts[i])
        sample = flat[i]
        for at, token in enumerate(sample.completion.token_ids):
            entry = sample.completion.logprobs[at]
            assert part.tokens[start + at] == token == entry.token_id
            drawn = at not in sample.completion.forced
            assert part.trained[start + at] == drawn
            expected = entry.logprob if drawn else 0.0
            assert part.columns["rollout_logp"][start + at] == pytest.approx(expected)
            assert part.columns["weights"][start + at] == pytest.approx(1 / trained if drawn else 0.0)
        assert part.columns["advantages"][part.trained].tolist() == columns_of(experience)["advantages"][i].tolist()
        assert not any(column[~part.trained].any() for column in part.columns.values())


def test_weights_are_those_of_the_completions_of_the_update():
    experience = gather(random_groups(3), GRPO)
    for indices in split(experience, 3):
        parts = segments(experience, GRPO, indices)
        assert len(parts) == len(indices) == 8
        for i, part in zip(indices, parts, strict=True):
            assert part.columns["weights"][part.trained] == pytest.approx(1 / 8 / experience.lengths[i])
            assert part.columns["advantages"][part.trained][0] == 100.0 * i + 1


@pytest.mark.parametrize("parts", [1, 2, 3, 6, 8])
def test_updates_have_whole_groups_and_every_completion_once(parts):
    experience = gather(random_groups(4), GRPO)
    found = split(experience, parts)
    assert len(found) == parts
    assert np.concatenate(found).tolist() == list(range(24))
    for part in found:
        assert all((experience.groups[part] == group).sum() in (0, 4) for group in range(6))


def test_advantages_follow_their_prompts():
    groups = random_groups(5)
    order = [3, 0, 5, 1, 4, 2]
    straight, shuffled = (
        advantages_of(gather(each, GRPO), GRPO, old_logp=None, ref_logp=None).tokens
        for each in (groups, [groups[i] for i in order])
    )
    for place, group in enumerate(order):
        for index in range(4):
            np.testing.assert_array_equal(shuffled[4 * place + index], straight[4 * group + index])
    assert not np.concatenate(straight[20:]).any(), "equal rewards say exactly nothing"
    assert all(np.ptp(tokens) == 0 for tokens in straight), "one advantage a completion"


def test_zero_and_seven_tenths_survive():
    group = make_group(0, make_sample([5, END], 0.0), make_sample([6, END], 0.7, index=1))
    objective = ObjectiveConfig(name="dr_grpo")
    tokens = advantages_of(gather([group], objective), objective, old_logp=None, ref_logp=None).tokens
    np.testing.assert_allclose(np.stack(tokens), [[-0.35] * 2, [0.35] * 2])


def test_a_policy_that_leaves_the_reference_pays_for_it():
    group = make_group(0, make_sample([5, END], 0.5), make_sample([6, 7, END], 0.5, index=1))
    objective = ObjectiveConfig(name="rloo", kl_coefficient=0.1)
    old = [np.array([-1.0, -2.0]), np.array([-1.0, -1.0, -1.0])]
    ref = [np.array([-1.5, -2.5]), np.array([-1.0, -1.0, -1.0])]  # the first is likelier now than it was
    tokens = advantages_of(gather([group], objective), objective, old_logp=old, ref_logp=ref).tokens
    np.testing.assert_allclose(np.concatenate(tokens), [-0.1, -0.1, 0.1, 0.1, 0.1], atol=1e-12)


@pytest.mark.parametrize("rows_per_micro_batch", [1, 3, 8])
def test_unpacking_undoes_packing(rows_per_micro_batch):
    experience = gather(random_groups(6, groups=7), DAPO)
    parts = segments(experience, DAPO)
    plan = RowPlan.of(parts, row_length=24, rows_per_micro_batch=rows_per_micro_batch)
    packed = list(plan.micro_batches(parts))
    assert {each.tokens.shape for each in packed} == {(rows_per_micro_batch, 24)}, "one shape, one program"
    assert len(packed) * rows_per_micro_batch < len(parts), "several in a row"
    for name in ("advantages", "rollout_logp", "weights"):
        unpacked = plan.unpack(parts, (each.columns[name] for each in packed))
        for part, values in zip(parts, unpacked, strict=True):
            np.testing.assert_array_equal(values, part.columns[name][part.trained])
    targets = plan.unpack(parts, (each.targets for each in packed))
    assert [each.tolist() for each in targets] == [part.tokens[part.trained].tolist() for part in parts]
    mask = np.concatenate([each.loss_mask for each in packed])
    assert mask.sum() == sum(experience.lengths)


def test_rows_hold_every_segment_once_and_no_more_than_they_can():
    parts = segments(gather(random_groups(7, groups=9), DAPO), DAPO)
    plan = RowPlan.of(parts, row_length=20, rows_per_micro_batch=4)
    assert sorted(i for row in plan.rows for i in row) == list(range(len(parts)))
    assert max(sum(parts[i].slots for i in row) for row in plan.rows) <= 20
    assert len(plan.rows) % 4 == 0 and sum(not row for row in plan.rows) < 4, "no micro-batch of nothing"
    assert plan == RowPlan.of(parts, row_length=20, rows_per_micro_batch=4)


def test_a_segment_that_fits_exactly_fits():
    part = Segment(np.arange(6, dtype=np.int32), np.arange(6) > 1, {"x": np.arange(6, dtype=np.float32)})
    plan = RowPlan.of([part, part], row_length=5, rows_per_micro_batch=1)
    unpacked = plan.unpack([part, part], (each.columns["x"] for each in plan.micro_batches([part, part])))
    assert [each.tolist() for each in unpacked] == [[2, 3, 4, 5]] * 2
