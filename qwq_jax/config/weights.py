"""How weights are stored and multiplied: 8 or 4 bits, as one short name such as ``int8`` or ``int4-g64-head``."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, PositiveInt

from qwq_jax.config.frozen import Frozen

DEFAULT_GROUP = 128
SMALLEST_GROUP = 16
FORMS = "int8, int4 or int4-gSIZE, each with -head to have the output head in 8 bits too"


class WeightFormat(Frozen):
    """Quantised weights of the projections; embedding, norms and biases keep the model's own dtype.

    Attributes:
        bits: 8: one scale an output channel. 4: one scale a group of the contraction and output channel.
        group: Of 4 bits, weights that share a scale; a projection that it does not divide uses the largest divisor of
            it that fits. ``None`` for 8 bits.
        head: The output head has 8 bits too, a scale a token of the vocabulary.
        activations: 8: the inputs of q, k, v, gate and up become int8 as well, one scale a token. How a model is run,
            not how it is stored.
    """

    bits: Literal[8, 4]
    group: PositiveInt | None = None
    head: bool = False
    activations: Literal[8, 16] = 16

    @property
    def name(self) -> str:
        """Its short name, without the activations."""
        group = f"-g{self.group}" if self.group not in (None, DEFAULT_GROUP) else ""
        return f"int{self.bits}{group}{'-head' if self.head else ''}"

    @property
    def stored(self) -> "WeightFormat":
        """What a checkpoint records: all but the activations."""
        return self.model_copy(update={"activations": 16})


def parse_weights(name: str) -> WeightFormat:
    """The format of a short name.

    Raises:
        ValueError: It is none.

    Example:
        >>> parse_weights("int4-g64-head")
        WeightFormat(bits=4, group=64, head=True, activations=16)
    """
    found = re.fullmatch(r"int(?:(8)|4(?:-g(\d{1,5}))?)(-head)?", name)
    if found is None:
        raise ValueError(f"weights {name!r} should be {FORMS}")
    head = found[3] is not None
    if found[1]:
        return WeightFormat(bits=8, head=head)
    group = int(found[2] or DEFAULT_GROUP)
    if group < SMALLEST_GROUP or group & (group - 1):
        raise ValueError(f"weights {name!r}: a group should be a power of two, {SMALLEST_GROUP} or more")
    return WeightFormat(bits=4, group=group, head=head)


def _check_name(name: str) -> str:
    parse_weights(name)
    return name


WeightName = Annotated[str, AfterValidator(_check_name)]


def choose_weights(
    stored: WeightFormat | None, wanted: str | None, activations: Literal["int8"] | None
) -> WeightFormat | None:
    """The format in which a model runs.

    Args:
        stored: Of the checkpoint; ``None`` if it is not quantised.
        wanted: ``engine.weights``.
        activations: ``engine.activations``.

    Raises:
        ValueError: The checkpoint holds another format, or activations cannot be quantised with it.
    """
    asked = parse_weights(wanted) if wanted is not None else None
    if stored is not None and asked is not None and asked != stored:
        raise ValueError(
            f"engine.weights={wanted}, but the checkpoint holds {stored.name} weights: leave engine.weights out, or "
            "convert the original again"
        )
    format = stored or asked
    if activations is None:
        return format
    if format is None or format.bits != 8:
        raise ValueError(
            f"engine.activations={activations} multiplies 8-bit weights, but these are "
            f"{'not quantised' if format is None else format.name}: set engine.weights=int8"
        )
    return format.model_copy(update={"activations": 8})
