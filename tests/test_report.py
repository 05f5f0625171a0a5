"""What report.json says about the two arms."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import tasks.report
from tasks.domain.recipe import LOW_RECOVERY
from tasks.report import compare_arms
from tasks.report_page import render
from tests.test_report_page import sample_details, sample_report, text_of


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


def refs(*models: list[int]) -> Any:
    """Refs and item scores of the roles, each scored on one task."""
    facts = {"metric": "acc", "value": 0.0, "stderr": 0.0, "items": 4}
    roles = dict(zip(("unpruned", "sdd"), models, strict=True))
    scores = {role: {"mmlu": {"facts": facts}} for role in roles}
    return scores, {role: {"mmlu": np.array(values, dtype=np.float64)} for role, values in roles.items()}


NOTHING = "the unpruned model scores 0: there is nothing to recover"


@pytest.mark.parametrize(
    ("unpruned", "percent", "note"),
    [([0, 0, 0, 0], None, NOTHING), ([0, 0, 0, 1], 200.0, "no interval: in"), ([1, 1, 1, 1], 50.0, None)],
)
def test_what_cannot_be_said_of_recovery_is_null_and_the_page_says_why(
    unpruned: list[int], percent: float | None, note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, items = refs(unpruned, [1, 1, 0, 0])
    stages = {name: {"uri": f"s3://x/{name}"} for name in ("model", "merge sdd")}
    known, chance = ["mmlu"], {"mmlu": 0.2}
    models = [
        tasks.report._model(role, stages, scores[role], items)
        | tasks.report._beyond_the_average(role, stages, scores[role], items, chance, known)
        | {"perplexity": 20.0}
        for role in ("unpruned", "sdd")
    ]
    sdd = models[-1]
    assert sdd["recovered_percent"] == percent
    assert (sdd["interval"] is None) == (note is not None)
    assert (sdd["recovery_note"] or "").startswith(note or "") and bool(sdd["recovery_note"]) == bool(note)
    assert (sdd["chance_corrected_note"] is None) == (unpruned == [1, 1, 1, 1])
    assert (sdd["chance_corrected_interval"] is None) == bool(sdd["chance_corrected_note"])
    report = sample_report() | {"models": json.loads(json.dumps(models, allow_nan=False))}
    page = text_of(render(report, sample_details()))
    assert "nan" not in page
    for said in (sdd["recovery_note"], sdd["chance_corrected_note"]):
        assert said is None or said in page
    tables: list[Any] = []
    monkeypatch.setattr(tasks.report, "create_table_artifact", lambda table, **_: tables.extend(table))
    monkeypatch.setattr(tasks.report, "create_markdown_artifact", lambda *_, **__: None)
    tasks.report._show(report, "s3://x/report")
    expected = {None: "–", 200.0: "200.0 %", 50.0: "50.0 % ["}[percent]
    assert tables[-1]["recovered"].startswith(expected)


@pytest.mark.parametrize(
    ("below", "recovered", "told"), [(90.0, 80.0, True), (90.0, 90.0, False), (90.0, None, True), (None, None, False)]
)
def test_who_asked_is_told_of_a_low_or_unknown_recovery(
    below: float | None, recovered: float | None, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    monkeypatch.setattr(tasks.report, "emit_event", lambda name, **rest: events.append((name, rest["payload"])))
    model = {"recovered_percent": recovered, "recovery_note": None if recovered else NOTHING}
    tasks.report._alert(below, model, "run", "s3://x/report")
    assert [name for name, _ in events] == [LOW_RECOVERY] * told
    assert all(json.dumps(payload, allow_nan=False) for _, payload in events)
    sentence = NOTHING if recovered is None else "SDD recovered 80.0 %, less than runtime.alert_below=90.0"
    assert all(payload["told"].endswith(sentence) for _, payload in events)
