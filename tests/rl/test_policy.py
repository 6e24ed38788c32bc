"""Engine and trainer are one policy: equal log-probabilities, equal greedy tokens, and what a batch makes of it."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Request
from qwq_jax.engine.runner import DeviceRunner
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind
from qwq_jax.rl.experience import gather
from qwq_jax.rl.learner import make_sync
from qwq_jax.rl.policy import batch_measures
from qwq_jax.rl.types import Score
from qwq_jax.sharding import decode_layout, make_mesh
from qwq_jax.train.packing import Segment
from tests.rl.scripted import END, make_group, make_sample
from tests.rl.tiny_run import COMPLETION, MODEL, PROMPT, TinyRun, make_config, put_together, write_base

TOLERANCE = 1e-4  # largest difference of log-probabilities in float32; measured 4e-6
PACKED = 3 * (PROMPT + COMPLETION)
LORA = {"rank": 4, "alpha": 16.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def engines(base, tmp_path_factory) -> dict[bool, Engine]:
    """With and without a prefix cache; every run brings its own weights."""
    runs = {}
    for cache in (True, False):
        config = make_config(base, tmp_path_factory.mktemp("run"), engine={"prefix_cache": cache})
        runs[cache] = put_together(config).engine
    return runs


@pytest.fixture
def made(base, tmp_path, engines):
    """Builds a run with one of the engines."""

    def make(*, cache=True, **changes) -> TinyRun:
        changes["engine"] = {"prefix_cache": cache} | changes.get("engine", {})
        return put_together(make_config(base, tmp_path / "run", **changes), engines[cache])

    return make


def settings(temperature, lora, packed):
    changes = {"rollout": {"temperature": temperature}}
    return changes | ({"lora": LORA} if lora else {}) | ({"row_length": PACKED} if packed else {})


def gap(run: TinyRun, groups) -> float:
    """Largest difference of a log-probability between trainer and engine."""
    experience = gather(groups, run.learning.objective)
    plain = [Segment(*experience.sequence(i)) for i in range(len(experience.samples))]
    pairs = zip(run.policy.score(run.params, plain), experience.samples, strict=True)
    return max(float(np.abs(scored - sample.logprobs).max()) for scored, sample in pairs)


OFTEN = [(1.0, True, False, True), (0.6, False, True, False)]
REST = [case for case in itertools.product((1.0, 0.6), *[(False, True)] * 3) if case not in OFTEN]


@pytest.mark.parametrize(
    ("temperature", "lora", "packed", "cache"),
    [
        *(pytest.param(*case, marks=[pytest.mark.slow] if case[0] == 1.0 else []) for case in OFTEN),
        *(pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.exhaustive]) for case in REST),
    ],
)
def test_the_trainer_says_what_the_engine_said(made, temperature, lora, packed, cache):
    run = made(cache=cache, **settings(temperature, lora, packed))
    before = run.engine.stats.shared_tokens
    batch = run.rollouts().batch(run.prompts, 4, step=1, refill=False)
    assert (run.engine.stats.shared_tokens > before) == cache, "the prefix cache was used"
    experience = gather(batch.groups, run.learning.objective)
    sequences = [Segment(*experience.sequence(i)) for i in range(len(experience.samples))]
    longest = max(sequences, key=lambda each: each.tokens.size)  # of others, which ended early, several fill a row
    rows = run.policy.rows.plan([longest] * 8).rows
    assert (max(map(len, rows)) > 1) == packed
    assert gap(run, batch.groups) < TOLERANCE
    if lora:
        without = run.policy.score_reference(run.policy.frozen, sequences[:1])[0]
        assert np.abs(without - experience.samples[0].logprobs).max() > 0.1, "adapters that do nothing prove nothing"


@pytest.mark.parametrize(
    ("temperature", "lora"),
    [
        (0.6, True),
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for case in [(1.0, False), (1.0, True), (0.6, False)]
        ),
    ],
)
def test_at_the_first_update_the_ratio_is_1(made, temperature, lora):
    """As the run reports it: of the update against the policy before it, and of that against the engine."""
    run = made(passes_per_step=2, **settings(temperature, lora, packed=True))
    batch = run.rollouts().batch(run.prompts, 0, step=1, refill=False)
    first = replace(run.learning, passes=1)
    assert first.old_logprobs
    state, record = run.policy.learn(run.state, batch.groups, first, step=1)
    assert record["max_rollout_gap"] < TOLERANCE and record["max_log_ratio"] < TOLERANCE
    assert record["ratio"] == pytest.approx(1, abs=1e-5) and record["rollout_ratio"] == pytest.approx(1, abs=1e-5)
    assert record["clip_low"] == record["clip_high"] == record["rollout_capped"] == 0
    # Afterwards it is another policy, also to an engine that has its weights; the old one's words are not its own.
    run.state = state
    stale = gap(run, batch.groups)
    run.engine.replace_weights(run.policy.engine_params(state))
    fresh = run.rollouts().batch(run.prompts, 0, step=1, refill=False)
    assert stale > 20 * TOLERANCE and gap(run, fresh.groups) < TOLERANCE


def test_a_temperature_that_the_trainer_does_not_know_shows(made):
    run = made(rollout={"temperature": 0.6})
    batch = run.rollouts().batch(run.prompts, 0, step=1, refill=False)
    run.policy = made(rollout={"temperature": 1.0}).policy
    assert gap(run, batch.groups) > 0.1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_log_probabilities_of_the_model_rather_than_the_temperature_show(made):
    """What an engine reports by default, as OpenAI's API has it."""
    run = made(rollout={"temperature": 0.6})
    sizes = run.config.engine.model_copy(update={"compute_dtype": "float32"})
    assert sizes.logprobs == "model"
    layout = decode_layout(make_mesh(run.config.mesh))
    runner = DeviceRunner(MODEL, run.policy.engine_params(run.state), layout, sizes)
    run.engine = Engine(runner, MODEL.vocab_size, MODEL.eos_token_ids)
    batch = run.rollouts().batch(run.prompts, 0, step=1, refill=False)
    assert gap(run, batch.groups) > 0.1


