"""The pitfalls of losses, and that each check finds the mistake it is there for."""

import inspect
import types
from types import SimpleNamespace

import pytest

from tests.rl import papers, pitfalls
from tests.rl.samples import CODE


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_on_policy_the_ratio_is_1(temperature):
    pitfalls.check_on_policy(CODE, temperature)


def test_a_cut_support_shows_in_the_mean_ratio():
    pitfalls.check_support(CODE)


def test_padding_that_is_the_end_token_is_not_learnt():
    pitfalls.check_pad_is_end(CODE)


@pytest.mark.parametrize("name", papers.PAPERS)
def test_completions_left_out_are_out_of_the_denominator_too(name):
    pitfalls.check_left_out(CODE, name)


# Micro-batches, devices.
@pytest.mark.parametrize(("accumulation", "devices"), [(4, 1), (2, 8)])
def test_micro_batches_and_devices_do_not_change_gradients(accumulation, devices):
    pitfalls.check_split(CODE, "gspo", accumulation=accumulation, devices=devices)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("accumulation", "devices"), [(2, 1), (8, 1), (1, 2), (1, 4), (1, 8)])
def test_no_number_of_micro_batches_or_devices_changes_gradients(accumulation, devices):
    pitfalls.check_split(CODE, "gspo", accumulation=accumulation, devices=devices)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(papers.PAPERS.keys() - {"gspo"}))
@pytest.mark.parametrize(("accumulation", "devices"), [(8, 1), (1, 8), (2, 4)])
def test_no_objective_depends_on_micro_batches_or_devices(name, accumulation, devices):
    pitfalls.check_split(CODE, name, accumulation=accumulation, devices=devices)


def test_groups_are_groups():
    pitfalls.check_groups(CODE)


def test_kl_estimators_pull_the_right_way():
    pitfalls.check_kl(CODE)


@pytest.mark.parametrize("name", papers.PAPERS)
def test_a_neighbour_in_the_row_changes_nothing(name):
    pitfalls.check_packing(CODE, name)


