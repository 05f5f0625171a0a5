"""Whole runs killed with -9 while a stage is being made, and runs at the same time: no work is done twice.

Comes after test_recover, whose artifacts the undisturbed run here has in common with it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from flows.plan import build_plan
from tasks.domain.recipe import load_preset
from tasks.store.artifacts import LEASE, MANIFEST, ArtifactStore
from tests.conftest import ROOT
from tests.tiny_data import write_data_root, write_preset

SHARD = 8

# Runs a preset up to its dataset, in small shards. KILLED: dies once the first of them is in the store.
GENERATE = f"""
import os, signal, sys
import tasks.distil, tasks.materialise, tasks.policies, tasks.store.lease, tasks.store.parts
from prefect import flow
from flows.plan import build_plan
from tasks.domain.recipe import load_preset
from tasks.model import resolve_model
from tasks.policies import provide_engine_slots
from tasks.rows import load_rows
tasks.distil.SHARD_ROWS, tasks.materialise.PROGRESS_SECONDS, tasks.store.lease.LEASE_SECONDS = {SHARD}, 0.0, 5.0
tasks.policies.ENGINE_SLOTS += f"-{{os.getpid()}}"  # the killed one's are free again only after a minute
committed, digest = [], tasks.store.parts.sha256_of
def sha256_of(path):
    if os.environ.get("KILLED") and committed:
        os.kill(os.getpid(), signal.SIGKILL)
    committed.append(path)
    return digest(path)
tasks.store.parts.sha256_of = sha256_of
@flow(persist_result=False)
def generate():
    preset = load_preset(sys.argv[1], tuple(sys.argv[2:]))
    plan = build_plan(preset)
    provide_engine_slots(9)
    model = resolve_model(plan.model, preset.model, preset.runtime)
    rows = load_rows(plan.rows, preset.dataset, None)
    tasks.distil.distil(plan.distilled, model, rows, preset.distil, preset.runtime)
generate()
"""

# The flow's own command. KILLED_IN: dies at the first sign of progress in a stage, or before its first upload.
RECOVER = """
import os, signal, sys
import tasks.materialise, tasks.policies, tasks.store.lease
from tasks.store.artifacts import ArtifactStore
tasks.store.lease.LEASE_SECONDS = 5.0
tasks.policies.ENGINE_SLOTS += f"-{os.getpid()}"
def die(stage):
    if stage == os.environ.get("KILLED_IN"):
        os.kill(os.getpid(), signal.SIGKILL)
show, put = tasks.materialise.progress_artifact, ArtifactStore._put
def progress_artifact(stage):
    progress = show(stage)
    return lambda done, text: (die(stage.name), progress(done, text))
def put_or_die(self, source, path, *rest):
    die(path.removeprefix(f"{self.root}/").split("/")[0])
    return put(self, source, path, *rest)
