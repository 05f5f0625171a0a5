"""Importance of every span of blocks (paper, section 2.1)."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from prefect import task
from prefect.logging import get_run_logger
from prefect.states import State

from tasks.algorithms.overlap import BenchmarkText
from tasks.domain.recipe import Calibration, Runtime, Score
from tasks.domain.stage import Stage, json_lines
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of, materialise, parts_of
from tasks.policies import STAGE
from tasks.prune import refuse_what_cannot_be_cut
from tasks.rows import benchmark_text
from tasks.store.sources import read_table

SURE_WORDS = 64  # are tokens enough for a sample, whatever the tokenizer
COMMIT_SECONDS = 30  # a killed pass repeats at most about so much


@task(task_run_name="score {stage.slug}", **STAGE)
def score_blocks(
    stage: Stage, model: Ref, rows: Ref | None, benchmarks: Ref | None, settings: Score, runtime: Runtime
) -> State[Ref]:
    """Write tokens.jsonl, distances.json and ranking.json. An interrupted pass goes on from its last committed sums.

    rows: the training prompts where they are the calibration. facts: samples, how many texts were dropped because
    they overlap a benchmark item, best start for every count, and a warning where the samples end alike.
    """

    sums = f"{stage.key}.safetensors"

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        refuse_what_cannot_be_cut(folder_of(model))
        calibration = settings.calibration
        commit = stage.recipe["calibration"].get("revision")
        documents = _prompts(folder_of(rows)) if rows else _texts(calibration, commit)
        random.Random(calibration.seed).shuffle(documents)
        known = None if rows else benchmark_text(stage, benchmarks)  # rows were checked when they were drawn
        clean, overlapping = _first_clean(documents, known, calibration.samples)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(clean, file)
            file.flush()
            fields = calibration.model_dump(include={"samples", "length", "seed"}) | settings.model_dump(
                include={"metric", "token", "dtype"}
            )
            with parts_of("score", progress, [sums], shared=False) as (parts, committing):
                request = {
                    "checkpoint": str(folder_of(model)), "documents": file.name, **fields,
                    "part": str(parts / sums), "commit_seconds": COMMIT_SECONDS,
                }  # fmt: skip
                run_child("score", request, out, runtime, committing)
        ranked = json.loads((out / "ranking.json").read_text())
        if ranked["warning"]:
            get_run_logger().warning("%s", ranked["warning"])
        return {
            "samples": ranked["samples"], "overlapping": overlapping, "warning": ranked["warning"],
            "best_start": {str(count + 1): starts[0] for count, starts in enumerate(ranked["starts_by_count"])},
        }  # fmt: skip

    return materialise(stage, produce, runtime, pieces=[sums])


def _first_clean(documents: list[Any], known: BenchmarkText | None, samples: int) -> tuple[list[Any], int]:
    """As many documents, in their order, as have so many samples for sure, and how many before them overlap.

    A hub's table has hundreds of thousands.
    """
    clean: list[Any] = []
    overlapping = sure = 0
    for document in documents:
        if known and known.overlaps(document):
            overlapping += 1
            continue
        clean.append(document)
        sure += isinstance(document, str) and len(document.split()) >= SURE_WORDS
        if sure == samples:
            break
    return clean, overlapping


def _texts(calibration: Calibration, commit: str | None) -> list[Any]:
    """All documents: how many of them are used depends on their lengths in tokens."""
    table = read_table(calibration, calibration.fields, commit)
    texts = ("\n\n".join(str(row[name] or "") for name in calibration.fields).strip() for row in table)
    return [text for text in texts if text]


def _prompts(rows: Path) -> list[Any]:
    return [json.loads(line)["prompt"] for line in json_lines(rows / "rows.jsonl")]
