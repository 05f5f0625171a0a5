"""Angular distances and their moments against loops that recompute them one number at a time."""

from __future__ import annotations

import math
import pickle
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from tasks.algorithms.angular import BootstrapRanking, RunningMoments, by_span, pair_distances, ranking

Array = NDArray[np.float64]

ACCURACY = 1e-7  # arccos loses half of the digits near a cosine of one

STATES = hnp.arrays(
    np.float64, st.tuples(st.integers(2, 7), st.integers(1, 5)), elements=st.floats(-100, 100, allow_subnormal=False)
).filter(lambda states: bool((np.abs(states).max(axis=1) > 1e-3).all()))


def distances_of(states: Array) -> Array:
    """Of a sample whose only token has these states."""
    return pair_distances(states[None])


def naive_distance(one: list[float], other: list[float]) -> float:
    dot = sum(x * y for x, y in zip(one, other, strict=True))
    cosine = dot / (math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(y * y for y in other)))
    return math.acos(max(-1.0, min(1.0, cosine))) / math.pi


@given(STATES)
def test_pair_distances_equal_the_formula(states: Array) -> None:
    found, rows = distances_of(states), states.tolist()
    assert found.shape == (len(rows), len(rows)) and found.dtype == np.float64
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            assert found[i, j] == pytest.approx(naive_distance(one, other), abs=ACCURACY)


@given(STATES)
def test_distances_are_symmetric_and_in_bounds(states: Array) -> None:
    found = distances_of(states)
    assert ((found >= 0) & (found <= 1)).all()
    assert np.allclose(found, found.T, atol=ACCURACY)
    assert np.allclose(np.diag(found), 0, atol=ACCURACY)


@given(STATES, st.floats(1e-3, 1e3))
def test_the_length_of_a_state_does_not_count(states: Array, factor: float) -> None:
    scaled = states.copy()
    scaled[0] *= factor
    assert np.allclose(distances_of(scaled), distances_of(states), atol=ACCURACY)


@pytest.mark.parametrize(
    ("other", "distance"),
    [([2.0, 0.0], 0.0), ([1.0, 1.0], 0.25), ([0.0, 5.0], 0.5), ([-1.0, 1.0], 0.75), ([-3.0, 0.0], 1.0)],
)
def test_known_angles(other: list[float], distance: float) -> None:
    assert distances_of(np.array([[1.0, 0.0], other]))[0, 1] == pytest.approx(distance, abs=1e-12)


def test_rounding_does_not_leave_the_domain_of_arccos() -> None:
    """A unit vector's product with itself may come out a little above one."""
    states = np.repeat(np.random.default_rng(0).normal(size=(1, 4096)), 3, axis=0) * [[1.0], [7.0], [-3.0]]
    found = distances_of(states)
    assert np.isfinite(found).all()
    assert np.allclose(found, [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=ACCURACY)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_state_without_direction_is_refused(bad: float, row: int) -> None:
    states = np.ones((3, 4))
    states[row] = bad
    with pytest.raises(ValueError, match="zero or not finite"):
        distances_of(states)


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 20), st.integers(1, 4)), elements=st.floats(-1e3, 1e3)))
def test_running_moments_equal_those_of_all_samples_at_once(samples: Array) -> None:
    moments = RunningMoments()
    for sample in samples:
        moments.add(sample)
    assert moments.count == len(samples)
    for column, values in enumerate(samples.T.tolist()):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        assert moments.mean[column] == pytest.approx(statistics.fmean(values), abs=1e-9)
        assert moments.std()[column] == pytest.approx(deviation, rel=1e-7, abs=1e-6)


def test_running_moments_keep_small_spreads_on_a_large_mean() -> None:
    """Sums of squares would lose all digits here."""
    samples = 1e8 + np.random.default_rng(0).normal(size=(500, 3))
    moments = RunningMoments()
    for sample in samples:
        moments.add(sample)
    assert np.allclose(moments.mean, samples.mean(axis=0), rtol=1e-14)
    assert np.allclose(moments.std(), samples.std(axis=0, ddof=1), rtol=1e-6)


def test_running_moments_do_not_change_what_they_are_given() -> None:
    moments, sample = RunningMoments(), np.array([1.0, 2.0])
    moments.add(sample)
    moments.add(np.array([3.0, 6.0]))
    assert sample.tolist() == [1.0, 2.0]
    assert moments.mean.tolist() == [2.0, 4.0]


def test_one_sample_has_no_spread() -> None:
    moments = RunningMoments()
    moments.add(np.array([[0.5, 0.25]]))
    assert moments.std().tolist() == [[0.0, 0.0]]


def test_by_span_lays_counts_out_in_rows_and_starts_in_columns() -> None:
    matrix = np.array([[10.0 * i + j for j in range(4)] for i in range(4)])  # the entry (i, j) reads "ij"
    assert by_span(matrix) == [[1.0, 12.0, 23.0], [2.0, 13.0, None], [3.0, None, None]]


