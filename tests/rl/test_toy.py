"""The whole loop learns what is rewarded, and unlearns it where the sign of the reward is flipped."""

import numpy as np
import pytest

from qwq_jax.rl.prompts import PromptOrder
from qwq_jax.rl.trainer import Hands, Plan, Trainer
from tests.rl.tiny_run import COMPLETION, make_config, put_together, write_base


class Nowhere:
    """A store and a log that only keep the records."""

    def __init__(self):
        self.records = []

    def save(self, *_, **__):
        pass

    def write(self, step, record):
        self.records.append(record)

    def flush(self):
        pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def lengths_of(config, *, sign, engine=None):
    """Mean length of the replies of each step, where short ones are rewarded, or with the sign flipped long ones."""
    run, kept = put_together(config, engine), Nowhere()
    Trainer(
        policy=run.policy,
        learning=run.learning,
        engine=run.engine,
        rollouts=run.rollouts(lambda _, reply: -sign * reply.tokens / COMPLETION),
        order=PromptOrder(run.prompts, seed=0),
        store=kept,
        log=kept,
        plan=Plan(config.steps),
        identity={},
        evaluate=None,
        learning_rate=lambda updates: 0.0,
        hands=Hands(),
    ).run(run.state, step=0, cursor=0)
    return np.array([record["length"] for record in kept.records]), run.engine


def check_lengths(base, tmp_path, *, steps, **changes):
    sizes = {"prompts_per_step": 8, "group_size": 8}
    config = make_config(base, tmp_path, rollout=sizes, steps=steps, optimizer={"learning_rate": 4e-3}, **changes)
    shorter, engine = lengths_of(config, sign=1)
    longer, _ = lengths_of(config, sign=-1, engine=engine)
    assert shorter[0] == longer[0], "they begin alike"
    assert shorter[-2:].mean() < 0.4 * shorter[0] < 0.4 * COMPLETION, shorter
    assert longer[-2:].mean() > 0.97 * COMPLETION > longer[0], longer


def test_what_is_rewarded_grows_and_with_the_sign_flipped_it_shrinks(base, tmp_path):
    check_lengths(base, tmp_path, steps=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"compute_dtype": "bfloat16"},
        pytest.param({"lora": {"rank": 8, "alpha": 32.0}}, marks=pytest.mark.exhaustive),
        pytest.param({"objective": {"name": "cispo"}}, marks=pytest.mark.exhaustive),
        {"objective": {"name": "rloo", "kl_coefficient": 0.001}},
    ],
    ids=str,
)
@pytest.mark.exhaustive
def test_it_learns_in_other_ways_too(base, tmp_path, changes):
    """A reward of minus the length, which a head in bfloat16 would not converge under (MiniMax-M1, section 3.2)."""
    check_lengths(base, tmp_path, steps=20, **changes)
