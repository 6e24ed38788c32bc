"""What a plan assumes that no job config says: lengths, prices, and how measured times compare."""

from pydantic import Field, PositiveFloat, PositiveInt

from qwq_jax.config.frozen import Frozen


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

    def of(self, chip: str, provisioning: str) -> float | None:
        """What an hour of a chip costs; None where nobody said."""
        return self.chip_hour.get(f"{chip}.{provisioning}")


class Measured(Frozen):
    """A program that was timed.

    Attributes:
        chip: Where, such as ``"v6e"``.
        program: Its name in a plan, such as ``"decode"``.
        seconds: What one run of it took.
        predicted: What the plan without calibration said.
    """

    chip: str
    program: str
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
