"""A job to be planned: its config, its model, and how both change for another slice."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.inference import InferenceConfig
from qwq_jax.config.load import build, load_toml
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.plan import Workload
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.train import SftConfig
from qwq_jax.plan.search import Trained, TrainWay

Kind = Literal["inference", "sft", "rl"]
_CONFIGS: Mapping[str, type] = {"inference": InferenceConfig, "sft": SftConfig, "rl": RlConfig}
# The engine of a TPU draws in bfloat16 unless it is told otherwise, and training computes in it.
_ON_TPU = {"inference": {}, "sft": {"compute_dtype": "bfloat16"}, "rl": {"compute_dtype": "bfloat16"}}


@dataclass(frozen=True)
class Job:
    """What shall run.

    Attributes:
        name: Of its file.
        kind: What it does.
        config: Its settings.
        model: The architecture.
        workload: Mean lengths of prompts and completions.
        reward_model: Architecture of the reward model, if it has one.
    """

    name: str
    kind: Kind
    config: Any
    model: ModelConfig
    workload: Workload
    reward_model: ModelConfig | None = None

    @property
    def devices(self) -> int:
        """What its mesh has."""
        return self.config.mesh.size

    @property
    def meshes(self) -> tuple[dict[str, int], dict[str, int] | None]:
        """Sizes of the axes of its mesh, and of its engine's if that is another."""
        decode = self.config.decode_mesh if self.kind == "rl" else None
        return self.config.mesh.model_dump(), None if decode is None else decode.model_dump()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of its engine."""
        own = self.config.longest_sequence if self.kind == "rl" else self.model.max_context
        return self.config.engine.max_context or own

    @property
    def row_length(self) -> int:
        """Tokens of a row that it trains on."""
        if self.kind == "sft":
            return self.config.sequence_length
        return self.config.row_length or self.config.rollout.max_prompt_tokens + self.config.rollout.max_tokens

    def described(self, topology: str) -> dict[str, Any]:
        """As plain values, for a process that compiles."""
        return {
            "kind": self.kind,
            "config": self.config.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "reward_model": None if self.reward_model is None else self.reward_model.model_dump(mode="json"),
            "topology": topology,
        }

    def with_engine(self, **fields: Any) -> "Job":
        """The same with other settings of the engine."""
        engine = self.config.engine.model_copy(update=fields)
        return replace(self, config=self.config.model_copy(update={"engine": engine}))


def read_job(
    path: Path,
    overrides: Sequence[str],
    *,
    model: Path | None,
    reward_model: Path | None,
    lengths: tuple[int | None, int | None],
) -> Job:
    """Reads a job's file.

    Args:
        path: TOML of a run of ``rl`` or ``sft``, or of inference: tables ``engine``, ``mesh`` and ``sampling``.
        overrides: As ``--set`` has them.
        model: Its architecture, where the config's ``model`` is not at hand.
        reward_model: The same of its reward model.
        lengths: Mean prompt and completion; half of the longest otherwise where the job has a longest.

    Raises:
        ValueError: The file is none of these, or an architecture cannot be read.
    """
    kind = _kind(path)
    config: Any = load_toml(path, _CONFIGS[kind], overrides)
    config = config.model_copy(
        update={name: value for name, value in _ON_TPU[kind].items() if getattr(config, name) is None}
    )
    architecture = read_model(model if model is not None else _own_model(path, config, kind))
    scored = None
    if kind == "rl" and config.reward_models:
        if reward_model is None:
            raise ValueError(f"{path}: a reward model scores replies: say its architecture with --reward-model")
        scored = read_model(reward_model)
    elif reward_model is not None:
        raise ValueError(f"--reward-model {reward_model}: {path} has no reward model")
    return Job(path.name, kind, config, architecture, _workload(kind, config, lengths), scored)


def _kind(path: Path) -> Kind:
    try:
        keys = set(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    if keys & {"dpo", "reward_model"}:
        raise ValueError(f"{path}: plans are made of rl, sft and inference; this is a run of preferences")
    if keys & {"rewards", "rollout"}:
        return "rl"
    return "sft" if "train_files" in keys else "inference"


def _own_model(path: Path, config: Any, kind: Kind) -> Path:
    if kind == "inference":
        raise ValueError(f"{path}: say which architecture with --model, as in --model configs/models/qwq-32b.toml")
    own = Path(config.model)
    if not own.exists():
        raise ValueError(
            f"{path}: model {config.model} is not here; say its architecture with --model, as in "
            "--model configs/models/qwq-32b.toml"
        )
    return own


def read_model(path: Path) -> ModelConfig:
    """An architecture: a preset of ``configs/models``, a ``config.json``, or a directory that has one.

    Raises:
        ValueError: It is none of these.
    """
    if path.suffix == ".toml":
        return load_toml(path, ModelConfig)
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(
            f"{file}: not JSON; expected the config.json of a model, or a preset ending in .toml"
        ) from None
    return ModelConfig.from_huggingface(fields)


def _workload(kind: Kind, config: Any, lengths: tuple[int | None, int | None]) -> Workload:
    default = Workload()
    prompt, completion = default.prompt_tokens, default.completion_tokens
    if kind == "rl":
        prompt, completion = config.rollout.max_prompt_tokens // 2, config.rollout.max_tokens // 2
    return Workload(prompt_tokens=lengths[0] or max(1, prompt), completion_tokens=lengths[1] or max(1, completion))


def engine_of(job: Job) -> EngineConfig:
    """The settings of its engine, with the context that it must hold."""
    engine: EngineConfig = job.config.engine
    return engine.model_copy(update={"max_context": job.longest})


def program_names(job: Job) -> list[str]:
    """The programs that a run compiles, the slowest to compile first."""
    if job.kind == "inference":
        return ["prompts", "decode"]
    if job.kind == "sft":
        return ["step"]
    names = ["gradient", "prompts", "decode"]
    names += ["log-probabilities"] if job.config.needs_old_logprobs else []
    names += ["reference"] if job.config.objective.uses_reference else []
    names += ["reward model"] if job.reward_model is not None else []
    return [*names, "sync", "update"]


def arranged(job: Job, mesh: MeshConfig) -> tuple[Job, tuple[str, ...]]:
    """A job of inference on another mesh, and what was changed, as words for ``--set``."""
    words = tuple(_mesh_words("mesh", mesh))
    return changed(job, words), words


def trained_so(job: Job, way: TrainWay, decode: MeshConfig | None) -> tuple[Job, tuple[str, ...]]:
    """A job of training that computes its micro-batches so, and what was changed, as words for ``--set``.

    Args:
        job: It.
        way: How.
        decode: The mesh of its engine, if it has one.

    Raises:
        ValueError: Its batch cannot be divided so.
    """
    words = _mesh_words("mesh", way.mesh)
    if job.config.remat != way.remat:
        words.append(f"remat={str(way.remat).lower()}")
    if job.kind == "rl":
        assert decode is not None, "reinforcement learning has an engine"
        words += _mesh_words("decode_mesh", decode)
        if job.config.rows_per_micro_batch != way.total_rows:
            words.append(f"rows_per_micro_batch={way.total_rows}")
    else:
        parts, left = divmod(job.config.rows_per_step, way.total_rows)
        if left:
            raise ValueError(
                f"rows_per_step {job.config.rows_per_step} does not divide into micro-batches of {way.total_rows} rows"
            )
        if parts != job.config.accumulation:
            words.append(f"accumulation={parts}")
    return changed(job, words), tuple(words)


def _mesh_words(table: str, mesh: MeshConfig) -> list[str]:
    return [f"{table}.{axis}={size}" for axis, size in mesh.model_dump().items()]


def way_of(job: Job) -> TrainWay:
    """How a job of training computes its micro-batches."""
    config = job.config
    rows = config.rows_per_micro_batch if job.kind == "rl" else config.rows_per_step // config.accumulation
    return TrainWay(config.mesh, config.remat, rows // (config.mesh.data * config.mesh.fsdp))


def trained_of(job: Job) -> Trained:
    """What a job of training trains."""
    return Trained(job.model, job.row_length, job.config.lora is not None)


def changed(job: Job, words: Sequence[str]) -> Job:
    """The job with other settings, as ``--set`` has them.

    Raises:
        ValueError: They do not go together.
    """
    config = build(_CONFIGS[job.kind], job.config.model_dump(mode="json"), words, source=job.name)
    return replace(job, config=config)
