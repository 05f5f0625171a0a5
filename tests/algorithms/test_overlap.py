"""The n-gram check against a search through all runs of words."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.algorithms.overlap import BenchmarkText

ITEM = "A train leaves the station at noon and travels sixty miles an hour for two hours"
WORDS = st.lists(st.sampled_from(["one", "two", "three"]), max_size=24).map(" ".join)


def by_search(items: list[str], text: str, length: int) -> bool:
    words = re.findall(r"\w+", text.lower())
    for item in items:
        wanted = re.findall(r"\w+", item.lower())
        size = min(length, len(wanted))
        runs = {tuple(wanted[start : start + size]) for start in range(len(wanted) - size + 1)}
        if size >= 6 and any(tuple(words[start : start + size]) in runs for start in range(len(words) - size + 1)):
            return True
    return False


@given(st.lists(WORDS, max_size=3), WORDS, st.integers(6, 9))
def test_overlaps_are_those_of_a_full_search(items: list[str], text: str, length: int) -> None:
    assert BenchmarkText(items, length).overlaps(text) == by_search(items, text, length)


@pytest.mark.parametrize(
    ("text", "overlaps"),
    [
        (f"Question: {ITEM}. How far?", True),
        (ITEM.upper().replace(" ", ",\n"), True),
        ("leaves the station at noon and travels sixty miles an hour for two days", True),
        ("leaves the station at noon and travels fifty miles an hour for two hours", False),
        ("", False),
    ],
)
def test_case_and_punctuation_do_not_hide_thirteen_words(text: str, overlaps: bool) -> None:
    assert BenchmarkText([ITEM], 13).overlaps(text) == overlaps


def test_short_items_count_whole_and_very_short_ones_not_at_all() -> None:
    known = BenchmarkText(["What is the capital of France", "Two plus two"], 13)
    assert known.overlaps("Tell me: what is the capital of France?")
    assert not known.overlaps("What is the capital of Spain? Two plus two.")
