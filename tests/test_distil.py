"""The ledger of a self-distilled dataset, and the floor under its rate of accepted rewrites."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.distil import _check_rate, ledger
from tasks.domain.errors import GateError


def rows(accepted: int, kept: int, failed: int) -> list[dict[str, Any]]:
    outcomes = ["accepted"] * accepted + ["kept_original"] * kept + ["failed"] * failed
    reasons = {"accepted": "", "kept_original": "unfinished", "failed": "prompt too long"}
    return [
        {"id": f"r-{number}", "outcome": outcome, "reason": reasons[outcome], "rewrite": f"text {number}"}
        for number, outcome in enumerate(outcomes)
    ]


def test_every_row_is_counted_once_with_its_reason() -> None:
    assert ledger(rows(5, 3, 2)) == {
        "rows": 10, "accepted": 5, "kept_original": 3, "failed": 2,
        "reasons": {"unfinished": 3, "prompt too long": 2},
    }  # fmt: skip


def test_a_model_that_cannot_rewrite_is_refused_with_the_ten_worst_examples() -> None:
    _check_rate(rows(2, 18, 0), 0.1)
    with pytest.raises(GateError) as caught:
        _check_rate(rows(1, 14, 5), 0.1)
    message = str(caught.value)
    assert "only 1 of 20 rewrites were accepted, fewer than distil.min_accept_rate=0.1" in message
    shown = [line for line in message.splitlines() if line.startswith("- ")]
    assert len(shown) == 10 and shown[0] == "- r-1 (unfinished): 'text 1'"
