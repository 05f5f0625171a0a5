"""The arms over several seeds, from the files that the evaluations leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.sweep import arms, changed
from tasks.domain.errors import ConfigError
from tasks.domain.recipe import load_preset
from tests.conftest import write_jsonl

SCORES = {("sft", 0): [1, 0, 0, 0], ("sft", 1): [1, 1, 0, 0], ("sdd", 0): [1, 1, 1, 0], ("sdd", 1): [1, 1, 0, 0]}


def report(folder: Path, seed: int, rows: int) -> dict[str, Any]:
    stages = []
    for arm in ("sft", "sdd"):
        path = folder / f"{arm}-{seed}"
        path.mkdir(exist_ok=True)
        samples = [{"task": "x", "doc_id": place, "acc": score} for place, score in enumerate(SCORES[arm, seed])]
        write_jsonl(path / "samples_winogrande.jsonl", samples)
        stages.append({"name": f"evaluate {arm} winogrande", "uri": str(path)})
    return {"dataset": {"rows": rows}, "stages": stages}


def test_every_item_counts_with_its_mean_over_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.sweep.folder_of", lambda ref: Path(ref["uri"]))  # the store, which has tests of its own
    found = [((6, seed, None), report(tmp_path, seed, 12)) for seed in (0, 1)]
    both, alone = arms([*found, ((3, 0, None), report(tmp_path, 0, 12))])
    assert (both["blocks"], both["rows"], both["seeds"], alone["blocks"], alone["seeds"]) == (6, 12, 2, 3, 1)
    assert (both["sft"], both["sdd"]) == (0.375, 0.625)
    assert both["difference"] == pytest.approx(0.25)
    assert (both["interval_low"], both["interval_high"]) == (0.0, 0.5), "of the items' means: 0, 0.5, 0.5 and 0"
    assert (alone["sft"], alone["sdd"], alone["interval_high"]) == (0.25, 0.75, 1.0)


def test_sizes_beyond_what_the_dataset_has_are_lines_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.sweep.folder_of", lambda ref: Path(ref["uri"]))
    lines = list(arms([((6, 0, wanted), report(tmp_path, 0, 12)) for wanted in (10, 20)]))
    assert [(line["rows"], line["seeds"]) for line in lines] == [(12, 1), (12, 1)]


def test_a_wrong_point_is_refused_by_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"^preset demo-cpu: prune\.blocks=0: "):
        changed(load_preset("demo-cpu"), 0, 0, None)
