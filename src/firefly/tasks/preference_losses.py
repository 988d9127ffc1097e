"""Preference losses: pure functions of summed log-probabilities, one loss per pair, each with its paper.

A new loss is one function and one line in PREFERENCE_LOSSES. What they share, an NLL of the chosen answer, is added by
the trainer with `nll_weight`, since it is a mean over all tokens of the step and not over pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from firefly.config import PreferenceConfig


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of both answers of each pair, summed over their tokens, and their token counts; (pairs,) each.

    The reference's are zeros where a loss has no reference.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log π(chosen) / π_ref(chosen)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log π(rejected) / π_ref(rejected)."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """How much more the policy prefers the chosen answer than the reference does."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_chosen(self) -> Tensor:
        """Log-probability per token."""
        return self.chosen / self.chosen_tokens.clamp_min(1)

    @property
    def mean_rejected(self) -> Tensor:
        """Log-probability per token."""
        return self.rejected / self.rejected_tokens.clamp_min(1)


def sigmoid_loss(pair: PairLogps, config: PreferenceConfig) -> Tensor:
    """DPO, equation 7 of arXiv:2305.18290."""
    return -F.logsigmoid(config.beta * pair.margin)


def hinge_loss(pair: PairLogps, config: PreferenceConfig) -> Tensor:
    """SLiC's hinge on DPO's margin, as RSO has it (arXiv:2309.06657, section 3.3; SLiC: arXiv:2305.10425)."""
    return torch.relu(1 - config.beta * pair.margin)


def ipo_loss(pair: PairLogps, config: PreferenceConfig) -> Tensor:
    """IPO, equation 17 of arXiv:2310.12036 (beta is its τ), on ratios per token as its authors ran it."""
    margin = pair.chosen_ratio / pair.chosen_tokens.clamp_min(1) - pair.rejected_ratio / pair.rejected_tokens.clamp_min(
        1
    )
    return (margin - 1 / (2 * config.beta)) ** 2


def robust_loss(pair: PairLogps, config: PreferenceConfig) -> Tensor:
    """Robust DPO for labels that are wrong with probability `label_smoothing`, equation 3.3 of arXiv:2403.00409."""
    wrong = config.label_smoothing
    right = -F.logsigmoid(config.beta * pair.margin)
    flipped = -F.logsigmoid(-config.beta * pair.margin)
    return ((1 - wrong) * right - wrong * flipped) / (1 - 2 * wrong)


def apo_zero_loss(pair: PairLogps, config: PreferenceConfig) -> Tensor:
    """APO-zero, equation 7 of arXiv:2408.06266: for chosen answers that are better than the model's own."""
    return 1 - torch.sigmoid(config.beta * pair.chosen_ratio) + torch.sigmoid(config.beta * pair.rejected_ratio)


def apo_down_loss(pair: PairLogps, config: PreferenceConfig) -> Tensor:
    """APO-down, equation 8 of arXiv:2408.06266: for chosen answers that are worse than the model's own."""
    return torch.sigmoid(config.beta * pair.chosen_ratio) + 1 - torch.sigmoid(config.beta * pair.margin)


def simpo_loss(pair: PairLogps, config: PreferenceConfig) -> Tensor:
    """SimPO, equation 6 of arXiv:2405.14734; `simpo_gamma` is its target margin γ."""
    return _smoothed(config.beta * (pair.mean_chosen - pair.mean_rejected) - config.simpo_gamma, config.label_smoothing)


def cpo_loss(pair: PairLogps, config: PreferenceConfig) -> Tensor:
    """CPO's preference term, equation 3 of arXiv:2401.08417; its NLL term has the weight `cpo_alpha`."""
    return _smoothed(config.beta * (pair.chosen - pair.rejected), config.label_smoothing)


def orpo_loss(pair: PairLogps, config: PreferenceConfig) -> Tensor:
    """ORPO's odds-ratio term, equations 4 and 7 of arXiv:2403.07691, times beta (its λ); the SFT term comes on top."""
    log_odds = pair.mean_chosen - pair.mean_rejected - (_log1mexp(pair.mean_chosen) - _log1mexp(pair.mean_rejected))
    return -config.beta * F.logsigmoid(log_odds)


def _smoothed(margin: Tensor, wrong: float) -> Tensor:
    return -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, without cancellation on either side of −ln 2; an x of 0 counts as just below."""
    x = x.clamp_max(-torch.finfo(x.dtype).tiny)
    near = x > -0.6931472
    # Either branch is fed values that it is finite for: a NaN in the one not taken would reach the gradient.
    close = torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, -0.5))))
    far = torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, -1.0), x)))
    return torch.where(near, close, far)


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what it needs.

    Attributes:
        reference: whether it compares with a reference model.
        per_token: whether its rewards are per token.
        trains_prompt: its NLL term runs over the prompt, too (ORPO's own code, and TRL's).
    """

    loss: Callable[[PairLogps, PreferenceConfig], Tensor]
    reference: bool = True
    per_token: bool = False
    trains_prompt: bool = False


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid_loss),
    "hinge": PreferenceLoss(hinge_loss),
    "ipo": PreferenceLoss(ipo_loss),
    "robust": PreferenceLoss(robust_loss),
    "apo_zero": PreferenceLoss(apo_zero_loss),
    "apo_down": PreferenceLoss(apo_down_loss),
    "simpo": PreferenceLoss(simpo_loss, reference=False, per_token=True),
    "orpo": PreferenceLoss(orpo_loss, reference=False, per_token=True, trains_prompt=True),
    "cpo": PreferenceLoss(cpo_loss, reference=False),
}


def nll_weight(config: PreferenceConfig) -> float:
    """The weight of the chosen answers' mean NLL: `rpo_alpha` (arXiv:2404.19733), besides what the loss itself has."""
    own = {"orpo": 1.0, "cpo": config.cpo_alpha}.get(config.loss, 0.0)
    return own + config.rpo_alpha


def rewards(pair: PairLogps, config: PreferenceConfig) -> tuple[Tensor, Tensor]:
    """Implicit rewards of the chosen and the rejected answers, beta times the log-ratio; (pairs,) each.

    Without a reference the log-probability is used, per token where the loss is per token.
    """
    if PREFERENCE_LOSSES[config.loss].per_token:
        return config.beta * pair.mean_chosen, config.beta * pair.mean_rejected
    return config.beta * pair.chosen_ratio, config.beta * pair.rejected_ratio
