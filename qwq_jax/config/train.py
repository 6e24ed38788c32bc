"""Settings of a fine-tuning run."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from qwq_jax.config.frozen import Frozen
from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.mesh import MeshConfig


class OptimizerConfig(Frozen):
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        learning_rate: The peak, at the end of the warm-up.
        warmup_steps: Steps from zero to the peak.
        final_lr_ratio: The last learning rate, as a part of the peak.
        b1: Decay of the mean of gradients.
        b2: Decay of the mean of squared gradients.
        eps: Added to the root of the latter.
        weight_decay: Decoupled decay of matrices, adapters' too; norms and biases are left alone.
        clip_norm: Longest global gradient; ``None`` clips nothing.
    """

    learning_rate: PositiveFloat = 1e-5
    warmup_steps: NonNegativeInt = 0
    final_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    b1: float = Field(default=0.9, ge=0.0, lt=1.0)
    b2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = 1.0


class SftConfig(Frozen):
    """One instruction-tuning run.

    Attributes:
        model: A checkpoint directory, a Hugging Face directory, or, with `init` ``"random"``, also a preset
            ``configs/models/*.toml``.
        init: Start from the weights of `model`, or from random ones of its architecture.
        tokenizer: Directory of the tokenizer and chat template; ``None`` takes `model`'s.
        train_files: JSONL files, each line with ``messages``.
        eval_files: The same, held out; none of it is trained on.
        output_dir: Where checkpoints and metrics go; the same command continues a run found there.
        sequence_length: Tokens in a packed row.
        rows_per_step: Packed rows in one optimizer step, over all devices.
        accumulation: Micro-batches that a step is computed in.
        skip_too_long: Leave out (and count) examples that do not fit a row, instead of refusing the file.
        steps: Optimizer steps that the learning rate is planned for.
        stop_after: End after this many of `steps`, as if that were the plan; ``None`` takes them all.
        eval_every: Steps between held-out losses; 0 evaluates only at the end.
        save_every: Steps between checkpoints; 0 saves only at the end.
        keep: Checkpoints kept beside the best one.
        seed: Fixes initial weights and data order.
        remat: Compute each layer's activations again in the backward pass rather than keep them.
        param_dtype: Type of the master weights and of the optimizer state; with `lora`, of the model's frozen weights,
            while adapters and their optimizer state are float32.
        compute_dtype: Type of activations and of the weights they meet; ``None`` is bfloat16, and float32 on the CPU.
        logprob_chunk: Tokens whose logits exist at one time.
        final: Which weights become the checkpoint at the end: the last, or those of the least held-out loss.
        final_dtype: Type they are stored in.
        lora: Train adapters of these projections, and nothing else; ``None`` trains all weights.
        merge_adapters: At the end, write the model with its adapters merged in too, beside the adapters themselves.
        mesh: The device mesh.
        optimizer: The optimizer.
    """

    model: str
    init: Literal["pretrained", "random"] = "pretrained"
    tokenizer: str | None = None
    train_files: tuple[str, ...] = Field(min_length=1)
    eval_files: tuple[str, ...] = ()
    output_dir: str
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
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model.endswith(".toml") and self.init == "pretrained":
            raise ValueError(f"model {self.model} is a preset without weights, so init must be 'random'")
        if self.model.endswith(".toml") and self.tokenizer is None:
            raise ValueError(f"model {self.model} is a preset without a tokenizer, so tokenizer must name a directory")
        if self.lora is not None and self.init == "random":
            raise ValueError("lora adapts trained weights, so init must be 'pretrained'")
        self._check_local()
        shards = self.mesh.data * self.mesh.fsdp
        if self.rows_per_step % (self.accumulation * shards):
            raise ValueError(
                f"rows_per_step {self.rows_per_step} does not divide into accumulation {self.accumulation} x "
                f"mesh.data {self.mesh.data} x mesh.fsdp {self.mesh.fsdp}"
            )
        self.mesh.check_row("sequence_length", self.sequence_length)
        if self.final == "best" and not self.eval_files:
            raise ValueError("final 'best' needs eval_files to tell which weights are the best")
        if self.stop_after is not None and self.stop_after > self.steps:
            raise ValueError(f"stop_after {self.stop_after} lies beyond steps {self.steps}")
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not below steps {self.steps}")
        return self

    def _check_local(self) -> None:
        for name, paths in (
            ("train_files", self.train_files),
            ("eval_files", self.eval_files),
            ("tokenizer", (self.tokenizer or "",)),
        ):
            if remote := next((path for path in paths if "://" in path), None):
                raise ValueError(f"{name}: {remote} is not local, and only local files are read here; copy it first")

    @property
    def last_step(self) -> int:
        """The step the run ends after."""
        return self.steps if self.stop_after is None else self.stop_after