def test_a_scale_that_the_engine_does_not_know_shows(made):
    run = made(lora=LORA)
    layout = decode_layout(make_mesh(run.config.mesh))
    wrong = make_sync(MODEL, layout, dtype="float32", lora=LoraConfig(rank=4, alpha=4.0))
    run.engine.replace_weights(wrong(run.state.policy.params, run.policy.frozen))
    batch = run.rollouts().batch(run.prompts, 0, step=1, refill=False)
    assert gap(run, batch.groups) > 0.1


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("lora", [False, True])
def test_greedy_tokens_are_the_likeliest_of_the_trainer(made, lora):
    run = made(**settings(1.0, lora, packed=False))
    params = SamplingParams(temperature=0.0, max_tokens=COMPLETION, ignore_eos=True)
    requests = [Request(str(i), prompt.token_ids, params) for i, prompt in enumerate(run.prompts)]
    drawn = {completion.request_id: completion.token_ids for completion in run.engine.generate(requests)}
    rows = np.zeros((len(requests), PROMPT + COMPLETION), np.int32)
    for i, request in enumerate(requests):
        both = [*request.prompt_token_ids, *drawn[str(i)]]
        rows[i, : len(both)] = both

    @jax.jit
    def likeliest(params, tokens):
        model = bind(MODEL, params, dtype=jnp.float32, lora=run.config.lora)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return jnp.argmax(model.logits(model(tokens, positions, causal_attend(None))[0]), axis=-1)

    found = np.asarray(likeliest(run.params, rows))
    for i, request in enumerate(requests):
        start = len(request.prompt_token_ids)
        assert found[i, start - 1 : start - 1 + COMPLETION].tolist() == list(drawn[str(i)])
    assert len(set(drawn.values())) > 3 and len({token for tokens in drawn.values() for token in tokens}) > 5


