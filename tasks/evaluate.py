"""One checkpoint on the OpenLLM Leaderboard v1 (paper, section 3): one artifact a task."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.states import Completed, State

from tasks.algorithms.recovery import mean_and_error
from tasks.benchmarks import items_root
from tasks.domain.errors import ConfigError
from tasks.domain.leaderboard import BENCHMARKS
from tasks.domain.recipe import Evaluate, Runtime
from tasks.domain.stage import KEY_LENGTH, Stage
from tasks.engines.child import refuse_while_stopping, run_child
from tasks.materialise import Ref, existing, folder_of, link, progress_artifact, ref_of
from tasks.policies import STAGE, engine_slots
from tasks.store.artifacts import ArtifactStore


@task(task_run_name="evaluate {role}", **STAGE)
def evaluate(
    stages: dict[str, Stage], role: str, checkpoint: Ref, benchmarks: Ref | None, settings: Evaluate, runtime: Runtime
) -> State[dict[str, Ref]]:
    """Score the checkpoint on every task that has no artifact yet; each is published as soon as it is finished.

    Each artifact holds results.json and samples_<task>.jsonl; facts: metric, value, stderr, items.
    """
    store = ArtifactStore.from_environment()
    refs: dict[str, Ref] = {}

    def take_existing() -> dict[str, Stage]:
        for name, stage in stages.items():
            if name not in refs and (manifest := existing(store, stage)):
                refs[name] = ref_of(store, manifest, "hit")
                link(stage, refs[name]["uri"])
        return {name: stage for name, stage in stages.items() if name not in refs}

    def cached() -> State[dict[str, Ref]]:
        return Completed(name="Cached", message=f"all {len(stages)} tasks exist", data=refs)

    if not take_existing():
        return cached()
    if settings.chat_template:
        refuse_without_chat_template(folder_of(checkpoint))
    with _alone_with(checkpoint, store), store.staging() as folder:
        missing = take_existing()
        if not missing:  # another run has scored them meanwhile
            return cached()
        show, started = progress_artifact(next(iter(missing.values()))), time.monotonic()

        def progress(done: float, text: str) -> None:
            show(done, f"{role}: {text}")
            for name, stage in missing.items():
                if name not in refs and (folder / name / "results.json").exists():
                    seconds = time.monotonic() - started - sum(ref["seconds"] for ref in refs.values())
                    manifest = store.publish(stage, folder / name, score_facts(name, folder / name), seconds)
                    refs[name] = ref_of(store, manifest, "miss")
                    link(stage, refs[name]["uri"])

        with engine_slots(runtime.engines):
            started = time.monotonic()
            run_child("evaluate", _request(checkpoint, benchmarks, settings, missing), folder, runtime, progress)
    return Completed(message=f"scored {', '.join(missing)}", data={name: refs[name] for name in stages})


def refuse_without_chat_template(checkpoint: Path) -> None:
    """Raises ConfigError unless the checkpoint's tokenizer has a chat template, in one of its two places."""
    config = checkpoint / "tokenizer_config.json"
    inside = config.exists() and json.loads(config.read_text()).get("chat_template")
    if not (inside or (checkpoint / "chat_template.jinja").exists()):
        raise ConfigError(
            "evaluate.chat_template=true: the model's tokenizer has no chat template; set it to false, or give an "
            "instruction model"
        )


def _alone_with(checkpoint: Ref, store: ArtifactStore) -> AbstractContextManager[Any]:
    """One run at a time scores a checkpoint: one lease, since a dead run's are waited for one after another."""

    def never() -> bool:
        refuse_while_stopping("evaluate")
        return False

    return store.hold(f"evaluate/of-{checkpoint['stage']}-{checkpoint['key'][:KEY_LENGTH]}", never)


def _request(checkpoint: Ref, benchmarks: Ref | None, settings: Evaluate, stages: dict[str, Stage]) -> dict[str, Any]:
    return {
        "checkpoint": str(folder_of(checkpoint)),
        **settings.model_dump(include={"backend", "chat_template", "dtype", "max_length", "max_generated", "seed"}),
        "tasks": {
            name: {
                **settings.tasks[name].model_dump(),
                "data_root": _optional(items_root(stage.recipe["items"], benchmarks)),
                "revision": stage.recipe["items"].get("revision"),
            }
            for name, stage in stages.items()
        },
    }


def item_scores(name: str, folder: Path, *, lenient: bool = False) -> NDArray[np.float64]:
    """The score of each item of a task's artifact, in the order of (subject, item), the same for every model."""
    samples = _samples(name, folder, BENCHMARKS[name].lenient_filter if lenient else BENCHMARKS[name].filter)
    scored = [(s["task"], s["doc_id"], float(s[BENCHMARKS[name].metric])) for s in samples]
    return np.array([score for _, _, score in sorted(scored)])


def score_facts(name: str, folder: Path) -> dict[str, Any]:
    """task, metric, value, stderr, items, and the value that guessing reaches on these items.

    lenient_value: of a task with a lenient filter, the value by it.
    """
    items = item_scores(name, folder)
    value, error = mean_and_error(items)
    chance = float(np.mean([_chance(name, sample) for sample in _samples(name, folder, BENCHMARKS[name].filter)]))
    facts = {
        "task": name, "metric": BENCHMARKS[name].metric, "value": value, "stderr": error, "items": len(items),
        "chance": chance,
    }  # fmt: skip
    if BENCHMARKS[name].lenient_filter:
        facts["lenient_value"] = float(item_scores(name, folder, lenient=True).mean())
    return facts


def _samples(name: str, folder: Path, kept: str) -> Iterator[dict[str, Any]]:
    with (folder / f"samples_{name}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            if sample.get("filter", "none") == kept:
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
