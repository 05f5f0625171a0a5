"""Recovery and its paired intervals against counting every possible draw."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.algorithms import recovery
from tasks.algorithms.recovery import (
    above_chance,
    average,
    bootstrap_averages,
    chance_corrected_percent,
    difference,
    mean_and_error,
    recovered_by_task,
    recovered_percent,
)

Items = NDArray[np.float64]


def items(*values: float) -> Items:
    return np.array(values, dtype=np.float64)


def random_scores(seed: int, rate: float) -> dict[str, Items]:
    generator = np.random.default_rng(seed)
    return {
        task: (generator.random(count) < rate).astype(np.float64) for task, count in (("a", 40), ("b", 25), ("c", 9))
    }


def every_draw(models: list[dict[str, Items]]) -> list[tuple[float, ...]]:
    """Averages of the models for every possible draw of items with replacement, the same draw for all."""
    tasks = sorted(models[0])
    per_task = [list(itertools.product(range(len(models[0][task])), repeat=len(models[0][task]))) for task in tasks]
    outcomes = []
    for draws in itertools.product(*per_task):
        averages = []
        for model in models:
            means = [
                statistics.fmean(float(model[task][item]) for item in draw)
                for task, draw in zip(tasks, draws, strict=True)
            ]
            averages.append(statistics.fmean(means))
        outcomes.append(tuple(averages))
    return outcomes


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_mean_and_error_equal_the_textbook(values: list[float]) -> None:
    mean, error = mean_and_error(np.array(values))
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    assert error == pytest.approx(statistics.stdev(values) / len(values) ** 0.5, abs=1e-9)


def test_a_single_item_has_no_error() -> None:
    assert mean_and_error(items(0.25)) == (0.25, 0.0)


def test_every_task_counts_alike() -> None:
    assert average({"small": items(1.0), "large": np.zeros(99)}) == 0.5


@settings(max_examples=25)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=40).filter(any), st.lists(st.integers(0, 1), max_size=9))
def test_the_unpruned_model_has_recovered_exactly_all(first: list[int], second: list[int]) -> None:
    scores = {"a": np.array(first, dtype=np.float64)} | ({"b": np.array(second, dtype=np.float64)} if second else {})
    if min(first) == 0:  # a draw of wrong answers alone has no ratio
        scores = {task: values + 0.07 for task, values in scores.items()}
    found = recovered_percent(scores, {task: values.copy() for task, values in scores.items()})
    assert (found.value, found.low, found.high) == (100.0, 100.0, 100.0)


@pytest.mark.parametrize("seed", range(9))
def test_the_unpruned_model_has_recovered_exactly_all_above_chance(seed: int) -> None:
    scores = random_scores(seed, 0.7)
    again = {task: values.copy() for task, values in scores.items()}
    found = chance_corrected_percent(scores, again, dict.fromkeys(scores, 0.25), list(scores), seed)
    assert (found.value, found.low, found.high) == (100.0, 100.0, 100.0)


def test_a_difference_to_itself_is_exactly_zero() -> None:
    found = difference(random_scores(1, 0.5), random_scores(1, 0.5))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_draws_are_those_of_a_paired_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of all outcomes agree with counting each of the 27 * 4 possible draws."""
    monkeypatch.setattr(recovery, "REPLICATES", 40_000)
    models = {"one": {"a": items(1, 0, 0.5), "b": items(1, 0)}, "two": {"a": items(0, 1, 0.25), "b": items(0.5, 1)}}
    drawn = bootstrap_averages(models, seed=3)
    assert {name: len(values) for name, values in drawn.items()} == {"one": 40_000, "two": 40_000}
    possible = [(round(one, 9), round(two, 9)) for one, two in every_draw([models["one"], models["two"]])]
    found = [(round(float(a), 9), round(float(b), 9)) for a, b in zip(drawn["one"], drawn["two"], strict=True)]
    assert set(found) == set(possible), "pairs that no common draw can give, or that never come"
    for outcome in set(possible):
        assert found.count(outcome) / len(found) == pytest.approx(possible.count(outcome) / len(possible), abs=0.01)


