r"""Rewards that look at the shape of a reply: its tags and its ``\boxed{}``, and how long it is."""

import math
from dataclasses import dataclass

from qwq_jax.chat import THINK_CLOSE, THINK_OPEN
from qwq_jax.config.rewards import Curve, FormatConfig, LengthConfig
from qwq_jax.rl.rewards.answers import answer_text, last_boxed
from qwq_jax.rl.types import Reply, Score, Task


@dataclass(frozen=True)
class FormatReward:
    r"""Credit for thoughts that are closed once, and for a ``\boxed{}`` behind them."""

    config: FormatConfig

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply. The opening tag may be in the prompt, and so missing here, but it stands nowhere else."""
        opened = reply.text.count(THINK_OPEN)
        closed_well = (
            reply.text.count(THINK_CLOSE) == 1
            and (opened == 0 or (opened == 1 and reply.text.lstrip().startswith(THINK_OPEN)))
            and reply.thought is not None
            and bool(reply.answer.strip())
        )
        boxed = last_boxed(answer_text(reply)) is not None
        missing = [
            what for what, there in (("thoughts closed once", closed_well), ("a box in the answer", boxed)) if not there
        ]
        value = self.config.closed * closed_well + self.config.boxed * boxed
        return Score(float(value), note=f"without {' and '.join(missing)}" if missing else "")


@dataclass(frozen=True)
class LengthReward:
    r"""A value that falls, or rises, with the number of tokens.

    ``overlong`` is the soft punishment of DAPO (arXiv 2503.14476, equation 13): with :math:`L_{max}` the hard and
    :math:`L_{max} - L_{cache}` the soft number of tokens, it is 0 up to the soft one, ``(soft - tokens) / L_cache``
    between them, and -1 beyond. ``cosine`` is CosFn of Yeung et al. (arXiv 2502.03373).
    """

    config: LengthConfig

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply."""
        config = self.config
        way = (reply.tokens - config.soft_tokens) / (config.hard_tokens - config.soft_tokens)
        way = min(max(way, 0.0), 1.0)
        if config.curve is Curve.COSINE:
            way = (1 - math.cos(math.pi * way)) / 2
        return Score(config.shorter + (config.longer - config.shorter) * way, note=f"{reply.tokens} tokens")