@given(st.integers(1, 9))
def test_by_span_covers_every_span_and_no_other(layers: int) -> None:
    matrix = np.arange((layers + 1) ** 2, dtype=np.float64).reshape(layers + 1, layers + 1)
    found = by_span(matrix)
    assert [len(row) for row in found] == [layers] * layers
    for count in range(1, layers + 1):
        for start in range(layers):
            expected = matrix[start][start + count] if start + count <= layers else None
            assert found[count - 1][start] == expected


def test_the_first_and_the_last_block_can_be_the_least_important() -> None:
    axes = np.eye(4)
    first = by_span(distances_of(axes[[0, 0, 1, 2]]))
    last = by_span(distances_of(axes[[0, 1, 2, 2]]))
    assert ranking(first)[0][0] == 0
    assert ranking(last)[0][0] == 2


def test_ranking_puts_the_nearest_states_first_and_leaves_nulls_out() -> None:
    mean: list[list[float | None]] = [[0.3, 0.1, 0.2], [0.5, 0.4, None], [0.9, None, None]]
    assert ranking(mean) == [[1, 2, 0], [1, 0], [0]]


def test_equal_distances_go_to_the_lower_start() -> None:
    assert ranking([[0.2, 0.1, 0.1, 0.2]]) == [[1, 2, 0, 3]]


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=8))
def test_ranking_is_a_stable_sort(row: list[float | None]) -> None:
    (starts,) = ranking([row])
    known = [start for start, value in enumerate(row) if value is not None]
    assert sorted(starts) == known
    assert starts == sorted(known, key=lambda start: (row[start], start))


@pytest.mark.parametrize("metric", ["angular", "block_influence"])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_a_sample_of_many_tokens_is_their_mean(metric: str, tokens: int) -> None:
    """More tokens than are worked on at once, and float32 states, as an engine gives them."""
    states = np.random.default_rng(tokens).normal(size=(tokens, 5, 8)).astype(np.float32)
    found = pair_distances(states, metric)
    for i in range(5):
        for j in range(5):
            angles = [naive_distance(token[i].tolist(), token[j].tolist()) for token in states.astype(float)]
            each = angles if metric == "angular" else [1 - math.cos(math.pi * angle) for angle in angles]
            assert found[i, j] == pytest.approx(statistics.mean(each), abs=ACCURACY)


def test_bootstrap_of_a_clear_order_never_changes_it() -> None:
    ranking_of = BootstrapRanking(seed=0)
    for sample in range(20):
        ranking_of.add(np.array([[0, 1, 5], [1, 0, 2], [5, 2, 0]]) + sample / 1000)
    assert ranking_of.first_share() == [[1.0, 0.0], [1.0, None]]


def test_bootstrap_shares_follow_the_samples() -> None:
    """Start 0 is first in the mean of a draw exactly when more samples that favour it were drawn than others."""
    favour = [np.array([[0, a, 1], [a, 0, b], [1, b, 0]]) for a, b in ((1.0, 2.0), (2.0, 1.0))]
    even, mostly = BootstrapRanking(0, 4000), BootstrapRanking(0, 4000)
    for number in range(30):
        even.add(favour[number % 2])
        mostly.add(favour[number % 3 == 0])
    by_hand = np.random.default_rng(1).binomial(30, 2 / 3, 40000)  # drawing 30 with replacement from 20 and 10
    assert even.first_share()[0][0] == pytest.approx(0.5, abs=0.07)
    assert mostly.first_share()[0][0] == pytest.approx(float((by_hand > 15).mean()), abs=0.04)
    assert sum(share for share in mostly.first_share()[0] if share) == pytest.approx(1)


def test_a_bootstrap_that_goes_on_is_that_of_an_undisturbed_pass() -> None:
    samples = np.random.default_rng(2).random((9, 5, 5))
    whole, stopped, resumed = (BootstrapRanking(seed=4) for _ in range(3))
    for number, sample in enumerate(samples):
        whole.add(sample)
        if number < 6:
            stopped.add(sample)
    resumed.resume(6, stopped.totals)
    for sample in samples[6:]:
        resumed.add(sample)
    assert np.array_equal(resumed.totals, whole.totals) and np.array_equal(resumed.weights, whole.weights)
    assert resumed.first_share() == whole.first_share()


def test_memory_of_scoring_does_not_grow_with_the_samples() -> None:
    def held(samples: int) -> int:
        moments, bootstrap = RunningMoments(), BootstrapRanking(0)
        for _ in range(samples):
            matrix = np.ones((7, 7))
            moments.add(matrix)
            bootstrap.add(matrix)
        kept = (moments.mean, moments.squares, bootstrap.totals, bootstrap.weights)
        return len(pickle.dumps((vars(moments), vars(bootstrap)))) + sum(array.nbytes for array in kept)

    assert held(200) == pytest.approx(held(100), rel=0.01)
