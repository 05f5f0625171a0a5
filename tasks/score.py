"""Importance of every span of blocks (paper, section 2.1)."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.domain.recipe import Calibration, Runtime, Score
from tasks.domain.stage import Stage
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of, materialise
from tasks.policies import STAGE
from tasks.store.sources import read_table


@task(task_run_name="score {stage.slug}", **STAGE)
def score_blocks(stage: Stage, model: Ref, settings: Score, runtime: Runtime) -> State[Ref]:
    """Write tokens.jsonl, distances.json and ranking.json. facts: samples, best start for every count."""

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as documents:
            json.dump(_documents(settings.calibration), documents)
            documents.flush()
            fields = settings.calibration.model_dump(include={"samples", "length"}) | settings.model_dump(
                include={"metric", "token", "dtype"}
            )
            request = {"checkpoint": str(folder_of(model)), "documents": documents.name, **fields}
            run_child("score", request, out, runtime, progress)
        ranking = json.loads((out / "ranking.json").read_text())["starts_by_count"]
        samples = json.loads((out / "distances.json").read_text())["samples"]
        return {"samples": samples, "best_start": {str(count + 1): starts[0] for count, starts in enumerate(ranking)}}

    return materialise(stage, produce, engine=True)


def _documents(calibration: Calibration) -> list[str]:
    """All documents in the order of the draw; how many are used depends on their lengths in tokens."""
    table = read_table(calibration, calibration.fields)
    texts = ["\n\n".join(str(row[name] or "") for name in calibration.fields).strip() for row in table]
    random.Random(calibration.seed).shuffle(texts)
    return [text for text in texts if text]
