"""PPO as pure functions of tensors: GAE, whitening, the clipped policy loss and value loss.

Every loss returns a sum over tokens. The caller divides once by the number of trained tokens of the
whole optimiser step, so that the gradient does not depend on how the step is cut into micro-batches
(Schulman et al., arXiv 1707.06347 and 1506.02438; RLVER, section 2). N counts trained tokens.
"""

import torch
from torch import Tensor


def gae(
    reward_N: Tensor, value_N: Tensor, gamma: float, lam: float, turns: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over one dialogue's trained tokens (GAE, eq. 11 to 16).

    User turns and glue are not in the vector, so nothing is discounted across them. The value after
    the last token is 0: every ending, the turn limit included, is a true end. Returns advantages
    [N] and returns [N].
        reward 0 0 1, value .2 .5 .6, gamma = lam = 1:  advantage .8 .5 .4   return 1 1 1
    With `turns`, the number of tokens in each, gamma and lam apply at the end of a turn and are 1
    within it: a reply is one action, all of whose tokens are praised for what it brought.
    """
    ends = torch.tensor(turns).cumsum(0) - 1 if turns else torch.arange(len(value_N))
    step = torch.zeros(len(value_N), dtype=torch.bool).index_fill(0, ends, True)  # time passes here
    advantage_N = torch.zeros_like(value_N)
    carried, next_value = 0.0, 0.0
    for t in reversed(range(len(value_N))):
        discount, decay = (gamma, lam) if step[t] else (1.0, 1.0)
        delta = reward_N[t] + discount * next_value - value_N[t]
        carried = delta + discount * decay * carried
        advantage_N[t] = carried
        next_value = value_N[t]
    return advantage_N, advantage_N + value_N


def whiten(x_N: Tensor) -> Tensor:
    """Zero mean and unit variance over all trained tokens of the global batch."""
    centred = x_N - x_N.mean()
    return centred / (centred.pow(2).mean().sqrt() + 1e-8)


def policy_loss(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate (PPO, eq. 7), approx_kl (k3) and clipped tokens, each as a sum."""
    log_ratio = logp_N - old_logp_N  # the gradient flows through logp_N alone
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage_N * ratio, -advantage_N * ratio.clamp(1 - clip, 1 + clip)).sum()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).sum()
        clipped = ((ratio - 1).abs() > clip).sum()
    return loss, approx_kl, clipped


def value_loss(value_N: Tensor, old_value_N: Tensor, return_N: Tensor, clip: float) -> Tensor:
    """Half the squared error of the value or the clipped value, whichever is larger, as a sum."""
    clipped = old_value_N + (value_N - old_value_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((value_N - return_N).pow(2), (clipped - return_N).pow(2)).sum()


def kl_loss(logp_N: Tensor, reference_logp_N: Tensor) -> Tensor:
    """k2, half the squared log-ratio, as a sum: its gradient is the reverse KL's, unlike k3's."""
    return 0.5 * (logp_N - reference_logp_N).pow(2).sum()


def explained_variance(value_N: Tensor, return_N: Tensor) -> float:
    """1 - Var(return - value) / Var(return): 1 is perfect, 0 no better than a constant."""
    spread = return_N.var(correction=0)
    return float(1 - (return_N - value_N).var(correction=0) / spread) if spread > 1e-12 else 0.0
