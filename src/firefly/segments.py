"""Segments: the parts of a packed row whose tokens attend to their own part only. Data and models share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """Tokens `start` … `end - 1` of a packed row, each of which sees the prefix (if any) and what of the segment came
    before it. A prefix lies in the same row and is seen whole: the prompt of a rejected answer.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


def segment_positions(segments: Sequence[Segment]) -> np.ndarray:
    """The position of every token in its segment, counted on from the segment's prefix; int64 (tokens,)."""
    parts = []
    for start, end, prefix_start, prefix_end in segments:
        prefix = prefix_end - prefix_start
        parts.append(np.arange(prefix, prefix + end - start))
    return np.concatenate(parts)
