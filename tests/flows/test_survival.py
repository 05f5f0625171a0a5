"""Whole runs killed with -9 while rows are being generated, and runs at the same time: no work is done twice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from flows.plan import build_plan
from tasks.domain.recipe import load_preset
from tasks.store.artifacts import LEASE, ArtifactStore
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
tasks.distil.SHARDS_AN_ENGINE = 1
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
    return (f"dataset.sources.0.rows={rows}", "runtime.engines=1")


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


@pytest.mark.parametrize("engines", [2, 4])
def test_engines_side_by_side_write_the_same_dataset(
    together: tuple[list[int], bytes], generation: str, data: Path, engines: int
) -> None:
    root, settings = f"s3://sdd/{uuid4().hex}", [*sized(4 * SHARD), f"runtime.engines={engines}"]
    output = end(start(GENERATE, generation, *settings, SDD_STORE=root, SDD_MIRROR=str(data / f"engines-{engines}")))
    assert len(set(re.findall(r"rewrites accepted by engine \d", output))) == engines
    assert dataset(generation, 4 * SHARD, root, data / "reader") == together[1]
