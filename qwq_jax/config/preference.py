"""Settings of a run that learns from preferences: of a policy by DPO, or of a reward model."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from qwq_jax.config.frozen import Frozen
from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.objective import DpoConfig
from qwq_jax.config.train import OptimizerConfig


class BradleyTerryConfig(Frozen):
    """A reward model, trained on ``-log sigmoid(r_chosen - r_rejected - margin)``.

    Attributes:
        centring: Weight of ``(r_chosen + r_rejected)^2``. Preferences leave the level of rewards open, and a reward of
            reinforcement learning is cut at its `clip`: this keeps them around zero.
        thoughts: Whether it reads the thoughts of a reply too, or its answer alone. What it was trained on is written
            beside its weights, and a run that has it read otherwise is refused.
    """

    centring: NonNegativeFloat = 0.01
    thoughts: bool = False


class PreferenceConfig(Frozen):
    """One run of preference training; one of `dpo` and `reward_model` says which kind.

    Attributes:
        model: A checkpoint directory or a Hugging Face directory: the policy at step 0 and DPO's reference, or what a
            reward model grows from, with its output head taken off.
        tokenizer: Directory of the tokenizer and chat template; ``None`` takes `model`'s.
        train_files: JSONL files of pairs; see `rl.preference_data`.
        eval_files: The same, held out; none of it is trained on.
        output_dir: Where checkpoints and metrics go; the same command continues a run found there.
        dpo: How a policy is trained.
        reward_model: How a reward model is.
        sequence_length: Tokens in a packed row; both replies of a pair, each with its prompt, share one.
        rows_per_step: Packed rows in one optimizer step, over all devices.
        accumulation: Micro-batches that a step is computed in.
        skip_too_long: Leave out (and count) pairs that do not fit a row, instead of refusing the file.
        steps: Optimizer steps that the learning rate is planned for.
        stop_after: End after this many of `steps`, as if that were the plan; ``None`` takes them all.
        eval_every: Steps between held-out measures; 0 evaluates only at the end.
        save_every: Steps between checkpoints; 0 saves only at the end.
        keep: Checkpoints kept beside the best one.
        seed: Fixes the order of the data and the adapters' first values.
        remat: Compute each layer's activations again in the backward pass rather than keep them.
        param_dtype: Type of the master weights and of the optimizer state; with `lora`, of the model's frozen weights,
            while what is trained and its optimizer state are float32.
        compute_dtype: Type of activations and of the weights they meet; ``None`` is bfloat16, and float32 on the CPU.
        logprob_chunk: Tokens whose logits exist at one time; a reward model has none.
        final: Which weights become the checkpoint at the end: the last, or those of the least held-out loss.
        final_dtype: Type they are stored in.
        lora: Train adapters of these projections, and of a reward model its head; ``None`` trains all weights.
        merge_adapters: At the end, write the model with its adapters merged in too, beside the adapters themselves. A
            reward model is always merged.
        mesh: The device mesh.
        optimizer: The optimizer.
    """

    model: str
    tokenizer: str | None = None
    train_files: tuple[str, ...] = Field(min_length=1)
    eval_files: tuple[str, ...] = ()
    output_dir: str
    dpo: DpoConfig | None = None
    reward_model: BradleyTerryConfig | None = None
    sequence_length: PositiveInt = 4096
    rows_per_step: PositiveInt = 8
    accumulation: PositiveInt = 1
    skip_too_long: bool = False
    steps: PositiveInt
    stop_after: PositiveInt | None = None
    eval_every: NonNegativeInt = 0
    save_every: NonNegativeInt = 0
    keep: PositiveInt = 2
    seed: NonNegativeInt = 0
    remat: bool = True
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    logprob_chunk: PositiveInt = 1024
    final: Literal["last", "best"] = "last"
    final_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora: LoraConfig | None = None
    merge_adapters: bool = True
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.dpo is None) is (self.reward_model is None):
            found = "none" if self.dpo is None else "both"
            raise ValueError(f"expected one of the tables dpo and reward_model, got {found}")
        if self.model.endswith(".toml"):
            raise ValueError(f"model {self.model} is a preset without weights; preferences refine a trained model")
        if self.reward_model is not None and not self.merge_adapters:
            raise ValueError("merge_adapters false: a reward model is stored as a whole, so leave it out")
        for name, paths in (
            ("train_files", self.train_files),
            ("eval_files", self.eval_files),
            ("tokenizer", (self.tokenizer or "",)),
        ):
            if remote := next((path for path in paths if "://" in path), None):
                raise ValueError(f"{name}: {remote} is not local, and only local files are read here; copy it first")
        if self.mesh.context > 1:
            raise ValueError(f"mesh.context {self.mesh.context}: pairs are told by their order in a row; use mesh.fsdp")
        if self.rows_per_step % (self.accumulation * self.mesh.data * self.mesh.fsdp):
            raise ValueError(
                f"rows_per_step {self.rows_per_step} does not divide into accumulation {self.accumulation} x "
                f"mesh.data {self.mesh.data} x mesh.fsdp {self.mesh.fsdp}"
            )
        if self.final == "best" and not self.eval_files:
            raise ValueError("final 'best' needs eval_files to tell which weights are the best")
        if self.stop_after is not None and self.stop_after > self.steps:
            raise ValueError(f"stop_after {self.stop_after} lies beyond steps {self.steps}")
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not below steps {self.steps}")
        return self

    @property
    def last_step(self) -> int:
        """The step the run ends after."""
        return self.steps if self.stop_after is None else self.stop_after
