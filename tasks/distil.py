"""The self-distilled dataset: the unpruned model rewrites every answer (paper, section 2.2)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.domain.recipe import Distil, Runtime
from tasks.domain.stage import Stage
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of, materialise
from tasks.policies import STAGE


@task(task_run_name="distil {stage.slug}", **STAGE)
def distil(stage: Stage, model: Ref, rows: Ref, settings: Distil, runtime: Runtime) -> State[Ref]:
    """Write rows.jsonl with rewrite, outcome, reason and answer. facts: rows of each outcome, and why."""

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        source = folder_of(rows) / "rows.jsonl"
        request = {
            "checkpoint": str(folder_of(model)),
            "rows": str(source),
            **settings.model_dump(),
            "messages": settings.messages(),
        }
        run_child("distil", request, out, runtime, progress)
        return ledger(out / "rows.jsonl")

    return materialise(stage, produce, engine=True)


def ledger(path: Path) -> dict[str, Any]:
    """How many rows had each outcome, and the reasons of those that were not accepted."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    outcomes = Counter(row["outcome"] for row in rows)
    reasons = Counter(row["reason"] for row in rows if row["reason"])
    return {
        "rows": len(rows), **{name: outcomes[name] for name in ("accepted", "kept_original", "failed")},
        "reasons": dict(reasons.most_common()),
    }  # fmt: skip
