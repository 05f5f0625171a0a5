"""What report.json says about the two arms."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.report import compare_arms


@pytest.mark.parametrize(
    ("gain", "words"), [(0.2, "SDD beats SFT at 95 %"), (-0.2, "SFT beats SDD at 95 %"), (0.0, "cannot be told apart")]
)
def test_the_arms_are_compared_in_words_that_follow_from_the_interval(gain: float, words: str) -> None:
    generator = np.random.default_rng(0)
    sft = {task: generator.random(60) for task in ("mmlu", "gsm8k")}
    sdd = {task: items + gain + 0.01 * generator.standard_normal(60) for task, items in sft.items()}
    found = compare_arms(sdd, sft)
    low, high = found["interval"]
    assert low < found["value"] < high and found["value"] == pytest.approx(gain, abs=0.01)
    assert (low > 0, high < 0) == (gain > 0, gain < 0)
    assert words in found["statement"]
    assert f"{found['value']:+.4f}" in found["statement"] and f"{low:+.4f} to {high:+.4f}" in found["statement"]
