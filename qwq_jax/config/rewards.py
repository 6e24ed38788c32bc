r"""What a reply is rewarded for: a list of rewards, summed by weight.

In TOML::

    [[rewards]]
    kind = "math"
    sources = ["gsm8k", "math"]

    [[rewards]]
    kind = "format"
    weight = 0.1

Every kind has the same fields beside its own, and the classes below describe only the latter:

- ``name``: what its part of the sum is called in metrics and reports; empty takes the kind;
- ``weight``: what its value is multiplied by; a negative weight punishes;
- ``sources``: the sources of tasks that it judges; empty judges all;
- ``when``: counts it always, or only where the reply is ``correct`` or ``wrong`` by the rewards that judge that;
- ``seconds``: when its verifier is killed, and its part is 0; a reward model has no such limit.
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from qwq_jax.config.frozen import Frozen


class When(StrEnum):
    """Of which replies a reward counts."""

    ALWAYS = "always"
    CORRECT = "correct"
    WRONG = "wrong"


class Take(StrEnum):
    r"""Which piece of the answer, thoughts left out, is compared."""

    BOXED = "boxed"
    """What the last ``\boxed{}`` holds."""
    LAST_LINE = "last_line"
    """The last line that is not blank."""
    ANSWER = "answer"
    """All of it."""


class Curve(StrEnum):
    """How a length reward falls from `shorter` to `longer`."""

    OVERLONG = "overlong"
    """0, then linearly to -1 (DAPO, section 3.4)."""
    LINEAR = "linear"
    COSINE = "cosine"


class Isolation(StrEnum):
    """Where programs that a model wrote run."""

    BUBBLEWRAP = "bubblewrap"
    """In namespaces of their own, without network, files, environment or other processes."""
    NONE = "none-i-trust-this-code"
    """In an ordinary process with limits of time and memory: it can read and write whatever the user can."""


WhenField = Annotated[When, Field(strict=False)]
TakeField = Annotated[Take, Field(strict=False)]


class MathConfig(Frozen):
    r"""The last ``\boxed{}`` of the answer equals ``judge.answer``, as mathematics (math-verify).

    Attributes:
        digits: Decimal places to which numbers have to agree where one of them is a decimal.
    """

    kind: Literal["math"] = "math"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 8.0
    digits: int = Field(default=6, ge=0, le=15)


class ExactConfig(Frozen):
    """A piece of the answer is ``judge.answer``, or one of them if it is a list, but for spaces and punctuation.

    Attributes:
        take: Which piece.
        case: Whether capitals matter.
    """

    kind: Literal["exact"] = "exact"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 5.0
    take: TakeField = Take.BOXED
    case: bool = False


class NumericConfig(Frozen):
    """A piece of the answer is a number near enough to ``judge.answer``.

    Fractions, thousands separators, percentages and units behind the number are understood; see `quantity.py`.

    Attributes:
        take: Which piece; its last number counts unless it is a ``boxed`` one, which has to be a number as a whole.
        absolute: How far it may be off.
        relative: How far it may be off, as a part of the right number; the larger of both is allowed.
    """

    kind: Literal["numeric"] = "numeric"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 5.0
    take: TakeField = Take.BOXED
    absolute: NonNegativeFloat = 0.0
    relative: NonNegativeFloat = 1e-6


class ArithmeticConfig(Frozen):
    r"""The last boxed integer of the answer is ``judge.answer``, an integer: the tasks of the embedded model."""

    kind: Literal["arithmetic"] = "arithmetic"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 5.0


class ReasoningGymConfig(Frozen):
    """What reasoning-gym's own verifier says of ``judge.entry``, an entry of one of its data sets.

    Attributes:
        take: Which piece of the answer is handed to the verifier.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 10.0
    take: TakeField = Take.BOXED


class FormatConfig(Frozen):
    r"""The shape of a reply: thoughts that are closed exactly once, then an answer with a ``\boxed{}``.

    Attributes:
        closed: Credit for thoughts closed exactly once, with something behind them.
        boxed: Credit for a ``\boxed{}`` in the answer that is not empty.
    """

    kind: Literal["format"] = "format"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 5.0
    closed: float = 0.5
    boxed: float = 0.5


