"""The self-distilled dataset: the unpruned model rewrites every answer (paper, section 2.2)."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import State

from tasks.domain.errors import GateError
from tasks.domain.recipe import Distil, Runtime
from tasks.domain.stage import Stage, canonical_json, json_lines
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of, materialise, parts_of
from tasks.policies import STAGE, engine_slots, free_engine_slots

SHARD_ROWS = 256  # a killed run repeats at most the shards that it was at
SHARDS_AN_ENGINE = 4  # fewer do not pay for the start of another one
WORST_SHOWN = 10

Row = dict[str, Any]
Shard = tuple[str, int, int]  # name, first row, row behind the last


@task(task_run_name="distil {stage.slug}", **STAGE)
def distil(stage: Stage, model: Ref, rows: Ref, settings: Distil, runtime: Runtime) -> State[Ref]:
    """Write rows.jsonl with rewrite, outcome, reason and answer. facts: rows of each outcome, and why.

    With distil.top_logprobs also logprobs.jsonl. Shards of rows are committed as they are finished, each under a name
    made of its rows, the model and the recipe: an interrupted or changed run generates only what no run has yet.
    """

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        source = folder_of(rows) / "rows.jsonl"
        lines = json_lines(source)
        generation = {name: value for name, value in stage.recipe.items() if name != "min_accept_rate"}
        made_from = canonical_json([stage.version, generation, stage.inputs["model"].key])
        shards = [(_shard_name(made_from, lines[at : at + SHARD_ROWS]), at) for at in range(0, len(lines), SHARD_ROWS)]
        with parts_of("distil", progress, [f"{name}.jsonl" for name, _ in shards], shared=True) as (parts, committing):
            missing = [(name, at, at + SHARD_ROWS) for name, at in shards if not (parts / f"{name}.jsonl").exists()]
            if missing:
                request = {
                    "checkpoint": str(folder_of(model)), "rows": str(source), "parts": str(parts),
                    **settings.model_dump(), "messages": settings.messages(),
                }  # fmt: skip
                generate(request, missing, out, runtime, committing)
            finished = [json.loads(line) for name, _ in shards for line in json_lines(parts / f"{name}.jsonl")]
        _check_rate(finished, settings.min_accept_rate)
        _write(finished, out, with_logprobs=settings.top_logprobs > 0)
        return ledger(finished)

    return materialise(stage, produce, engine=True)


def generate(request: Row, shards: list[Shard], out: Path, runtime: Runtime, progress: Progress) -> None:
    """Finish the shards in engines side by side: of those that the machine may have, as many as are free and pay."""
    most = min(runtime.engines, math.ceil(len(shards) / SHARDS_AN_ENGINE))
    engines = min(most, 1 + free_engine_slots())  # one slot is the stage's
    done, lock = [0.0] * engines, threading.Lock()

    def run(number: int) -> None:
        def report(part: float, text: str) -> None:
            with lock:
                done[number] = part
                progress(sum(done) / engines, text if engines == 1 else f"{text} by engine {number + 1}")

        run_child("distil", {**request, "shards": shards[number::engines]}, out, runtime, report)

    with engine_slots(engines - 1), ThreadPoolExecutor(engines) as pool:
        running = [pool.submit(copy_context().run, run, number) for number in range(engines)]
    for future in running:
        future.result()


def _shard_name(made_from: str, lines: list[str]) -> str:
    return hashlib.sha256("\n".join([made_from, *lines]).encode()).hexdigest()[:32]


def _write(rows: list[Row], out: Path, *, with_logprobs: bool) -> None:
    with (out / "rows.jsonl").open("w") as file:
        for row in rows:
            kept = {name: value for name, value in row.items() if name != "logprobs"}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    if with_logprobs:
        with (out / "logprobs.jsonl").open("w") as file:
            file.writelines(json.dumps({"id": r["id"], **r["logprobs"]}) + "\n" for r in rows if "logprobs" in r)


def ledger(rows: list[Row]) -> dict[str, Any]:
    """How many rows had each outcome, and the reasons of those that were not accepted."""
    outcomes = Counter(row["outcome"] for row in rows)
    reasons = Counter(row["reason"] for row in rows if row["reason"])
    return {
        "rows": len(rows), **{name: outcomes[name] for name in ("accepted", "kept_original", "failed")},
        "reasons": dict(reasons.most_common()),
    }  # fmt: skip


def _check_rate(rows: list[Row], minimum: float) -> None:
    accepted = sum(row["outcome"] == "accepted" for row in rows)
    if accepted < minimum * len(rows):
        worst = [row for row in rows if row["outcome"] != "accepted"][:WORST_SHOWN]
        shown = "\n".join(f"- {row['id']} ({row['reason']}): {row['rewrite']!r:.120}" for row in worst)
        raise GateError(
            f"only {accepted} of {len(rows)} rewrites were accepted, fewer than distil.min_accept_rate={minimum}; "
            f"the model cannot rewrite this dataset with this template:\n{shown}"
        )
