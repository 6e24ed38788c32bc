"""PPO as the job puts it together comes to the policy that is known to be the best, and its critic to the value."""

import jax
import numpy as np
import pytest
from scipy.special import logsumexp

from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind
from qwq_jax.rl.prompts import PromptOrder
from qwq_jax.rl.rewards.graded import Graded
from qwq_jax.rl.rollout import Rollouts
from tests.rl.fitting import one_device
from tests.rl.tiny_run import MODEL, make_config, put_together, write_base

BETA = 0.25
STEPS = 40
TOKENS = np.arange(MODEL.vocab_size)
# What the first token of a completion is worth, and what its second.
FIRST, SECOND = 0.5 * (TOKENS % 3 == 1), 0.5 * (TOKENS % 3 == 2)
ENDS = np.isin(TOKENS, MODEL.eos_token_ids)
# Of each pair of tokens; where the first ends a completion, column 0 stands for it alone.
REWARD = FIRST[:, None] + np.where(ENDS[:, None], 0.0, SECOND)


class TokenJudge:
    """Scores the tokens of a completion, of which there are one or two."""

    def submit(self, prompt, completion, reply):
        return completion.token_ids

    def results(self, claims):
        worth = (FIRST, SECOND)
        return [Graded(float(sum(worth[i][token] for i, token in enumerate(ids))), None) for ids in claims]


def distribution(params, prompt) -> np.ndarray:
    """Log-probabilities of all completions of a prompt, float64 as `REWARD`."""
    tokens = np.array([[*prompt, token] for token in TOKENS], np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    @jax.jit
    def last_two(params):
        bound = bind(MODEL, params, dtype="float32", remat=False)
        attend = causal_attend(np.ones_like(tokens), one_device())
        return bound.logits(bound(tokens, positions, attend, layout=one_device())[0][:, -2:])

    logits = np.asarray(last_two(params), np.float64)
    logits -= logsumexp(logits, axis=-1, keepdims=True)
    first, second = logits[0, 0][:, None], logits[:, 1]
    return np.where(ENDS[:, None], np.where(TOKENS == 0, first, -np.inf), first + second)


def value(logp, reference) -> float:
    """What is maximised: the mean reward, less beta times KL(policy, reference)."""
    p = np.exp(logp)
    gaps = np.where(p > 0, logp - np.where(p > 0, reference, 0.0), 0.0)
    return float(np.sum(p * (REWARD - BETA * gaps)))


@pytest.mark.slow
def test_it_comes_to_the_reference_tilted_by_the_reward(tmp_path):
    """The best policy is p_ref exp(reward / beta) / Z, and its value beta log Z."""
    config = make_config(
        write_base(tmp_path / "base"),
        tmp_path / "run",
        steps=STEPS,
        updates_per_step=2,
        passes_per_step=2,
        rollout={"prompts_per_step": 2, "group_size": 128, "max_prompt_tokens": 24, "max_tokens": 2},
        engine={"max_sequences": 64, "max_context": 26, "max_prefill_sequences": 8},
        rows_per_micro_batch=32,
        objective={"name": "ppo", "kl_coefficient": BETA, "gae_lambda": 1.0},
        critic={"optimizer": {"learning_rate": 1e-2}},
        optimizer={"learning_rate": 1e-2, "final_lr_ratio": 0.02},
    )
    run = put_together(config)
    prompts = run.prompts[:2]
    order, rollouts = PromptOrder(prompts, seed=0), Rollouts(run.engine, run.tokenizer, TokenJudge(), config.rollout)
    references = [distribution(run.params, prompt.token_ids) for prompt in prompts]
    best = np.mean([BETA * logsumexp(reference + REWARD / BETA) for reference in references])
    begun = np.mean([value(reference, reference) for reference in references])
    state, records = run.state, []
    for step in range(1, STEPS + 1):
        batch = rollouts.batch(order, 2 * (step - 1), step=step, refill=False)
        assert batch is not None
        state, record = run.policy.learn(state, batch.groups, run.learning, step=step)
        run.engine.replace_weights(run.policy.engine_params(state))
        records.append(record)
    final = [distribution(state.policy.params, prompt.token_ids) for prompt in prompts]
    ended = np.mean([value(logp, reference) for logp, reference in zip(final, references, strict=True)])
    assert best - begun > 0.2, "far from the start"
    assert 0 < best - ended < 0.2 * (best - begun), "noise of finite batches keeps it from the very top"
    explained = [record["explained_variance"] for record in records]
    assert np.mean(explained[-10:]) > 0.3 > np.mean(explained[:3])