class CodeConfig(Frozen):
    """The program in the answer's last fenced block passes ``judge.tests``, in a sandbox; see `programs.py`.

    Attributes:
        seconds: Wall-clock time for all tests of one program.
        test_seconds: Wall-clock time for one test.
        partial: Gives the share of tests passed, rather than 1 for all and 0 for fewer.
        tolerance: How far numbers may be off, absolutely or relatively; 0 compares them as text and value.
        memory_mib: Address space of the program.
        output_kib: Output that is read; a program that writes more fails.
        scratch_mib: Room for files; 0 lets it write none.
        threads: Threads of the program; it cannot start processes.
        packages: Directories with packages that it may import, beside the standard library.
        sandbox: Where it runs.
    """

    kind: Literal["code"] = "code"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 30.0
    test_seconds: PositiveFloat = 5.0
    partial: bool = False
    tolerance: NonNegativeFloat = 0.0
    memory_mib: int = Field(default=512, ge=64)
    output_kib: PositiveInt = 1024
    scratch_mib: int = Field(default=16, ge=0)
    threads: PositiveInt = 16
    packages: tuple[str, ...] = ()
    sandbox: Annotated[Isolation, Field(strict=False)] = Isolation.BUBBLEWRAP


class InstructionsConfig(Frozen):
    """The answer keeps the rules in ``judge.instructions``; see `rules.py` for them.

    Attributes:
        partial: Gives the share of rules kept, rather than 1 for all and 0 for fewer.
    """

    kind: Literal["instructions"] = "instructions"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 5.0
    partial: bool = False


class LengthConfig(Frozen):
    """How long a reply is, in tokens, thoughts and the end token included.

    Up to `soft_tokens` it is worth `shorter`, from `hard_tokens` on `longer`, and between them the curve goes down. A
    ``cosine`` beginning at 0 tokens, once with ``when = "correct"`` and once, rising, with ``when = "wrong"``, is the
    reward of Yeung et al., "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373).

    Attributes:
        curve: The form; ``overlong`` goes from 0 to -1 and takes no other values.
        soft_tokens: Where the change begins.
        hard_tokens: Where it ends.
        shorter: The value of short replies.
        longer: The value of long ones.
    """

    kind: Literal["length"] = "length"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 5.0
    curve: Annotated[Curve, Field(strict=False)] = Curve.OVERLONG
    soft_tokens: int = Field(ge=0)
    hard_tokens: PositiveInt
    shorter: float = 0.0
    longer: float = -1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.soft_tokens >= self.hard_tokens:
            raise ValueError(f"soft_tokens {self.soft_tokens} is not less than hard_tokens {self.hard_tokens}")
        if self.curve is Curve.OVERLONG and (self.shorter, self.longer) != (0.0, -1.0):
            raise ValueError("curve overlong goes from 0 to -1: for other values take linear, or a weight")
        return self


def _function_path(path: str) -> str:
    module, colon, function = path.partition(":")
    if not (colon and all(part.isidentifier() for part in [*module.split("."), function])):
        raise ValueError(f"expected module:function, got {path!r}")
    return path


class CustomConfig(Frozen):
    """A function of the user's: ``def reward(task: Task, reply: Reply) -> Score | float | bool``.

    Attributes:
        function: ``module:function``; the module is found as the command that trains would find it.
    """

    kind: Literal["custom"] = "custom"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    seconds: PositiveFloat = 10.0
    function: Annotated[str, AfterValidator(_function_path)]


class RewardModelConfig(Frozen):
    """What a trained reward model says of the conversation with the reply's answer.

    The model runs on the devices of training: the trainer computes its values and adds them to what the worker
    processes return, by `Graded.with_values`.

    Attributes:
        checkpoint: Directory of the reward model.
        thoughts: Whether it reads the thoughts too.
        clip: Values are cut to plus and minus this.
    """

    kind: Literal["model"] = "model"
    name: str = ""
    weight: float = 1.0
    sources: tuple[str, ...] = ()
    when: WhenField = When.ALWAYS
    checkpoint: str
    thoughts: bool = False
    clip: PositiveFloat = 10.0


VerifierConfig = (
    MathConfig
    | ExactConfig
    | NumericConfig
    | ArithmeticConfig
    | ReasoningGymConfig
    | FormatConfig
    | CodeConfig
    | InstructionsConfig
    | LengthConfig
    | CustomConfig
)
"""Rewards that worker processes compute."""

RewardConfig = Annotated[VerifierConfig | RewardModelConfig, Field(discriminator="kind")]
"""Any reward, by its `kind`."""


def reward_name(config: VerifierConfig | RewardModelConfig) -> str:
    """What the part of a reward is called: its `name`, or its kind."""
    return config.name or config.kind


def _checked(configs: Sequence[VerifierConfig | RewardModelConfig]) -> Sequence[VerifierConfig | RewardModelConfig]:
    if not configs:
        raise ValueError("expected at least one reward")
    twice = next((name for name, count in Counter(map(reward_name, configs)).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"two rewards are called {twice}: give one of them another name")
    return configs


RewardConfigs = Annotated[tuple[RewardConfig, ...], AfterValidator(_checked)]
"""The rewards of a run: at least one, and no two of one name."""
