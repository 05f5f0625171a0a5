"""Every combination of blocks, seeds and dataset sizes of one preset, with one comparison.

    python -m flows.sweep PRESET --blocks 3 6 --seeds 0 1 2 [--rows 1000 3000] [--set dotted.key=value ...]

Each combination is a run of `recover`; what two of them share (scoring, the rewritten rows, the unpruned model's
scores) has one key and is computed once.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from prefect import flow, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from deployments.local import environment
from flows.recover import check, recover
from tasks.algorithms.recovery import Scores, average
from tasks.domain.errors import PipelineError
from tasks.domain.leaderboard import LEADERBOARD
from tasks.domain.recipe import Preset, checked, load_preset
from tasks.evaluate import item_scores
from tasks.materialise import folder_of
from tasks.placement import RAY, ray_cluster
from tasks.report import compare_arms

Point = tuple[int, int, int | None]  # blocks, seed, rows of each source
Report = dict[str, Any]  # report.json and its folder

MEASURES = (
    "average", "recovered_percent", "chance_corrected_percent",
    "lambada", "perplexity", "kl_to_unpruned", "own_logprob",
)  # fmt: skip


@flow(name="sweep", flow_run_name="sweep of {preset.name}", persist_result=False)
def sweep(
    preset: Preset, blocks: Sequence[int], seeds: Sequence[int] = (0,), rows: Sequence[int | None] = (None,)
) -> str:
    """Run every point and compare them; returns the folder of comparison.csv and arms.csv.

    blocks: numbers n of blocks to remove. seeds: of the fine-tuning. rows: of each source; None as in the preset.
    """
    points = [(point, changed(preset, *point)) for point in product(blocks, seeds, rows)]
    for _, each in points:
        check(each)
    if preset.runtime.engines_on == RAY:
        with ray_cluster(num_cpus=0) as cluster:  # a point waits for its stages, which need the processors
            run = task(run_point, cache_policy=NO_CACHE, persist_result=False)
            futures = [cluster.submit(run, {"preset": each}) for _, each in points]
            reports = [future.result() for future in futures]
    else:
        reports = [run_point(each) for _, each in points]
    found = [(point, report) for (point, _), report in zip(points, reports, strict=True)]
    run_id = str(runtime.flow_run.id)
    folder = Path(os.environ.get("SDD_STATE", ".local"), "reports", f"sweep-{preset.name}-{run_id[:8]}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("comparison", list(compared(found))), ("arms", list(arms(found)))):
        create_table_artifact(lines, key=name, description=f"{len(points)} runs of {preset.name}")
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0].keys())
            writer.writeheader()
            writer.writerows(lines)
    return str(folder)


def run_point(preset: Preset) -> Report:
    """The report of one point. No task itself: a Ray worker imports a function, but would get a copy of the flow."""
    folder = Path(recover(preset))
    return {**json.loads((folder / "report.json").read_text()), "folder": str(folder)}


def changed(preset: Preset, blocks: int, seed: int, rows: int | None) -> Preset:
    """The preset of one point of the grid, checked as one that was read from a file."""
    tree = preset.model_dump(mode="json")
    tree["prune"]["blocks"] = blocks
    tree["finetune"]["seed"] = seed
    if rows is not None:
        for source in tree["dataset"]["sources"]:
            source["rows"] = rows
    return checked(tree, preset.name)


def compared(found: Sequence[tuple[Point, Report]]) -> Iterator[dict[str, Any]]:
    """One line a model of every run's report."""
    for (blocks, seed, _), report in found:
        for model in report["models"]:
            low, high = model["interval"] or (None, None)
            yield {
                "blocks": blocks, "seed": seed, "rows": report["dataset"]["rows"], "model": model["role"],
                **{name: model[name] for name in MEASURES}, "interval_low": low, "interval_high": high,
                "report": report["folder"],
            }  # fmt: skip


def arms(found: Sequence[tuple[Point, Report]]) -> Iterator[dict[str, Any]]:
    """Whether SDD beats SFT: a line for each number of blocks and rows, every item's score averaged over the seeds."""
    groups: dict[tuple[int, int | None], list[Report]] = {}
    for (blocks, _, rows), report in found:
        groups.setdefault((blocks, rows), []).append(report)
    for (blocks, _), reports in groups.items():
        sdd, sft = mean_items("sdd", reports), mean_items("sft", reports)
        gap = compare_arms(sdd, sft)
        low, high = gap["interval"]
        yield {
            "blocks": blocks, "rows": reports[0]["dataset"]["rows"], "seeds": len(reports),
            "sft": average(sft), "sdd": average(sdd),
            "difference": gap["value"], "interval_low": low, "interval_high": high, "statement": gap["statement"],
        }  # fmt: skip


def mean_items(arm: str, reports: Sequence[Report]) -> Scores:
    """Each item's score, averaged over runs that were scored on the same items."""
    runs = [{stage["name"]: stage for stage in report["stages"]} for report in reports]
    tasks = [task for task in LEADERBOARD if f"evaluate {arm} {task}" in runs[0]]
    return {
        task: np.mean([item_scores(task, folder_of(stages[f"evaluate {arm} {task}"])) for stages in runs], axis=0)
        for task in tasks
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("preset")
    parser.add_argument("--blocks", type=int, nargs="+", required=True, metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--rows", type=int, nargs="+", default=[None], metavar="ROWS")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    try:
        preset = load_preset(options.preset, tuple(options.overrides))
        with environment(prefect=True):
            folder = sweep(preset, options.blocks, options.seeds, options.rows)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"comparison: {folder}")
    return 0


if __name__ == "__main__":
    from flows import sweep as module  # a Ray worker cannot import __main__, and would get a copy of run_point

    sys.exit(module.main())
