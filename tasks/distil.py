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
from tempfile import TemporaryDirectory
from typing import Any

from prefect import task
from prefect.states import Completed, State

from tasks.domain.errors import GateError
from tasks.domain.recipe import Distil, Runtime
from tasks.domain.stage import Stage, canonical_json, json_lines
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of, materialise, parts_of, progress_artifact
from tasks.policies import STAGE, engine_slots
from tasks.store.artifacts import ArtifactStore, Manifest
from tasks.store.parts import Parts

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
        shards = finished_shards(stage, model, rows, settings, runtime, out, progress)
        finished = [json.loads(line) for shard in shards for line in json_lines(shard)]
        _check_rate(finished, settings.min_accept_rate)
        _write(finished, out, with_logprobs=settings.top_logprobs > 0)
        return ledger(finished)

    return materialise(stage, produce, runtime)


@task(task_run_name="distil {stage.slug}, part {part}", **STAGE)
def distil_part(
    stage: Stage, model: Ref, rows: Ref, settings: Distil, runtime: Runtime, part: int, parts: int
) -> State[int]:
    """Finish every `parts`-th shard, from number `part` on, by one engine; returns how many. `distil` joins them."""
    if ArtifactStore.from_environment().find(stage):
        return Completed(name="Cached", message=f"{stage.address} exists", data=0)
    chosen, progress = slice(part, None, parts), progress_artifact(stage)
    with engine_slots(runtime.engines), TemporaryDirectory() as out:
        shards = finished_shards(stage, model, rows, settings, runtime, Path(out), progress, chosen, engines=1)
    return Completed(message=f"finished {len(shards)} of the shards", data=len(shards))


def finished_shards(
    stage: Stage, model: Ref, rows: Ref, settings: Distil, runtime: Runtime, out: Path, progress: Progress,
    chosen: slice = slice(None), engines: int | None = None,
) -> list[Path]:  # fmt: skip
    """The files of the chosen shards, after making those that no run has yet. engines: at most; None as in runtime."""
    source = folder_of(rows) / "rows.jsonl"
    shards = _shards(stage, source)[chosen]
    with parts_of("distil", progress, [f"{name}.jsonl" for name, *_ in shards], shared=True) as (parts, committing):
        missing = [shard for shard in shards if not (parts / f"{shard[0]}.jsonl").exists()]
        if missing:
            request = {
                "checkpoint": str(folder_of(model)), "rows": str(source), "parts": str(parts),
                **settings.model_dump(), "messages": settings.messages(),
            }  # fmt: skip
            generate(request, missing, out, runtime, committing, engines or runtime.engines)
    return [parts / f"{name}.jsonl" for name, *_ in shards]


def forget_shards(stage: Stage, rows: Manifest | None) -> None:
    """Let the next run generate all rows anew; also on machines that have the shards, which follow the store."""
    if rows:
        store = ArtifactStore.from_environment()
        shards = _shards(stage, store.fetch(rows) / "rows.jsonl")
        Parts(store, "distil", [f"{name}.jsonl" for name, *_ in shards]).remove()


def _shards(stage: Stage, rows: Path) -> list[Shard]:
    """Named by all that their rows are made from, so that others' datasets share them."""
    lines = json_lines(rows)
    generation = {name: value for name, value in stage.recipe.items() if name != "min_accept_rate"}
    made_from = canonical_json([stage.version, generation, stage.inputs["model"].key])
    return [
        (_shard_name(made_from, lines[at : at + SHARD_ROWS]), at, at + SHARD_ROWS)
        for at in range(0, len(lines), SHARD_ROWS)
    ]


def generate(request: Row, shards: list[Shard], out: Path, runtime: Runtime, progress: Progress, engines: int) -> None:
    """Finish the shards in engines side by side: of those that may be, as many as are free and pay."""
    pay = min(engines, math.ceil(len(shards) / SHARDS_AN_ENGINE))
    lock = threading.Lock()

    def run(number: int) -> None:
        def report(part: float, text: str) -> None:
            with lock:
                done[number] = part
                progress(sum(done) / len(done), text if len(done) == 1 else f"{text} by engine {number + 1}")

        run_child("distil", {**request, "shards": shards[number :: len(done)]}, out, runtime, report)

    with engine_slots(runtime.engines, least=0, most=pay - 1) as more, ThreadPoolExecutor(1 + more) as pool:
        done = [0.0] * (1 + more)  # one slot is the stage's
        running = [pool.submit(copy_context().run, run, number) for number in range(len(done))]
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