@pytest.mark.parametrize("kind", ["ratio", "difference"])
def test_intervals_are_percentiles_of_all_draws(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "REPLICATES", 40_000)
    one, two = {"a": items(0.9, 0.2, 0.4, 0.7)}, {"a": items(0.5, 0.6, 0.8, 0.3)}
    outcomes = every_draw([one, two])
    if kind == "ratio":
        found, exact = recovered_percent(one, two), sorted(100 * a / b for a, b in outcomes)
        assert found.value == pytest.approx(100 * 0.55 / 0.55)
    else:
        found, exact = difference(one, two), sorted(a - b for a, b in outcomes)
        assert found.value == pytest.approx(0.0)
    spread = exact[-1] - exact[0]
    assert found.low == pytest.approx(exact[int(0.025 * len(exact))], abs=0.03 * spread)
    assert found.high == pytest.approx(exact[int(0.975 * len(exact))], abs=0.03 * spread)


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_holds_the_value(seed: int) -> None:
    model, unpruned = random_scores(seed, 0.4), random_scores(seed + 50, 0.6)
    for found in (recovered_percent(model, unpruned), difference(model, unpruned)):
        assert found.low < found.value < found.high


def test_better_on_every_item_is_better_with_certainty() -> None:
    worse = random_scores(2, 0.5)
    better = {task: values + 0.01 * np.arange(1, len(values) + 1) for task, values in worse.items()}
    found = difference(better, worse)
    assert 0 < found.low <= found.value <= found.high
    assert recovered_percent(better, worse).low > 100
    turned = difference(worse, better)
    assert turned.high < 0 and turned.value == pytest.approx(-found.value)


def test_pairing_makes_the_interval_narrow() -> None:
    """A constant gain is certain when the same items are drawn for both, and uncertain when they are not."""
    base = random_scores(4, 0.5)
    gained = {task: values + 0.1 for task, values in base.items()}
    paired = difference(gained, base)
    assert paired.high - paired.low < 1e-9
    shuffled = {task: np.random.default_rng(0).permutation(values) for task, values in gained.items()}
    unpaired = difference(shuffled, base)
    assert unpaired.high - unpaired.low > 0.05


def test_the_seed_decides_the_draws() -> None:
    model, unpruned = random_scores(1, 0.4), random_scores(9, 0.6)
    assert recovered_percent(model, unpruned, 1) == recovered_percent(model, unpruned, 1)
    assert recovered_percent(model, unpruned, 1) != recovered_percent(model, unpruned, 2)


def test_order_of_tasks_and_models_does_not_matter() -> None:
    one, two = random_scores(1, 0.4), random_scores(9, 0.6)
    turned = dict(reversed(one.items())), dict(reversed(two.items()))
    found, expected = recovered_percent(*turned), recovered_percent(one, two)
    assert (found.low, found.high) == (expected.low, expected.high)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    ahead, behind = bootstrap_averages({"x": one, "y": two}, 0), bootstrap_averages({"y": two, "x": one}, 0)
    assert all(np.array_equal(ahead[name], behind[name]) for name in "xy")


@pytest.mark.parametrize(
    "other",
    [
        {"a": items(1, 0)},
        {"a": items(1, 0, 1), "b": items(1)},
        {"c": items(1, 0, 1)},
        {},
    ],
    ids=["fewer items", "one more task", "another task", "nothing"],
)
def test_scores_on_other_items_are_never_compared(other: dict[str, Items]) -> None:
    scores = {"a": items(1, 0, 1)}
    for compare in (recovered_percent, difference):
        with pytest.raises(ValueError, match="not scored on the same items"):
            compare(scores, other)


def test_each_task_recovers_by_itself() -> None:
    model, unpruned = random_scores(3, 0.4), random_scores(53, 0.6)
    found = recovered_by_task(model | {"never": np.zeros(30)}, unpruned | {"never": np.zeros(30)})
    rarely = recovered_by_task({"a": items(1, 0, 0, 0)}, {"a": items(0, 1, 0, 0)})
    assert found["never"] is None and rarely == {"a": None}, "a draw with nothing right has no ratio"
    for task in unpruned:
        assert found[task] == recovered_percent({task: model[task]}, {task: unpruned[task]})
        assert (estimate := found[task]) is not None and estimate.low < estimate.value < estimate.high


def test_without_a_right_answer_of_the_unpruned_model_there_is_no_recovery() -> None:
    found = recovered_percent({"a": items(1, 0), "b": items(0)}, {"a": items(0, 0), "b": items(0)})
    assert all(map(math.isnan, (found.value, found.low, found.high)))
    assert found.note == "the unpruned model scores 0: there is nothing to recover"
    level = chance_corrected_percent({"a": items(1, 0)}, {"a": items(1, 0)}, {"a": 0.5}, ["a"])
    assert math.isnan(level.value) and level.note.startswith("the unpruned model does not beat guessing")


