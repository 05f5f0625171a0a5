"""Which texts share a run of words with a benchmark item (n-gram check of Brown et al. 2020, appendix C)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

WORD = re.compile(r"\w+")
SHORTEST = 6  # words; a shorter item is too common a phrase to prove anything


class BenchmarkText:
    """The n-grams of all benchmark items; an item shorter than n words counts as one gram of its own length."""

    def __init__(self, items: Iterable[str], length: int) -> None:
        self.length = length
        self.grams: dict[int, set[int]] = {}
        for item in items:
            words = WORD.findall(item.lower())
            size = min(length, len(words))
            if size >= SHORTEST:
                self.grams.setdefault(size, set()).update(_runs(words, size))

    def overlaps(self, text: str) -> bool:
        """Whether the text holds n words of an item in a row, or the whole of a shorter one."""
        words = WORD.findall(text.lower())
        return any(not known.isdisjoint(_runs(words, size)) for size, known in self.grams.items())


def _runs(words: list[str], size: int) -> Iterator[int]:
    return (hash(tuple(words[start : start + size])) for start in range(len(words) - size + 1))
