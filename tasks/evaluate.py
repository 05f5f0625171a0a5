"""One checkpoint on the OpenLLM Leaderboard v1 (paper, section 3): one artifact a task."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.states import Completed, State

from tasks.algorithms.recovery import mean_and_error
from tasks.benchmarks import items_root
from tasks.domain.leaderboard import BENCHMARKS
from tasks.domain.recipe import Evaluate, Runtime
from tasks.domain.stage import Stage
from tasks.engines.child import run_child
from tasks.materialise import Ref, folder_of, link, progress_artifact, ref_of
from tasks.policies import STAGE, engine_slot
from tasks.store.artifacts import ArtifactStore


@task(task_run_name="evaluate {role}", **STAGE)
def evaluate(
    role: str, stages: dict[str, Stage], checkpoint: Ref, benchmarks: Ref | None, settings: Evaluate, runtime: Runtime
) -> State[dict[str, Ref]]:
    """Score the checkpoint on every task that has no artifact yet; each is published as soon as it is finished.

    Each artifact holds results.json and samples_<task>.jsonl; facts: metric, value, stderr, items.
    """
    store = ArtifactStore.from_environment()
    refs = {name: ref_of(store, manifest, "hit") for name, stage in stages.items() if (manifest := store.find(stage))}
    missing = {name: stage for name, stage in stages.items() if name not in refs}
    for name in refs:
        link(stages[name], refs[name]["uri"])
    if not missing:
        return Completed(name="Cached", message=f"all {len(stages)} tasks exist", data=refs)

    store.mirror.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".evaluate-", dir=store.mirror))
    show = progress_artifact(next(iter(missing.values())))
    request = {
        "checkpoint": str(folder_of(checkpoint)),
        **settings.model_dump(include={"backend", "dtype", "max_length", "max_generated", "seed"}),
        "tasks": {
            name: {
                **settings.tasks[name].model_dump(),
                "data_root": _optional(items_root(stage.recipe["items"], benchmarks)),
                "revision": stage.recipe["items"].get("revision"),
            }
            for name, stage in missing.items()
        },
    }
    clock = time.monotonic()

    def progress(done: float, text: str) -> None:
        nonlocal clock
        show(done, f"{role}: {text}")
        for name in missing.keys() - refs.keys():
            if (folder / name / "results.json").exists():
                facts = score_facts(name, folder / name)
                refs[name] = ref_of(
                    store, store.publish(missing[name], folder / name, facts, time.monotonic() - clock), "miss"
                )
                link(missing[name], refs[name]["uri"])
                clock = time.monotonic()

    try:
        with engine_slot():
            clock = time.monotonic()
            run_child("evaluate", request, folder, runtime, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Completed(message=f"scored {', '.join(missing)}", data={name: refs[name] for name in stages})


def item_scores(name: str, folder: Path) -> NDArray[np.float64]:
    """The score of each item of a task's artifact, in the order of (subject, item), the same for every model."""
    scored = [(s["task"], s["doc_id"], float(s[BENCHMARKS[name].metric])) for s in _samples(name, folder)]
    return np.array([score for _, _, score in sorted(scored)])


def score_facts(name: str, folder: Path) -> dict[str, Any]:
    """task, metric, value, stderr, items, and the value that guessing reaches on these items."""
    items = item_scores(name, folder)
    value, error = mean_and_error(items)
    chance = float(np.mean([_chance(name, sample) for sample in _samples(name, folder)]))
    return {
        "task": name, "metric": BENCHMARKS[name].metric, "value": value, "stderr": error, "items": len(items),
        "chance": chance,
    }  # fmt: skip


def _samples(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / f"samples_{name}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            if sample.get("filter", "none") == BENCHMARKS[name].filter:
                yield sample


def _chance(name: str, sample: dict[str, Any]) -> float:
    """What guessing scores on one item: one of its choices; for mc2 the share of true ones; nothing on free text."""
    if name == "truthfulqa_mc2":
        labels = sample["doc"]["mc2_targets"]["labels"]
        return float(sum(labels) / len(labels))
    choices = len(sample["resps"])
    return 1 / choices if choices > 1 else 0.0


def _optional(path: Path | None) -> str | None:
    return None if path is None else str(path)
