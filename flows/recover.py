"""Prune a language model and bring its quality back by self-data distillation (arXiv 2410.09982).

    python -m flows.recover PRESET [--set dotted.key=value ...] [--refresh STAGE ...] [--plan]

Score every span of decoder blocks, remove the least important one, let the unpruned model rewrite the
fine-tuning answers, fine-tune the pruned model on them (SDD) and, as the control, on the originals (SFT),
and measure on the OpenLLM Leaderboard v1 how much of the quality came back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flows.plan import ARMS, Plan, arguments, build_plan, print_plan

if __name__ == "__main__" and "--plan" in sys.argv:  # seconds sooner than with all that the flow itself needs
    sys.exit(print_plan(arguments(__doc__)))

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from deployments.local import environment
from tasks.algorithms.prune_plan import layers_of
from tasks.benchmarks import load_benchmarks
from tasks.distil import distil, forget_shards
from tasks.domain.errors import ConfigError, PipelineError
from tasks.domain.recipe import Preset, load_preset
from tasks.domain.span import Span
from tasks.drift import measure_drift
from tasks.engines.child import children_end_with_the_run
from tasks.evaluate import evaluate, refuse_without_chat_template
from tasks.finetune import finetune, merge
from tasks.model import resolve_model
from tasks.placement import Submit, only, placement
from tasks.prune import prune
from tasks.report import write_report
from tasks.rows import draw, load_rows
from tasks.score import score_blocks
from tasks.store.artifacts import ArtifactStore, Quarantined
from tasks.store.sources import model_config


@flow(
    name="recover",
    flow_run_name="{preset.model.id} minus {preset.prune.blocks} blocks ({preset.name})",
    task_runner=ThreadPoolTaskRunner(max_workers=8),
    persist_result=False,
)
def recover(preset: Preset, refresh: Sequence[str] = ()) -> str:
    """Run the whole method; returns the folder of the report.

    refresh: stages by their names in the plan ("distil", "finetune sdd") that are made anew, with all that is made from
    them, although they have artifacts.
    """
    started = datetime.now(UTC)
    check(preset, refresh)
    plan = build_plan(preset)
    set_aside(plan, refresh)
    ArtifactStore.from_environment().announce(str(flow_run.id), [stage for _, stage in plan.stages()])
    with placement(preset) as submit, children_end_with_the_run():
        futures = submit_stages(preset, plan, submit)
        results = {name: future.result() for name, future in futures.items() if future is not None}
        scores = {role: results.pop(f"evaluate {role}") for role in plan.scores}
        refs = results | {f"evaluate {role} {task}": ref for role, of in scores.items() for task, ref in of.items()}
        return str(write_report(preset, {name: refs[name] for name, _ in plan.stages()}, scores, started))


@flow(
    name="stage",
    flow_run_name="{name}: {preset.model.id} minus {preset.prune.blocks} blocks ({preset.name})",
    task_runner=ThreadPoolTaskRunner(max_workers=1),
    persist_result=False,
)
def run_stage(preset: Preset, name: str, key: str) -> None:
    """One stage of `recover`, e.g. "distil" or "evaluate sdd", on this machine; its inputs have artifacts.

    key: of the stage (of its first task), which both machines must agree on.
    """
    with children_end_with_the_run():
        stage = submit_stages(preset, build_plan(preset), only(name, key)).get(name)
        if stage is None:
            raise ConfigError(f"name={name}: no stage of preset {preset.name} is called so; see --plan")
        stage.result()


def submit_stages(preset: Preset, plan: Plan, submit: Submit) -> dict[str, Any]:
    """The method itself; returns the future of each stage by its readable name (of each role for the evaluations)."""
    runtime = preset.runtime
    model = submit("model", resolve_model, plan.model, preset.model, runtime)
    items = plan.benchmarks and submit("benchmarks", load_benchmarks, plan.benchmarks, preset.evaluate.benchmarks)
    rows = submit("rows", load_rows, plan.rows, preset.dataset, items)

    prompts = rows if "rows" in plan.distances.inputs else None
    distances = submit("score", score_blocks, plan.distances, model, prompts, items, preset.score, runtime)
    pruned = submit("prune", prune, plan.pruned, model, distances, preset.prune, runtime)
    distilled = submit("distil", distil, plan.distilled, model, rows, preset.distil, runtime)
    futures = {"model": model, "benchmarks": items, "rows": rows, "score": distances, "prune": pruned}
    futures["distil"] = distilled
    checkpoints = {"unpruned": model, "pruned": pruned}
    for arm in ARMS:
        adapter = submit(f"finetune {arm}", finetune, plan.adapters[arm], pruned, distilled, preset.finetune, runtime)
        checkpoints[arm] = submit(f"merge {arm}", merge, plan.merged[arm], pruned, adapter, runtime)
        futures |= {f"finetune {arm}": adapter, f"merge {arm}": checkpoints[arm]}
    for role, checkpoint in checkpoints.items():
        futures[f"evaluate {role}"] = submit(
            f"evaluate {role}", evaluate, plan.scores[role], role, checkpoint, items, preset.evaluate, runtime
        )
    for role, stage in plan.drifts.items():
        futures[f"drift {role}"] = submit(
            f"drift {role}", measure_drift, stage, role, model, checkpoints[role], rows, preset.evaluate.held_out,
            runtime,
        )  # fmt: skip
    return futures


def set_aside(plan: Plan, refresh: Sequence[str]) -> None:
    """Move the artifacts of these stages, and of all that is made from them, to quarantine/.

    What is younger than this run stays: an earlier start of it has made that anew.
    """
    context, store = FlowRunContext.get(), ArtifactStore.from_environment()
    run = context and context.flow_run
    assert run
    assert run.created
    for name, stage in reversed(plan.affected(refresh).items()):  # the rows last: they name the shards
        manifest = store.find(stage)
        if manifest and datetime.fromisoformat(manifest.created) < run.created:
            if name == "distil":
                forget_shards(stage, store.find(plan.rows))
            moved = store.quarantine(stage.address, manifest, f"{name} is to be made anew")
            if not isinstance(moved, Quarantined):
                raise moved


def check(preset: Preset, refresh: Sequence[str] = ()) -> None:
    """Refuse within seconds what cannot end well: store, names of stages, model, number of blocks, dataset columns."""
    store = ArtifactStore.from_environment()
    store.check()
    plan = build_plan(preset)
    plan.affected(refresh)
    manifest = store.find(plan.model)
    layers = manifest.facts["layers"] if manifest else layers_of(model_config(preset.model))
    Span(0, preset.prune.blocks, layers)
    if preset.evaluate.chat_template and preset.model.kind == "folder":
        refuse_without_chat_template(Path(preset.model.path))
    if store.find(plan.rows) is None:
        for source in preset.dataset.sources:
            next(draw(source, preset.dataset.seed))


def main() -> int:
    options = arguments(__doc__)
    try:
        preset = load_preset(options.preset, tuple(options.overrides))
        with environment(prefect=True):
            check(preset, options.refresh)
            folder = recover(preset, options.refresh)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"report: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