@pytest.mark.parametrize("right", [1, 2, 3])
def test_an_interval_is_that_of_the_draws_with_a_ratio_if_nearly_all_have_one(
    right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five items so many are right: every possible draw says how often there is no ratio, and the interval."""
    monkeypatch.setattr(recovery, "REPLICATES", 20_000)
    unpruned = {"a": items(*[1.0] * right, *[0.0] * (5 - right))}
    model = {"a": items(0.9, 0.2, 0.4, 0.7, 0.3)}
    outcomes = every_draw([model, unpruned])
    ratios = sorted(100 * part / whole for part, whole in outcomes if whole)
    lost = 1 - len(ratios) / len(outcomes)
    found = recovered_percent(model, unpruned)
    assert found.value == pytest.approx(100 * 0.5 / (right / 5)), "known whatever the draws"
    if lost > 0.05:
        assert math.isnan(found.low) and math.isnan(found.high)
        percent = int(found.note.removeprefix("no interval: in ").split(" %")[0])
        assert percent == pytest.approx(100 * lost, abs=1.5)
    else:
        assert lost > 0 and not found.note
        assert found.low == pytest.approx(ratios[int(0.025 * len(ratios))], rel=0.03)
        assert found.high == pytest.approx(ratios[int(0.975 * len(ratios))], rel=0.03)
    assert (recovered_by_task(model, unpruned)["a"] is None) == (lost > 0.05)


@pytest.mark.parametrize("chance", [0.2, 0.3, 0.4])
def test_draws_at_chance_have_no_ratio_above_it(chance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws in which the unpruned model answers just as guessing does, or worse, would divide by 0 or turn the sign."""
    monkeypatch.setattr(recovery, "REPLICATES", 20_000)
    unpruned, model = {"a": items(1, 1, 1, 1, 0)}, {"a": items(1, 0.5, 0.5, 1, 0.4)}
    outcomes = every_draw([model, unpruned])
    ratios = sorted(100 * (part - chance) / (whole - chance) for part, whole in outcomes if whole > chance + 1e-6)
    found = chance_corrected_percent(model, unpruned, {"a": chance}, ["a"])
    assert found.value == pytest.approx(100 * (0.68 - chance) / (0.8 - chance))
    if len(ratios) < 0.95 * len(outcomes):
        assert math.isnan(found.low) and "draws the unpruned model does not beat guessing" in found.note
    else:
        assert found.low == pytest.approx(ratios[int(0.025 * len(ratios))], abs=2)
        assert found.high == pytest.approx(ratios[int(0.975 * len(ratios))], abs=2)


def test_tasks_at_chance_are_those_whose_interval_reaches_it() -> None:
    at, above = items(*[1.0, 0.0, 0.0, 0.0] * 25), items(*[1.0, 1.0, 0.0, 0.0] * 25)
    error = statistics.stdev(above.tolist()) / 10
    assert above_chance({"at": at, "above": above}, {"at": 0.25, "above": 0.25}) == ["above"]
    for chance, kept in ((0.5 - 1.9 * error, False), (0.5 - 2.0 * error, True)):
        assert (above_chance({"a": above}, {"a": chance}) == ["a"]) == kept


def test_recovery_above_chance_counts_from_guessing_up() -> None:
    unpruned = {"a": items(1, 1, 1, 0), "b": items(1, 1, 0, 0), "left": items(1, 0, 0, 0)}
    model = {"a": items(1, 1, 0, 0), "b": items(1, 0, 0, 0), "left": items(1, 1, 1, 1)}
    chance = {"a": 0.25, "b": 0.0, "left": 0.25}
    found = chance_corrected_percent(model, unpruned, chance, ["a", "b"])
    assert found.value == pytest.approx(100 * (0.375 - 0.125) / (0.625 - 0.125))
    assert chance_corrected_percent(unpruned, unpruned, chance, ["a", "b"]).value == 100
    guessing = {"a": items(1, 0, 0, 0), "b": items(0, 0, 0, 0)}
    assert chance_corrected_percent(guessing, unpruned, chance, ["a", "b"]).value == pytest.approx(0)


def test_interval_above_chance_is_that_of_the_corrected_draws() -> None:
    model, unpruned = random_scores(1, 0.5), random_scores(2, 0.8)
    chance = dict.fromkeys(model, 0.25)
    found = chance_corrected_percent(model, unpruned, chance, list(model), seed=3)
    draws = bootstrap_averages({"m": model, "u": unpruned}, 3)
    ratios = 100 * (draws["m"] - 0.25) / (draws["u"] - 0.25)
    assert [found.low, found.high] == pytest.approx(np.percentile(ratios, [2.5, 97.5]).tolist())
