"""What a plan assumes that no job config says: lengths, prices, and how measured times compare."""

from typing import Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from qwq_jax.config.frozen import Frozen

ChipName = Literal["v4", "v5e", "v5p", "v6e", "tpu7x"]
Provisioning = Literal["on-demand", "spot", "reserved", "flex-start"]
ProgramName = Literal[
    "prompts", "decode", "step", "gradient", "sync", "update", "log-probabilities", "reference", "reward model"
]


class Workload(Frozen):
    """Mean lengths of what is asked and answered.

    Attributes:
        prompt_tokens: Of a prompt.
        completion_tokens: Of a completion, thoughts included.
    """

    prompt_tokens: PositiveInt = 1024
    completion_tokens: PositiveInt = 4096

    @property
    def live_tokens(self) -> int:
        """Mean length of a sequence that is being completed: all of its prompt and half of its completion."""
        return self.prompt_tokens + self.completion_tokens // 2


class Prices(Frozen):
    """What chips cost; a file that users fill with what they pay.

    Attributes:
        currency: Of the figures.
        chip_hour: Price of an hour of one chip, by ``CHIP.PROVISIONING``, such as ``"v5e.spot"``.
    """

    currency: str = "USD"
    chip_hour: dict[str, PositiveFloat] = Field(default_factory=dict)

    @field_validator("chip_hour")
    @classmethod
    def _are_known(cls, chip_hour: dict[str, float]) -> dict[str, float]:
        known = [f"{chip}.{how}" for chip in get_args(ChipName) for how in get_args(Provisioning)]
        if unknown := next((name for name in chip_hour if name not in known), None):
            raise ValueError(
                f"{unknown!r} is no CHIP.PROVISIONING: of {', '.join(get_args(ChipName))}, and "
                f"{', '.join(get_args(Provisioning))}"
            )
        return chip_hour

    def of(self, chip: str, provisioning: str) -> float | None:
        """What an hour of a chip costs; None where nobody said."""
        return self.chip_hour.get(f"{chip}.{provisioning}")


class Measured(Frozen):
    """A program that was timed, as an entry ``[[measured]]`` of a calibration file.

    Attributes:
        chip: Where, such as ``"v6e"``; ``"this machine"`` is what `tools.plan_check` runs on.
        program: Its name in a plan, such as ``"decode"``.
        seconds: What one run of it took.
        predicted: What the plan without calibration said: in its plan.json ``programs.NAME.seconds.total``.
    """

    chip: ChipName | Literal["this machine"]
    program: ProgramName
    seconds: PositiveFloat
    predicted: PositiveFloat


class Calibration(Frozen):
    """Measurements that correct the plans of later jobs on such chips.

    Attributes:
        measured: One entry a program; several of one program are averaged.
    """

    measured: tuple[Measured, ...] = Field(default=())

    def factor(self, chip: str, program: str) -> float:
        """Measured over predicted, the geometric mean; 1 where nothing was measured."""
        ratios = [
            each.seconds / each.predicted for each in self.measured if (each.chip, each.program) == (chip, program)
        ]
        product = 1.0
        for ratio in ratios:
            product *= ratio ** (1 / len(ratios))
        return product