def test_the_mean_ratio_is_1_where_everything_can_be_drawn(made):
    """Over the engine's own draws: another policy is on average as likely as the one that drew (pitfall 2)."""
    run = made(rollout={"temperature": 0.6, "prompts_per_step": 12, "group_size": 8})
    batch = run.rollouts().batch(run.prompts, 0, step=1, refill=False)
    experience = gather(batch.groups, run.learning.objective)
    plain = [Segment(*experience.sequence(i)) for i in range(len(experience.samples))]
    moved = dict(run.params)
    moved["head.kernel"] = moved["head.kernel"] + 0.05 * jax.random.normal(
        jax.random.key(1), moved["head.kernel"].shape
    )
    scored = np.concatenate(run.policy.score(moved, plain))
    ratio = np.exp(scored - np.concatenate([sample.logprobs for sample in experience.samples]))
    error = ratio.std() / np.sqrt(len(ratio))
    assert 0.1 < ratio.std() < 1.5 and error < 0.05
    assert abs(ratio.mean() - 1) < 4 * error


def trained_tokens(batch) -> int:
    return sum(int(sample.drawn.sum()) for group in batch.groups for sample in group.samples)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_updates_and_passes(made):
    """Two passes of four updates: eight steps of the optimizer, and every token counted in each pass."""
    run = made(updates_per_step=4, passes_per_step=2)
    batch = run.rollouts().batch(run.prompts, 0, step=1, refill=False)
    state, record = run.policy.learn(run.state, batch.groups, run.learning, step=1)
    assert state.updates == 8 == record["updates"]
    assert record["tokens"] == 2 * trained_tokens(batch)
    assert record["max_log_ratio"] > 0.01, "the ratio is to the policy that drew, not to the last update"


def test_a_batch_in_which_nothing_counts_changes_nothing(made):
    run = made(objective={"name": "dr_grpo", "mask_truncated": True})
    cut = [make_sample([5, 6, 7], float(i), index=i) for i in range(2)]
    before = {name: np.asarray(x) for name, x in run.state.policy.params.items()}
    state, record = run.policy.learn(run.state, [make_group(0, *cut)], run.learning, step=1)
    assert state.updates == 0 and record["updates"] == 0 and record["truncated"] == 1
    assert "loss" not in record and "grad_norm" not in record
    for name, value in before.items():
        np.testing.assert_array_equal(value, state.policy.params[name])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_reference_costs_nothing_at_first(made):
    run = made(objective={"name": "grpo"}, rollout={"temperature": 0.6})
    batch = run.rollouts().batch(run.prompts, 0, step=1, refill=False)
    state, first = run.policy.learn(run.state, batch.groups, run.learning, step=1)
    assert first["reference_kl"] < 1e-6
    _, second = run.policy.learn(state, batch.groups, run.learning, step=2)
    assert second["reference_kl"] > 1e-4, "the reference stays where it was"


def test_what_a_batch_says():
    parts = [{"math": Score(1.0, True), "format": Score(0.5)}, {"math": Score(0.0, False), "format": Score(1.0)}]
    told = make_group(
        0,
        make_sample([5, 6, END], 1.05, correct=True, parts=parts[0]),
        make_sample([5, 6, 7, 8], 0.1, index=1, correct=False, parts=parts[1], failed=("math",)),
    )
    other = make_group(1, make_sample([5, END], 0.7), make_sample([6, END], 0.7, index=1))
    found = batch_measures(gather([told, other], ObjectiveConfig(name="dr_grpo")))
    assert found == {
        "reward": pytest.approx((1.05 + 0.1 + 1.4) / 4),
        "reward_std": pytest.approx(np.std([1.05, 0.1, 0.7, 0.7])),
        "length": 11 / 4,
        "truncated": 0.25,
        "informative": 0.5,
        "prompts": 2,
        "rewards_failed": 0.25,
        "accuracy": 0.5,
        "reward/math": 0.5,
        "reward/format": 0.75,
    }
