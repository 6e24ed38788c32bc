"""Settings of a reinforcement learning run."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.frozen import Frozen
from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.config.rewards import RewardConfigs, RewardModelConfig
from qwq_jax.config.tasks import TaskSource
from qwq_jax.config.train import OptimizerConfig


class RolloutConfig(Frozen):
    """What is drawn for one step.

    Tokens are drawn from the whole distribution: a top-p or top-k would take probability from it that the loss does not
    know of, and bias every ratio (the mean ratio becomes the mass that was kept).

    Attributes:
        prompts_per_step: Groups in one batch.
        group_size: Completions of each prompt.
        max_prompt_tokens: Tasks with longer prompts are left out, and counted.
        max_tokens: Longest completion, thoughts included.
        temperature: Divides the logits, of the engine and of every log-probability of the loss.
        max_refills: How often a batch is filled up, where the objective refills uninformative groups; then it is
            taken as it is, if it has a group at all.
    """

    prompts_per_step: PositiveInt = 64
    group_size: int = Field(default=16, ge=1, le=128)
    max_prompt_tokens: PositiveInt = 1024
    max_tokens: PositiveInt = 4096
    temperature: float = Field(default=1.0, gt=0.0, le=2.0)
    max_refills: NonNegativeInt = 8

    @property
    def samples_per_step(self) -> int:
        """Completions in one batch."""
        return self.prompts_per_step * self.group_size


class CurriculumConfig(Frozen):
    """Which tasks are trained on, and in what order.

    Attributes:
        order: ``shuffled`` anew in each pass, or ``easy_first``: by rising difficulty, equal ones shuffled.
        least_difficulty: Easier tasks are left out; those without a difficulty stay.
        most_difficulty: Harder ones are.
        evaluation: Directory of a finished ``qwq-jax eval`` of these tasks, whose share of wrong replies is then the
            difficulty of each: 0.05 to 0.95 leaves out what is always or never solved and so teaches nothing.
    """

    order: Literal["shuffled", "easy_first"] = "shuffled"
    least_difficulty: float = Field(default=0.0, ge=0.0, le=1.0)
    most_difficulty: float = Field(default=1.0, ge=0.0, le=1.0)
    evaluation: str | None = None


class EvalConfig(Frozen):
    """Evaluation on held-out tasks, before the first step, now and then, and at the end.

    Attributes:
        tasks: Where they come from.
        samples: Completions of each.
        temperature: Of these; 0 takes the most likely token.
        max_tokens: Longest completion; ``None`` takes that of the rollout.
        every: Steps in between; 0 evaluates only before and after.
    """

    tasks: tuple[TaskSource, ...] = Field(min_length=1)
    samples: int = Field(default=1, ge=1, le=128)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    max_tokens: PositiveInt | None = None
    every: NonNegativeInt = 0


class CriticConfig(Frozen):
    """PPO's critic: the decoder of a model and a head of its own, trained beside the policy; as `lora` is, if set.

    Attributes:
        learns_first: Of so many steps only the critic learns: until then its values are noise.
        optimizer: Its optimizer; the schedule counts the same updates as the policy's.
    """

    learns_first: NonNegativeInt = 0
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)


class RlConfig(Frozen):
    """One run of reinforcement learning.

    Attributes:
        model: A checkpoint directory or a Hugging Face directory: the policy at step 0, and the reference.
        tokenizer: Directory of the tokenizer and chat template; ``None`` takes `model`'s.
        output_dir: Where checkpoints and metrics go; the same command continues a run found there.
        tasks: What is asked.
        curriculum: Which of them, and in what order.
        rewards: What replies are worth; the weighted sum counts.
        reward_workers: Processes that compute rewards.
        rollout: What is drawn for one step.
        objective: What is maximised.
        critic: Where the objective has one (``ppo``); ``None`` takes the defaults there.
        lora: Trains low-rank adapters and leaves the weights as they are; ``None`` trains all weights.
        steps: Batches of rollouts that the learning rate is planned for.
        stop_after: End after this many of `steps`; ``None`` takes them all.
        updates_per_step: Optimizer updates that a batch is divided into, by whole groups.
        passes_per_step: How often all of a batch is trained on.
        row_length: Tokens in a packed row; ``None`` is a longest prompt with a longest completion.
        rows_per_micro_batch: Rows whose activations exist at one time, over all devices.
        evaluation: Held-out tasks; ``None`` for none.
        save_every: Steps between checkpoints; 0 saves only at the end.
        keep: Checkpoints kept beside the best one.
        seed: Fixes the order of tasks, the adapters' first values and every token that is drawn.
        remat: Compute each layer's activations again in the backward pass rather than keep them.
        param_dtype: Type of the master weights (without `lora`) and of the optimizer state.
        compute_dtype: Type of activations and of the weights they meet; ``None`` is bfloat16, and float32 on the CPU.
        logprob_chunk: Tokens whose logits exist at one time.
        final: Which weights become the checkpoint at the end: the last, or those of the best evaluation.
        final_dtype: Type they are stored in.
        mesh: The device mesh of training.
        decode_mesh: The same devices as the engine arranges them; ``None`` takes `mesh`.
        engine: The engine; its context is a longest prompt with a longest completion.
        optimizer: The optimizer.
    """

    model: str
    tokenizer: str | None = None
    output_dir: str
    tasks: tuple[TaskSource, ...] = Field(min_length=1)
    curriculum: CurriculumConfig = CurriculumConfig()
    rewards: RewardConfigs
    reward_workers: PositiveInt = 2
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    critic: CriticConfig | None = None
    lora: LoraConfig | None = None
    steps: PositiveInt
    stop_after: PositiveInt | None = None
    updates_per_step: PositiveInt = 1
    passes_per_step: PositiveInt = 1
    row_length: PositiveInt | None = None
    rows_per_micro_batch: PositiveInt = 8
    evaluation: EvalConfig | None = None
    save_every: NonNegativeInt = 0
    keep: PositiveInt = 2
    seed: NonNegativeInt = 0
    remat: bool = True
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    logprob_chunk: PositiveInt = 1024
    final: Literal["last", "best"] = "last"
    final_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    mesh: MeshConfig = MeshConfig()
    decode_mesh: MeshConfig | None = None
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)

    @model_validator(mode="after")
    def _check(self) -> Self:
        rollout, shards = self.rollout, self.mesh.data * self.mesh.fsdp
        longest = rollout.max_prompt_tokens + rollout.max_tokens
        if self.objective.uses_groups and rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size {rollout.group_size}: baseline {self.objective.baseline} compares completions of "
                "one prompt, so it must be at least 2"
            )
        if rollout.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"rollout.prompts_per_step {rollout.prompts_per_step} does not divide into updates_per_step "
                f"{self.updates_per_step}"
            )
        if self.row_length is not None and self.row_length < longest:
            raise ValueError(
                f"row_length {self.row_length} is less than rollout.max_prompt_tokens + rollout.max_tokens = {longest}"
            )
        if self.rows_per_micro_batch % shards:
            raise ValueError(
                f"rows_per_micro_batch {self.rows_per_micro_batch} does not divide into mesh.data {self.mesh.data} x "
                f"mesh.fsdp {self.mesh.fsdp}"
            )
        self.mesh.check_row("row_length (rollout.max_prompt_tokens + rollout.max_tokens)", self.row_length or longest)
        if self.decode_mesh is not None and self.decode_mesh.size != self.mesh.size:
            raise ValueError(
                f"decode_mesh has {self.decode_mesh.size} devices, mesh {self.mesh.size}: it must arrange the same ones"
            )
        if self.curriculum.least_difficulty > self.curriculum.most_difficulty:
            raise ValueError("curriculum.least_difficulty is above curriculum.most_difficulty: no task is left")
        self._check_engine()
        self._check_steps()
        self._check_critic()
        return self

    def _check_engine(self) -> None:
        if self.engine.max_context is not None and self.engine.max_context < self.longest_sequence:
            raise ValueError(
                f"engine.max_context {self.engine.max_context} is less than the {self.longest_sequence} tokens of a "
                "longest prompt with a longest completion (max_prompt_tokens, max_tokens); leave it out"
            )
        if self.engine.logprobs != "model":
            raise ValueError(
                "engine.logprobs is decided by the run, which needs those of the temperature: leave it out"
            )

    def _check_steps(self) -> None:
        if self.stop_after is not None and self.stop_after > self.steps:
            raise ValueError(f"stop_after {self.stop_after} lies beyond steps {self.steps}")
        if self.optimizer.warmup_steps >= self.updates:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not below {self.updates} updates"
            )
        if self.final == "best" and self.evaluation is None:
            raise ValueError("final 'best' needs evaluation to tell which weights are the best")

    def _check_critic(self) -> None:
        if self.critic is None:
            return
        if not self.objective.uses_critic:
            raise ValueError(
                f"critic: objective {self.objective.name} with baseline {self.objective.baseline} has none"
            )
        if self.critic.optimizer.warmup_steps >= self.updates:
            warmup = self.critic.optimizer.warmup_steps
            raise ValueError(f"critic.optimizer.warmup_steps {warmup} is not below {self.updates} updates")

    @property
    def critic_or_default(self) -> CriticConfig | None:
        """The critic's settings, if the objective has a critic."""
        return self.critic or CriticConfig() if self.objective.uses_critic else None

    @property
    def longest_sequence(self) -> int:
        """Tokens of a longest prompt with a longest completion, of training or evaluation: the engine's context."""
        held_out = (self.evaluation.max_tokens or 0) if self.evaluation else 0
        return self.rollout.max_prompt_tokens + max(self.rollout.max_tokens, held_out)

    @property
    def last_step(self) -> int:
        """The step the run ends after."""
        return self.steps if self.stop_after is None else self.stop_after

    @property
    def updates(self) -> int:
        """Optimizer updates of all steps; the learning rate counts them."""
        return self.steps * self.updates_per_step * self.passes_per_step

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy moves while a batch is trained on, or the reward needs its log-probabilities."""
        return self.updates_per_step * self.passes_per_step > 1 or self.objective.kl == "k1_reward"

    @property
    def reward_models(self) -> tuple[RewardModelConfig, ...]:
        """The rewards that the devices compute."""
        return tuple(reward for reward in self.rewards if isinstance(reward, RewardModelConfig))
