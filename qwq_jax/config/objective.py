"""What reinforcement learning maximises: the published objectives by name, and each switch in which they differ."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator

from qwq_jax.config.frozen import Frozen

ObjectiveName = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "dapo", "gspo", "cispo", "ppo"]
Baseline = Literal["group_mean", "leave_one_out", "critic", "none"]
Scale = Literal["none", "group_std", "batch"]
Surrogate = Literal["clip", "cispo", "none"]
Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum", "constant"]
Kl = Literal["none", "k1_reward", "k2_loss", "k3_loss"]

# Each as its differences from the defaults of `ObjectiveConfig`, with the settings of its paper.
_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # DeepSeekMath, arXiv 2402.03300, section 4.
        "grpo": {"kl": "k3_loss", "kl_coefficient": 0.04},
        # Understanding R1-Zero-like training, arXiv 2503.20783, section 3.
        "dr_grpo": {"scale": "none", "aggregation": "constant"},
        # Back to basics, arXiv 2402.14740: the completion is one action, and there is nothing to clip.
        "rloo": {
            "baseline": "leave_one_out",
            "scale": "none",
            "surrogate": "none",
            "aggregation": "sequence_sum",
            "kl": "k1_reward",
            "kl_coefficient": 0.03,
        },
        # arXiv 2501.03262; its variant with a baseline is baseline group_mean and kl k2_loss.
        "reinforce++": {
            "baseline": "none",
            "scale": "batch",
            "aggregation": "token_mean",
            "kl": "k1_reward",
            "kl_coefficient": 0.01,
        },
        # arXiv 2503.14476; its soft punishment of overlong replies is a reward.
        "dapo": {"clip_high": 0.28, "aggregation": "token_mean", "uninformative_groups": "refill"},
        # arXiv 2507.18071, sections 4 and 5.
        "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        # MiniMax-M1, arXiv 2506.13585, section 3; the cap is that of ScaleRL, arXiv 2510.13786.
        "cispo": {"surrogate": "cispo", "aggregation": "token_mean"},
        # arXiv 1707.06347 as InstructGPT (arXiv 2203.02155, appendix C.4) applies it to language.
        "ppo": {
            "baseline": "critic",
            "scale": "batch",
            "aggregation": "token_mean",
            "kl": "k1_reward",
            "kl_coefficient": 0.02,
        },
    }
)

# Settings that only some values of a switch read: setting -> (switch, those values, what it is if nobody says).
_SETTINGS: Mapping[str, tuple[str, tuple[str, ...], float | None]] = MappingProxyType(
    {
        "clip_low": ("surrogate", ("clip",), 0.2),
        "clip_high": ("surrogate", ("clip",), 0.2),
        "delta": ("surrogate", ("clip",), None),
        "cap": ("surrogate", ("cispo",), 5.0),
        "kl_coefficient": ("kl", ("k1_reward", "k2_loss", "k3_loss"), 0.001),
        "rollout_cap": ("rollout_correction", ("truncate",), 2.0),
        "gamma": ("baseline", ("critic",), 1.0),
        "gae_lambda": ("baseline", ("critic",), 0.95),
        "value_clip": ("baseline", ("critic",), 0.2),
    }
)


class ObjectiveConfig(Frozen):
    r"""One objective: `name` sets every switch as its paper has it, and whatever else is given overrides that.

    With ``r`` the ratio of the policy to the one before the update, ``A`` the advantage and ``w`` the weight of a
    trained token, the loss is the sum over tokens of
    ``w (-correction surrogate(r, A) + kl_coefficient kl - entropy_coefficient entropy)``.

    Example:
        >>> config = ObjectiveConfig(name="dapo", kl="k2_loss")
        >>> config.clip_low, config.clip_high, config.aggregation, config.kl_coefficient
        (0.2, 0.28, 'token_mean', 0.001)

    Attributes:
        name: Which objective to start from.
        baseline: What is taken from a reward to make an advantage: the mean of its group, the mean of the others in
            it, the estimate of a critic (PPO), or nothing.
        scale: What advantages are divided by: nothing, the deviation of the rewards of the group, or that of the
            advantages of all tokens of the update, after taking their mean.
        ratio: Of each token, or the geometric mean over the completion, shared by its tokens (GSPO).
        surrogate: ``min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``; or ``min(r, cap) A log p`` with no gradient
            through ``r`` (CISPO); or ``r A``, which one update a batch makes REINFORCE.
        clip_low: How far the ratio pays off below 1.
        clip_high: How far it does above 1; more than `clip_low` is DAPO's clip-higher.
        delta: Two-sided clip (INTELLECT-2; dual clip): bounds ``r`` where the advantage is negative too. Off if None.
        cap: Most that CISPO weighs a token.
        aggregation: What a token weighs: mean over completions of their mean over tokens; mean over tokens; mean over
            completions of their sum; the same divided by the longest completion allowed (Dr.GRPO).
        kl: How the policy is held to the reference: ``log p / p_ref`` taken from the reward (k1), or half its square
            (k2) or ``p_ref / p - 1 - log p_ref / p`` (k3) added to the loss. On the policy's own samples the
            gradient of k2 is that of KL(p, p_ref), and that of k3 is that of KL(p_ref, p).
        kl_coefficient: How strongly; 0 only measures.
        entropy_coefficient: Reward for the entropy of the next token.
        rollout_correction: ``truncate`` weighs what the engine drew by ``min(p_old / p_rollout, rollout_cap)``, at the
            level of `ratio`: trainer and engine never compute quite the same probabilities.
        rollout_cap: Most that this can weigh.
        mask_truncated: Leave completions that ran into the limit out of losses, baselines and denominators alike.
        uninformative_groups: Groups of equal rewards have nothing to say: keep them (they count in the denominator),
            drop them, or refill the batch with others (DAPO's dynamic sampling).
        gamma: Discount of a later token, for the critic.
        gae_lambda: Trust in rewards over the critic: 1 believes rewards only.
        value_clip: How far a value may move from that before the update; 0 is no bound.
    """

    name: ObjectiveName = "grpo"
    baseline: Baseline = "group_mean"
    scale: Scale = "group_std"
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Surrogate = "clip"
    clip_low: float | None = Field(default=None, gt=0.0, le=1.0)
    clip_high: PositiveFloat | None = None
    delta: PositiveFloat | None = None
    cap: float | None = Field(default=None, ge=1.0)
    aggregation: Aggregation = "sequence_mean"
    kl: Kl = "none"
    kl_coefficient: NonNegativeFloat | None = None
    entropy_coefficient: NonNegativeFloat = 0.0
    rollout_correction: Literal["truncate", "none"] = "truncate"
    rollout_cap: float | None = Field(default=None, ge=1.0)
    mask_truncated: bool = False
    uninformative_groups: Literal["keep", "drop", "refill"] = "keep"
    gamma: float | None = Field(default=None, gt=0.0, le=1.0)
    gae_lambda: float | None = Field(default=None, ge=0.0, le=1.0)
    value_clip: NonNegativeFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Puts the preset under what is given, and takes out of it what a switch that was turned no longer reads."""
        if not isinstance(data, dict):
            return data
        name = data.get("name", cls.model_fields["name"].default)
        preset = _PRESETS.get(name, {}) if isinstance(name, str) else {}
        filled = {**preset, **data}
        for setting, (switch, values, default) in _SETTINGS.items():
            if filled.get(switch, cls.model_fields[switch].default) not in values:
                if setting not in data:
                    filled.pop(setting, None)
            elif filled.get(setting) is None:
                filled[setting] = default
        return filled

    @field_validator("kl", mode="before")
    @classmethod
    def _no_gradient_in_k1(cls, value: Any) -> Any:
        if value in ("k1", "k1_loss"):
            raise ValueError(
                f"{value} in the loss has a gradient of zero on average, so it would hold nothing: "
                "take k1_reward, k2_loss or k3_loss"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for setting, value in self.settings.items():
            switch, readers, _ = _SETTINGS[setting]
            chosen = self.switches[switch]
            if value is not None and chosen not in readers:
                raise ValueError(
                    f"{setting} {value} has a meaning where {switch} is {' or '.join(readers)}, not {chosen}"
                )
        if self.delta is not None and self.clip_high is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(f"delta {self.delta} must lie above 1 + clip_high, which is {1 + self.clip_high:g}")
        if not self.uses_groups:
            if self.scale == "group_std":
                raise ValueError(f"scale group_std needs a baseline of the group, not {self.baseline}")
            if self.uninformative_groups != "keep":
                raise ValueError(
                    f"uninformative_groups {self.uninformative_groups} needs a baseline of the group: with baseline "
                    f"{self.baseline}, equal rewards still teach"
                )
        if self.ratio == "sequence" and self.advantage_by_token:
            cause = "baseline critic" if self.uses_critic else "kl k1_reward with baseline none"
            raise ValueError(f"ratio sequence needs one advantage a completion, and {cause} gives one a token")
        return self

    @property
    def switches(self) -> Mapping[str, str]:
        """The switches that others depend on, by name."""
        return {
            "surrogate": self.surrogate,
            "kl": self.kl,
            "rollout_correction": self.rollout_correction,
            "baseline": self.baseline,
        }

    @property
    def settings(self) -> Mapping[str, float | None]:
        """The settings that depend on a switch, by name; None where it does not read them."""
        return {
            "clip_low": self.clip_low,
            "clip_high": self.clip_high,
            "delta": self.delta,
            "cap": self.cap,
            "kl_coefficient": self.kl_coefficient,
            "rollout_cap": self.rollout_cap,
            "gamma": self.gamma,
            "gae_lambda": self.gae_lambda,
            "value_clip": self.value_clip,
        }

    @property
    def uses_groups(self) -> bool:
        """Whether completions are compared with others of the same prompt."""
        return self.baseline in ("group_mean", "leave_one_out")

    @property
    def uses_critic(self) -> bool:
        """Whether a critic is trained beside the policy."""
        return self.baseline == "critic"

    @property
    def uses_reference(self) -> bool:
        """Whether log-probabilities of the reference are needed."""
        return self.kl != "none"

    @property
    def learns_by_advantage_alone(self) -> bool:
        """Whether a completion whose advantages are all zero has no gradient."""
        return not (self.uses_critic or self.entropy_coefficient or self.kl in ("k2_loss", "k3_loss"))

    @property
    def advantage_by_token(self) -> bool:
        """Whether the tokens of one completion may have different advantages."""
        return self.uses_critic or (self.baseline == "none" and self.kl == "k1_reward")


class DpoConfig(Frozen):
    """Direct preference optimisation.

    Attributes:
        loss: ``sigmoid`` is DPO (arXiv 2305.18290), ``ipo`` the squared form that cannot run away (arXiv 2310.12036).
        beta: How closely the reference is kept to; the larger, the closer.
        label_smoothing: Part of the preferences that is taken to be the wrong way round (conservative DPO).
    """

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: PositiveFloat = 0.1
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing {self.label_smoothing} has a meaning where loss is sigmoid, not ipo")
        return self