# Mistakes: module, what is there, what is put in its place, the check that has to fail, its arguments.
RATIO_OF_ROW = "jnp.full(ids.shape, jnp.sum(total) / jnp.maximum(jnp.sum(count), 1.0))"
MISTAKES = {
    # 1. Trainer and rollout.
    "temperature is missing from the trainer": (
        "logprobs",
        "preferred_element_type=jnp.float32) / temperature",
        "preferred_element_type=jnp.float32)",
        (pitfalls.check_on_policy, 0.6),
    ),
    "old log-probabilities are no constant": (
        "loss",
        "old_logp = jax.lax.stop_gradient(logp) if tokens.old_logp is None",
        "old_logp = logp * 0.99 if tokens.old_logp is None",
        (pitfalls.check_on_policy, 1.0),
    ),
    # 2. Support.
    "the ratio of rollout to trainer is upside down": (
        "loss",
        "gap = old_logp - _within(tokens.mask, tokens.rollout_logp)",
        "gap = _within(tokens.mask, tokens.rollout_logp) - old_logp",
        (pitfalls.check_support,),
    ),
    # 4. Padding and end.
    "the mask is where tokens are not padding": (
        "packing",
        "packed.loss_mask[r, start:end] = segment.trained[1:]",
        "packed.loss_mask[r, start:end] = segment.trained[1:] & (segment.tokens[1:] != pad)",
        (pitfalls.check_pad_is_end,),
    ),
    # 5. What is left out.
    "the denominator counts what is left out": (
        "advantage",
        "number = max(int(counted.sum()), 1)",
        "number = max(len(counts), 1)",
        (pitfalls.check_left_out, "grpo"),
    ),
    "the denominator counts tokens left out": (
        "advantage",
        "max(counts[counted].sum(), 1.0)",
        "max(counts.sum(), 1.0)",
        (pitfalls.check_left_out, "dapo"),
    ),
    "what is left out is in the baseline": (
        "advantage",
        "        if kept[index]:\n",
        "        if True:\n",
        (pitfalls.check_left_out, "dr_grpo"),
    ),
    "what is left out is in the mean over the batch": (
        "advantage",
        "zip(tokens, kept, strict=True) if keep]",
        "zip(tokens, kept, strict=True)]",
        (pitfalls.check_left_out, "ppo"),
    ),
    # 6. Means of means.
    "each micro-batch has a denominator of its own": (
        "loss",
        "value=jnp.sum(_within(mask, weights * terms))",
        "value=jnp.sum(_within(mask, weights * terms)) / jnp.sum(weights)",
        (pitfalls.check_split, "gspo", 2),
    ),
    # 7. Groups.
    "rewards are integers": (
        "advantage",
        "    values = np.asarray(rewards, np.float64)\n    if",
        "    values = np.asarray(rewards, np.float64).astype(np.int32)\n    if",
        (pitfalls.check_groups,),
    ),
    "equal rewards leave a rounding error": (
        "advantage",
        "        if is_informative(own):\n",
        "        if len(own) > 1:\n",
        (pitfalls.check_groups,),
    ),
    "a group is four neighbours": (
        "advantage",
        "members.setdefault(group, [])",
        "members.setdefault(index // 4, [])",
        (pitfalls.check_groups,),
    ),
    # 8. KL.
    "k1 is a loss": ("loss", "return 0.5 * jnp.square(log_ratio)", "return log_ratio", (pitfalls.check_kl,)),
    "k3 is upside down": (
        "loss",
        "return jnp.expm1(_bounded(-log_ratio)) + log_ratio",
        "return jnp.expm1(_bounded(log_ratio)) - log_ratio",
        (pitfalls.check_kl,),
    ),
    # 9. Packing.
    "the ratio of a sequence is that of its row": (
        "loss",
        "(total / jnp.maximum(count, 1.0))[ids]",
        RATIO_OF_ROW,
        (pitfalls.check_packing, "gspo"),
    ),
    "prompt and holes count in the length": (
        "loss",
        "segment_sum(mask.astype(values.dtype), ids, segments)",
        "segment_sum(jnp.ones_like(values), ids, segments)",
        (pitfalls.check_packing, "gspo"),
    ),
    "columns belong to inputs rather than to targets": (
        "packing",
        "packed.columns[name][r, start:end] = values[1:]",
        "packed.columns[name][r, start:end] = values[:-1]",
        (pitfalls.check_packing, "grpo"),
    ),
    "values are put at the token before": (
        "advantage",
        "column[trained] = values",
        "column[np.roll(trained, -1)] = values",
        (pitfalls.check_packing, "ppo"),
    ),
    # The formulas.
    "the ratio of a sequence is not normalised": (
        "loss",
        "(total / jnp.maximum(count, 1.0))[ids]",
        "total[ids]",
        (pitfalls.check_paper, "gspo"),
    ),
    "CISPO has a gradient through its weight": (
        "loss",
        "jax.lax.stop_gradient(jnp.minimum(ratio, config.cap))",
        "jnp.minimum(ratio, config.cap)",
        (pitfalls.check_paper, "cispo"),
    ),
    "the larger of both surrogates": (
        "loss",
        "gain = jnp.minimum(free * advantages,",
        "gain = jnp.maximum(free * advantages,",
        (pitfalls.check_paper, "grpo"),
    ),
    "the upper bound is the lower one": (
        "loss",
        "1.0 - config.clip_low, 1.0 + config.clip_high",
        "1.0 - config.clip_low, 1.0 + config.clip_low",
        (pitfalls.check_paper, "dapo"),
    ),
    "the correction is not capped": (
        "loss",
        "jnp.minimum(ratio, config.rollout_cap)",
        "ratio",
        (pitfalls.check_paper, "grpo"),
    ),
    "entropy is punished": (
        "loss",
        "terms -= config.entropy_coefficient * entropy",
        "terms += config.entropy_coefficient * entropy",
        (pitfalls.check_paper, "grpo", ("entropy_coefficient", 0.1)),
    ),
    "two-sided clip is one-sided": (
        "loss",
        "free = jnp.minimum(ratio, config.delta)",
        "free = ratio",
        (pitfalls.check_paper, "grpo", ("delta", 1.3)),
    ),
    "the deviation is that of a population": (
        "advantage",
        "math.fsum(centred**2) / (count - 1)",
        "math.fsum(centred**2) / count",
        (pitfalls.check_paper, "grpo"),
    ),
    "Dr.GRPO divides by the deviation": (
        "advantage",
        'if scale == "group_std" else centred',
        'if scale != "batch" else centred',
        (pitfalls.check_paper, "dr_grpo"),
    ),
    "one is not left out": (
        "advantage",
        "math.fsum([*own, -r]) / (count - 1)",
        "math.fsum(own) / count",
        (pitfalls.check_paper, "rloo"),
    ),
    "costs are summed from the front": (
        "advantage",
        "np.cumsum(cost[::-1])[::-1]",
        "np.cumsum(cost)",
        (pitfalls.check_paper, "reinforce++"),
    ),
    "advantages keep their mean": (
        "advantage",
        "(own - mean) / (deviation",
        "own / (deviation",
        (pitfalls.check_paper, "reinforce++"),
    ),
    "the critic is not asked for the next value": (
        "advantage",
        "rewards[t] + gamma * after - values[t]",
        "rewards[t] - values[t]",
        (pitfalls.check_paper, "ppo"),
    ),
    "the reward comes with the first token": (
        "advantage",
        "steps[-1:] += total",
        "steps[:1] += total",
        (pitfalls.check_paper, "ppo"),
    ),
}


def with_mistake(module_name, right, wrong):
    """Our modules, one of them a copy in which `right` reads `wrong`."""
    module = vars(CODE)[module_name]
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in {module_name}"
    copy = types.ModuleType(f"{module.__name__}_with_a_mistake")
    exec(compile(source.replace(right, wrong), f"<{module_name}, {wrong}>", "exec"), vars(copy))
    return SimpleNamespace(**{**vars(CODE), module_name: copy})


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name):
    module_name, right, wrong, (check, *arguments) = MISTAKES[name]
    switches = dict(a for a in arguments if isinstance(a, tuple))
    if check is pitfalls.check_split:
        arguments, switches = arguments[:1], {"accumulation": arguments[1]}
    plain = [a for a in arguments if not isinstance(a, tuple)]
    with pytest.raises(AssertionError):
        check(with_mistake(module_name, right, wrong), *plain, **switches)


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rloo"])
def test_a_copy_without_a_mistake_passes(name):
    """What the mistakes are planted in is sound, so they alone make the checks fail."""
    for module in vars(CODE):
        same = "import jax\n" if module in ("loss", "logprobs") else "import numpy as np\n"
        pitfalls.check_paper(with_mistake(module, same, same), name)
