"""The objectives in float64 torch as their papers write them: completion by completion, token by token, no packing.

Nothing here is shared with the package. Each function takes samples and returns the loss; the gradient lies in
``leaf(sample).grad`` afterwards.
"""

import statistics

import numpy as np
import torch

from tests.rl.samples import LONGEST, TEMPERATURE

EPS = 1e-6  # beside a deviation


class Policy:
    """Log-probabilities and entropies of each sample, of leaves that gather gradients."""

    def __init__(self, samples, temperature=TEMPERATURE):
        self.leaves = [torch.tensor(s.logits, dtype=torch.float64, requires_grad=True) for s in samples]
        self.tables = [torch.log_softmax(leaf / temperature, -1) for leaf in self.leaves]
        self.samples = samples

    def logp(self, i, t):
        return self.tables[i][t - 1, int(self.samples[i].tokens[t])]

    def entropy(self, i, t):
        row = self.tables[i][t - 1]
        return -(row.exp() * row).sum()

    def gradients(self, loss):
        loss.backward()
        return float(loss.detach()), [leaf.grad.numpy() for leaf in self.leaves]


def exp(x):
    return torch.exp(torch.as_tensor(x, dtype=torch.float64))


def tis(sample, t, cap):
    """Weight of a token that the engine drew."""
    return 1.0 if cap is None else min(float(np.exp(sample.old[t] - sample.rollout[t])), cap)


def group_of(samples, i):
    return [s.reward for s in samples if s.group == samples[i].group]


def grpo_advantage(samples, i):
    rewards = group_of(samples, i)
    return (samples[i].reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + EPS)


def clipped(ratio, advantage, low=0.2, high=0.2, delta=None):
    """min(r A, clip(r) A); INTELLECT-2 takes min(r, delta) in the first."""
    first = ratio if delta is None or ratio < delta else torch.tensor(delta, dtype=torch.float64)
    second = torch.clamp(ratio, 1 - low, 1 + high)
    return torch.minimum(first * advantage, second * advantage)


def k2(logp, ref):
    return (logp - ref) ** 2 / 2


def k3(logp, ref):
    return exp(ref - logp) - (ref - logp) - 1


def grpo(policy, samples, *, beta=0.04, kl=k3, cap=2.0, delta=None, entropy=0.0, low=0.2, high=0.2):
    total = 0.0
    for i, s in enumerate(samples):
        own = 0.0
        for t in s.places:
            ratio = exp(policy.logp(i, t) - s.old[t])
            own += tis(s, t, cap) * clipped(ratio, grpo_advantage(samples, i), low, high, delta)
            own += entropy * policy.entropy(i, t) - beta * kl(policy.logp(i, t), s.ref[t])
        total += own / s.length
    return -total / len(samples)


def dr_grpo(policy, samples):
    total = 0.0
    for i, s in enumerate(samples):
        advantage = s.reward - statistics.fmean(group_of(samples, i))
        for t in s.places:
            total += tis(s, t, 2.0) * clipped(exp(policy.logp(i, t) - s.old[t]), advantage)
    return -total / (len(samples) * LONGEST)


def rloo(policy, samples, beta=0.03):
    """REINFORCE with the mean of the others as baseline; rewards bear the KL of the whole completion."""
    rewards = [s.reward - beta * sum(s.old[t] - s.ref[t] for t in s.places) for s in samples]
    total = 0.0
    for i, s in enumerate(samples):
        others = [rewards[j] for j, other in enumerate(samples) if other.group == s.group and j != i]
        advantage = rewards[i] - sum(others) / len(others)
        for t in s.places:
            total += tis(s, t, 2.0) * exp(policy.logp(i, t) - s.old[t]) * advantage
    return -total / len(samples)


def reinforce_pp(policy, samples, beta=0.01):
    """Rewards less the KL that is still to come, standardised over all tokens of the batch."""
    raw = {}
    for i, s in enumerate(samples):
        for t in s.places:
            raw[i, t] = s.reward - beta * sum(s.old[u] - s.ref[u] for u in s.places if u >= t)
    mean, deviation = statistics.fmean(raw.values()), statistics.pstdev(raw.values())
    total = 0.0
    for (i, t), value in raw.items():
        ratio = exp(policy.logp(i, t) - samples[i].old[t])
        total += tis(samples[i], t, 2.0) * clipped(ratio, (value - mean) / (deviation + EPS))
    return -total / len(raw)


def dapo(policy, samples, cap=2.0):
    total, count = 0.0, 0
    for i, s in enumerate(samples):
        for t in s.places:
            ratio = exp(policy.logp(i, t) - s.old[t])
            total += tis(s, t, cap) * clipped(ratio, grpo_advantage(samples, i), 0.2, 0.28)
            count += 1
    return -total / count


def gspo(policy, samples, low=3e-4, high=4e-4):
    total = 0.0
    for i, s in enumerate(samples):
        ratio = exp(sum(policy.logp(i, t) - s.old[t] for t in s.places) / s.length)
        mismatch = np.exp(np.mean([s.old[t] - s.rollout[t] for t in s.places]))
        total += min(float(mismatch), 2.0) * clipped(ratio, grpo_advantage(samples, i), low, high)
    return -total / len(samples)


def cispo(policy, samples, most=5.0):
    total, count = 0.0, 0
    for i, s in enumerate(samples):
        for t in s.places:
            weight = min(float(exp(policy.logp(i, t).detach() - s.old[t])), most)
            total += tis(s, t, 2.0) * weight * grpo_advantage(samples, i) * policy.logp(i, t)
            count += 1
    return -total / count


def gae(rewards, values, gamma, lam):
    """A_t as the double sum of its definition."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]


def ppo(policy, samples, beta=0.02, gamma=1.0, lam=0.95):
    raw = {}
    for i, s in enumerate(samples):
        rewards = [-beta * (s.old[t] - s.ref[t]) for t in s.places]
        rewards[-1] += s.reward
        for t, value in zip(s.places, gae(rewards, [s.old_values[t] for t in s.places], gamma, lam), strict=True):
            raw[i, t] = value
    mean, deviation = statistics.fmean(raw.values()), statistics.pstdev(raw.values())
    total = 0.0
    for (i, t), value in raw.items():
        ratio = exp(policy.logp(i, t) - samples[i].old[t])
        total += tis(samples[i], t, 2.0) * clipped(ratio, (value - mean) / (deviation + EPS))
    return -total / len(raw)


PAPERS = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_pp,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "ppo": ppo,
}


def paper(form, samples, temperature=TEMPERATURE, **options):
    """Loss and gradients by a paper's formula."""
    policy = Policy(samples, temperature)
    return policy.gradients(form(policy, samples, **options))
