"""Distance between the states that enter and leave every span of decoder blocks.

Paper, section 2.1: d(l, n) = arccos(cos(h_l, h_{l+n})) / pi, where h_l is the state that enters block l
at the last token, averaged over the calibration samples. One Gram matrix of the L+1 unit states of a
token holds the cosine of every (l, n) at once. Block influence (Men et al. 2024, ShortGPT, formula 1) is
1 - cos(h_l, h_{l+n}), averaged over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TOKENS_AT_ONCE = 64  # bounds the float64 copy of a sample's states
REPLICATES = 200


def pair_distances(states: NDArray[np.floating[Any]], metric: str = "angular") -> Array:
    """Distances between all states of one sample, averaged over its tokens.

    states: (tokens, L+1, hidden), the state entering each of the L blocks and the one leaving the last,
    before the final norm, of any float type. metric: "angular", in [0, 1], or "block_influence", in [0, 2].
    Returns (L+1, L+1). Raises ValueError on a state that is zero or not finite.
    """
    total = np.zeros((states.shape[1], states.shape[1]))
    for first in range(0, len(states), TOKENS_AT_ONCE):
        some = states[first : first + TOKENS_AT_ONCE].astype(np.float64)
        norms = np.linalg.norm(some, axis=2, keepdims=True)
        if not (np.isfinite(norms).all() and (norms > 0).all()):
            raise ValueError("a hidden state is zero or not finite")
        unit = some / norms
        cosines = np.clip(unit @ unit.transpose(0, 2, 1), -1.0, 1.0)
        total += (np.arccos(cosines) / np.pi if metric == "angular" else 1 - cosines).sum(axis=0)
    return np.asarray(total / len(states))


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


class BootstrapRanking:
    """How the ranking would vary with other samples: a Poisson bootstrap, in memory that no sample adds to.

    Each sample enters each replicate Poisson(1) times, as drawing with replacement does in the limit.
    """

    def __init__(self, seed: int, replicates: int = REPLICATES) -> None:
        self.generator = np.random.default_rng(seed)
        self.weights = np.zeros(replicates)
        self.totals: Array = np.zeros(())

    def add(self, value: Array) -> None:
        self.totals = self.totals + self._drawn()[:, None, None] * value

    def resume(self, count: int, totals: Array) -> None:
        """Go on from the totals that a ranking of the same seed had after so many samples."""
        for _ in range(count):
            self._drawn()
        self.totals = totals

    def _drawn(self) -> Array:
        """How often the next sample enters each replicate."""
        drawn = self.generator.poisson(1.0, len(self.weights)).astype(np.float64)
        self.weights += drawn
        return drawn

    def first_share(self) -> list[list[float | None]]:
        """`m[n-1][l]`: share of the replicates in which start l is the least important one for n blocks."""
        drawn = self.totals[self.weights > 0]  # a handful of samples may miss a replicate altogether
        layers = drawn.shape[1] - 1
        shares = np.zeros((layers + 1, layers + 1))
        for count in range(1, layers + 1):
            starts = np.arange(layers - count + 1)
            firsts = drawn[:, starts, starts + count].argmin(axis=1)
            shares[starts, starts + count] = np.bincount(firsts, minlength=len(starts)) / len(drawn)
        return by_span(shares)


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
