"""A run on a model of two layers, put together as the job does it, so that tests can look at its parts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.config.load import build
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.rl import RlConfig
from qwq_jax.engine.engine import Engine
from qwq_jax.jobs.rl import learn_config, make_engine
from qwq_jax.jobs.rl_start import Start, make_policy, make_state, open_start
from qwq_jax.model.params import Params, random_params, stack
from qwq_jax.rl.optimizers import make_optimizers
from qwq_jax.rl.policy import LearnConfig, Policy, RlState
from qwq_jax.rl.prompts import Prompt, make_prompts
from qwq_jax.rl.rollout import Rollouts
from qwq_jax.rl.types import Reply, Task
from qwq_jax.sharding import make_mesh, train_layout
from qwq_jax.train.weights import companion_files, write_checkpoint
from tests.jobs.tiny_checkpoint import CLOSE, END, write_tokenizer
from tests.rl.scripted import ScriptedJudge

MODEL = ModelConfig(
    vocab_size=CLOSE + 2,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=256,
    # Many, so that replies of random weights have an end.
    eos_token_ids=(END, *range(0, 256, 16)),
)
PROMPT, COMPLETION = 24, 16


def write_base(folder: Path, seed: int = 3) -> str:
    """A checkpoint with biases and scales off their neutral values, and a spread that makes tokens vary."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    drawn = random_params(MODEL, jax.random.key(seed))
    shift = lambda i, x: x + 0.3 * jax.random.normal(jax.random.key(i), x.shape)  # noqa: E731
    params = {p: shift(i, x) if p.endswith(("bias", "scale")) else 4 * x for i, (p, x) in enumerate(drawn.items())}
    params["head.kernel"] *= 4  # the entropy is half of the most there can be: a temperature makes a difference
    write_checkpoint(
        str(folder / "base"),
        stack(params, MODEL.num_layers),
        MODEL,
        dtype="float32",
        files=companion_files(str(folder)),
        identity=str(seed),
        origin="somebody/a-model",
    )
    return str(folder / "base")


def make_config(base: str, output: Path | str, **changes: Any) -> RlConfig:
    """One program each for prompts and for drawing; a page is shorter than the prompts, so that groups share some."""
    tables = {
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 4,
            "max_prompt_tokens": PROMPT,
            "max_tokens": COMPLETION,
        },
        "engine": {
            "max_sequences": 8,
            "page_size": 8,
            "prefill_chunk": 32,
            "max_prefill_sequences": 8,
            "max_context": PROMPT + COMPLETION,
        },
        "objective": {"name": "dr_grpo"},
        "optimizer": {"learning_rate": 1e-2},
    }
    for name, table in tables.items():
        changes[name] = table | changes.get(name, {})
    plain = {
        "model": base,
        "output_dir": str(output),
        "steps": 10,
        "tasks": [{"kind": "arithmetic"}],
        "rewards": [{"kind": "exact"}],
        "compute_dtype": "float32",
        "remat": False,
        "rows_per_micro_batch": 4,
    }
    return build(RlConfig, plain | changes, source="a test")


def even_length(task_id: str, reply: Reply) -> float:
    """What a random model gets right half of the time."""
    return float(len(reply.text) % 2)


@dataclass
class TinyRun:
    """What a run is made of, before its first step."""

    config: RlConfig
    start: Start
    state: RlState
    policy: Policy
    engine: Engine
    prompts: list[Prompt]
    learning: LearnConfig
    tokenizer: ChatTokenizer

    @property
    def params(self) -> Params:
        """All parameters of the policy."""
        return {**(self.policy.frozen or {}), **self.state.policy.params}

    def rollouts(self, value: Callable[[str, Reply], float] = even_length) -> Rollouts:
        return Rollouts(self.engine, self.tokenizer, ScriptedJudge(value), self.config.rollout)


def tasks(count: int = 12) -> list[Task]:
    return [Task(f"t{i}", ({"role": "user", "content": "x" * (i % 5) + chr(97 + i)},)) for i in range(count)]


def put_together(config: RlConfig, engine: Engine | None = None) -> TinyRun:
    """A run of `config`; with an `engine` of the same sizes, that one, so that nothing is compiled again."""
    layout = train_layout(make_mesh(config.mesh))
    start = open_start(config)
    optimizers = make_optimizers(config)
    store = TrainStore(epath.Path(config.output_dir) / "checkpoints")
    state, target = make_state(config, start, layout, optimizers, store=store, step=0)
    if config.lora is not None:
        state = replace(state, policy=replace(state.policy, params=_with_noise(state.policy.params)))
    policy = make_policy(config, start, layout, optimizers, target=target)
    params = policy.engine_params(state)
    if engine is None:
        engine = make_engine(config, start, params)
    else:
        engine.replace_weights(params)
    tokenizer = ChatTokenizer.from_directory(start.tokenizer_dir)
    prompts = make_prompts(tasks(), tokenizer, longest=PROMPT)
    return TinyRun(config, start, state, policy, engine, prompts, learn_config(config), tokenizer)


def _with_noise(adapters: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adapters as they are after some training: B is not zero, so that their scale matters."""
    rng = np.random.default_rng(5)
    noise = {path: rng.standard_normal(x.shape).astype(np.float32) for path, x in adapters.items()}
    return {
        path: jax.device_put(0.2 * noise[path], x.sharding) if path.endswith("lora.b") else x
        for path, x in adapters.items()
    }