tasks.materialise.progress_artifact, ArtifactStore._put = progress_artifact, put_or_die
from flows.recover import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def data(stack: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    os.environ["SDD_DATA_ROOT"] = str(write_data_root(folder / "data"))
    return folder


def start(script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, env=os.environ | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def end(run: subprocess.Popen[str], status: int = 0) -> str:
    """Its output, once it has ended as it should."""
    output = run.communicate(timeout=800)[0]
    assert run.returncode == status, output[-3000:]
    return output


def rows_generated(output: str) -> int:
    return max((int(total) for total in re.findall(r"\d+ of (\d+) rows, \d+ rewrites accepted", output)), default=0)


def dataset(preset: str, rows: int, root: str, mirror: Path) -> bytes:
    store = ArtifactStore(root, mirror)
    stage = build_plan(load_preset(preset, sized(rows))).distilled
    manifest = store.find(stage)
    assert manifest, stage.address
    return (store.fetch(manifest) / "rows.jsonl").read_bytes()


def sized(rows: int) -> tuple[str, ...]:
    return (f"dataset.sources.0.rows={rows}",)


@pytest.fixture(scope="module")
def generation(data: Path, pico: Path) -> str:
    source = {"name": "own", "kind": "instruction", "file": "sft/pairs.jsonl.gz", "where": {"kind": "instruction"}}
    return str(write_preset(data / "generation.yaml", pico, dataset={"sources": [source]}))


@pytest.fixture(scope="module")
def together(generation: str, data: Path) -> tuple[list[int], bytes]:
    """Rows that each of three runs generated, started at once on three machines, two of them on the first half."""
    root = f"s3://sdd/{uuid4().hex}"
    runs = [
        start(GENERATE, generation, *sized(rows), SDD_STORE=root, SDD_MIRROR=str(data / f"machine-{number}"))
        for number, rows in enumerate((2 * SHARD, 2 * SHARD, 4 * SHARD))
    ]
    generated = [rows_generated(end(run)) for run in runs]
    half, whole = (dataset(generation, rows, root, data / "reader") for rows in (2 * SHARD, 4 * SHARD))
    assert whole.startswith(half) and len(whole.splitlines()) == 4 * SHARD
    return generated, whole


def test_runs_that_share_shards_generate_each_of_them_once(together: tuple[list[int], bytes]) -> None:
    generated, _ = together
    assert sum(generated) == 4 * SHARD, generated


def test_a_run_killed_during_generation_repeats_only_what_it_had_not_committed(
    together: tuple[list[int], bytes], generation: str, data: Path
) -> None:
    """The next run, on another machine, generates the rest; the dataset is that of a run nobody disturbed."""
    root = f"s3://sdd/{uuid4().hex}"
    killed = start(GENERATE, generation, *sized(4 * SHARD), SDD_STORE=root, SDD_MIRROR=str(data / "killed"), KILLED="1")
    assert rows_generated(end(killed, -signal.SIGKILL)) == 4 * SHARD
    store = ArtifactStore(root, data / "looker")
    assert len([path for path in store.objects("parts") if not path.endswith(LEASE)]) == 1
    after = start(GENERATE, generation, *sized(4 * SHARD), SDD_STORE=root, SDD_MIRROR=str(data / "after"))
    assert rows_generated(end(after)) == 3 * SHARD
    assert dataset(generation, 4 * SHARD, root, data / "reader") == together[1]


@pytest.fixture(scope="module")
def preset(data: Path, pico: Path) -> str:
    """One task of each model is enough to have every kind of stage."""
    path = write_preset(data / "pico.yaml", pico)
    settings = yaml.safe_load(path.read_text())
    settings["evaluate"]["tasks"] = {"arc_challenge": settings["evaluate"]["tasks"]["arc_challenge"]}
    del settings["evaluate"]["held_out"]
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def report_of(output: str) -> dict[str, Any]:
    folder = output.strip().splitlines()[-1].removeprefix("report: ")
    return dict(json.loads(Path(folder, "report.json").read_text()))


def test_a_run_killed_in_one_stage_after_another_ends_with_the_report_of_an_undisturbed_one(
    preset: str, data: Path
) -> None:
    """Each run goes on where the one before it was killed, and only the last one is left in peace."""
    undisturbed = report_of(end(start(RECOVER, preset)))
    variables = {"SDD_STORE": f"s3://sdd/{uuid4().hex}", "SDD_MIRROR": str(data / "killed-mirror")}
    store, finished = ArtifactStore(variables["SDD_STORE"], data / "looker"), set[str]()
    for kind in ("model", "rows", "score", "prune", "distil", "finetune", "merge", "evaluate"):
        end(start(RECOVER, preset, KILLED_IN=kind, **variables), -signal.SIGKILL)
        before, finished = finished, {name for name in store.objects() if name.endswith(f"/{MANIFEST}")}
        assert before <= finished and not any(name.startswith(f"{kind}/") for name in finished - before)
    report = report_of(end(start(RECOVER, preset, **variables)))
    for field in ("model", "span", "pruned", "dataset", "models"):
        assert _without_uris(report[field]) == _without_uris(undisturbed[field]), field
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert {name: stage["key"] for name, stage in stages.items()} == {
        stage["name"]: stage["key"] for stage in undisturbed["stages"]
    }
    addresses = {stage["uri"].removeprefix(f"{store.root}/"): stage["cache"] for stage in stages.values()}
    assert {address for address, cache in addresses.items() if cache == "hit"} == {
        path.removesuffix(f"/{MANIFEST}") for path in finished
    }


def _without_uris(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_uris(inner) for name, inner in value.items() if name != "artifact"}
    return [_without_uris(inner) for inner in value] if isinstance(value, list) else value
