"""Angular distance between the states that enter and leave every span of decoder blocks.

Paper, section 2.1: d(l, n) = arccos(cos(h_l, h_{l+n})) / pi, where h_l is the state that enters block l
at the last token, averaged over the calibration samples. One Gram matrix of the L+1 unit states of a
sample holds the cosine of every (l, n) at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pair_distances(states: Array) -> Array:
    """Angular distances between all states of one sample.

    states: (L+1, hidden), the state entering each of the L blocks and the one leaving the last,
    before the final norm. Returns (L+1, L+1) in [0, 1]. Raises ValueError on a state that is zero or not finite.
    """
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError("a hidden state is zero or not finite")
    unit = states / norms
    return np.asarray(np.arccos(np.clip(unit @ unit.T, -1.0, 1.0)) / np.pi)


@dataclass
class RunningMoments:
    """Mean and variance over samples in constant memory (Welford's update)."""

    count: int = 0
    mean: Array = field(default_factory=lambda: np.zeros(()))
    squares: Array = field(default_factory=lambda: np.zeros(()))

    def add(self, value: Array) -> None:
        self.count += 1
        delta = value - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (value - self.mean)

    def std(self) -> Array:
        """Sample standard deviation; zero for a single sample."""
        return np.asarray(np.sqrt(self.squares / max(self.count - 1, 1)))


def by_span(matrix: Array) -> list[list[float | None]]:
    """Reorder (L+1, L+1) pair values to `m[n-1][l]`, null where the span l .. l+n-1 leaves the model."""
    layers = matrix.shape[0] - 1
    return [
        [float(matrix[start, start + count]) if start + count <= layers else None for start in range(layers)]
        for count in range(1, layers + 1)
    ]


def ranking(mean: list[list[float | None]]) -> list[list[int]]:
    """For every n (index n-1) the starts l, least important span first; ties go to the lower start."""
    ranked = []
    for row in mean:
        known = [(distance, start) for start, distance in enumerate(row) if distance is not None]
        ranked.append([start for _, start in sorted(known)])
    return ranked
