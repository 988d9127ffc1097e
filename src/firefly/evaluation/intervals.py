"""How sure a difference between two models is: bootstrap intervals over rows, and a verdict that respects them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "no_difference", "too_few"]
"""Of the tuned model beside the base. "no_difference": the interval holds 0. "too_few": too few rows to say."""


@dataclass(frozen=True)
class Estimate:
    """A figure, and the interval that covers the true one 95 times of 100."""

    value: float
    low: float
    high: float
