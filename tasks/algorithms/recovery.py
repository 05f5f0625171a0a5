"""How much of the unpruned model's quality a model has, with intervals (paper, section 3: quality recovery).

recovered = average over the tasks / the unpruned model's average. Both models answer the same items, so the
interval comes from a paired bootstrap: items are drawn with replacement within each task, the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = Mapping[str, NDArray[np.float64]]  # task -> score of each item

REPLICATES = 2000
CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959964  # of CONFIDENCE, two-sided
NOTHING = 1e-9  # an average that is 0 but for rounding


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; nan where there is none, and `note` says why."""

    value: float
    low: float
    high: float
    note: str = ""


def mean_and_error(items: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of the items and its standard error (0 for a single item)."""
    error = items.std(ddof=1) / np.sqrt(len(items)) if len(items) > 1 else 0.0
    return float(items.mean()), float(error)


def average(scores: Scores) -> float:
    """The leaderboard's average: each task counts alike, whatever its number of items."""
    return float(np.mean([items.mean() for items in scores.values()]))


def recovered_percent(model: Scores, unpruned: Scores, seed: int = 0) -> Estimate:
    """100 * average(model) / average(unpruned) with its paired bootstrap interval, as far as they are defined."""
    draws = bootstrap_averages({"model": model, "unpruned": unpruned}, seed)
    return _percent(average(model), average(unpruned), draws["model"], draws["unpruned"], "scores 0")


def recovered_by_task(model: Scores, unpruned: Scores, seed: int = 0) -> dict[str, Estimate | None]:
    """The same of each task alone; None where the unpruned model is right so rarely that there is no interval."""
    found = {task: recovered_percent({task: model[task]}, {task: unpruned[task]}, seed) for task in unpruned}
    return {task: None if math.isnan(estimate.low) else estimate for task, estimate in found.items()}


def above_chance(unpruned: Scores, chance: Mapping[str, float]) -> list[str]:
    """The tasks that the unpruned model itself answers better than guessing, at CONFIDENCE."""
    scored = {task: mean_and_error(items) for task, items in unpruned.items()}
    return [task for task, (mean, error) in scored.items() if mean - NORMAL_QUANTILE * error > chance[task]]


def chance_corrected_percent(
    model: Scores, unpruned: Scores, chance: Mapping[str, float], tasks: Sequence[str], seed: int = 0
) -> Estimate:
    """100 * (average(model) - c) / (average(unpruned) - c) over these tasks, c being the average of their chances.

    Raw averages flatter a damaged model: what it scores by guessing counts as quality kept.
    """
    level = float(np.mean([chance[task] for task in tasks]))
    chosen = {name: {task: scores[task] for task in tasks} for name, scores in (("m", model), ("u", unpruned))}
    draws = bootstrap_averages(chosen, seed)
    return _percent(
        average(chosen["m"]) - level, average(chosen["u"]) - level, draws["m"] - level, draws["u"] - level,
        "does not beat guessing",
    )  # fmt: skip


def difference(first: Scores, second: Scores, seed: int = 0) -> Estimate:
    """average(first) - average(second) with its paired bootstrap interval."""
    draws = bootstrap_averages({"first": first, "second": second}, seed)
    return _estimate(average(first) - average(second), draws["first"] - draws["second"])


def bootstrap_averages(models: Mapping[str, Scores], seed: int) -> dict[str, NDArray[np.float64]]:
    """Averages of each model over REPLICATES draws of items; every model sees the same draws.

    Raises ValueError unless all models have the same tasks with the same number of items.
    """
    shapes = {name: {task: len(items) for task, items in scores.items()} for name, scores in models.items()}
    if len({tuple(sorted(shape.items())) for shape in shapes.values()}) != 1:
        raise ValueError(f"the models were not scored on the same items: {shapes}")
    generator = np.random.default_rng(seed)
    totals = {name: np.zeros(REPLICATES) for name in models}
    tasks = next(iter(shapes.values()))
    for task, count in sorted(tasks.items()):
        stacked = np.stack([models[name][task] for name in models])
        for replicate in range(REPLICATES):
            drawn = stacked[:, generator.integers(0, count, count)].mean(axis=1)
            for name, value in zip(models, drawn, strict=True):
                totals[name][replicate] += value / len(tasks)
    return totals


def _percent(part: float, whole: float, parts: NDArray[np.float64], wholes: NDArray[np.float64], lack: str) -> Estimate:
    """100 * part / whole, the interval from those draws whose whole is above 0, if at least CONFIDENCE of them are.

    lack: what the unpruned model does where there is no ratio.
    """
    if whole <= NOTHING:
        return Estimate(math.nan, math.nan, math.nan, f"the unpruned model {lack}: there is nothing to recover")
    usable = wholes > NOTHING
    percent = 100 * (part / whole)  # x / x is 1, 100 * x / x may not be 100
    if usable.mean() < CONFIDENCE:
        rate = f"in {100 * (1 - usable.mean()):.0f} % of the bootstrap's draws"
        return Estimate(percent, math.nan, math.nan, f"no interval: {rate} the unpruned model {lack}; score more items")
    return _estimate(percent, 100 * (parts[usable] / wholes[usable]))


def _estimate(value: float, draws: NDArray[np.float64]) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))
