"""Runs whose processes are killed with -9, and runs at the same time: no work is done twice, and no report differs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from flows.plan import build_plan
from tasks.domain.recipe import load_preset
from tasks.store.artifacts import LEASE, ArtifactStore
from tests.conftest import ROOT, comparable_report, result_of
from tests.tiny_data import write_data_root, write_preset

SHARD = 8

# Runs a preset up to its dataset, in small shards. KILLED: dies once the first of them is in the store.
GENERATE = f"""
import os, pathlib, signal, sys
import tasks.distil, tasks.materialise, tasks.policies, tasks.store.lease, tasks.store.parts
from prefect import flow
from flows.plan import build_plan
from tasks.domain.recipe import load_preset
from tasks.model import resolve_model
from tasks.rows import load_rows
tasks.distil.SHARD_ROWS, tasks.materialise.PROGRESS_SECONDS, tasks.store.lease.LEASE_SECONDS = {SHARD}, 0.0, 5.0
tasks.distil.SHARDS_AN_ENGINE = 1
tasks.policies.SLOTS = pathlib.Path(os.environ["SDD_MIRROR"], "slots")
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
    model = resolve_model(plan.model, preset.model, preset.runtime)
    rows = load_rows(plan.rows, preset.dataset, None)
    tasks.distil.distil(plan.distilled, model, rows, preset.distil, preset.runtime)
generate()
"""

# `python -m flows.recover` with engine slots of its own, as on a machine of its own, and short pauses.
RECOVER = """
import os, pathlib, sys
import tasks.policies, tasks.store.lease
tasks.policies.SLOTS = pathlib.Path(os.environ["SDD_MIRROR"], "slots")
tasks.policies.STAGE["retry_delay_seconds"] = 0.1
tasks.store.lease.LEASE_SECONDS = 10.0
from flows.recover import main
sys.exit(main())
"""

# In every Python process: an engine child notes that it was started, and the first of its kind kills itself with -9
# as soon as it has told of its work.
KILL_ONCE = """
import json, os, pathlib, signal, sys
notes, fdopen = pathlib.Path({notes!r}), os.fdopen
def opened(fd, *arguments, **options):
    file = fdopen(fd, *arguments, **options)
    if "/engines/children/" in sys.argv[0] and str(fd) == sys.argv[2]:
        request = json.loads(pathlib.Path(sys.argv[1]).read_text())
        inputs = [pathlib.Path(request.get(name, "")).name for name in ("checkpoint", "original", "adapter", "answers")]
        starts = notes / " ".join([pathlib.Path(sys.argv[0]).stem, *filter(None, inputs)])
        if not starts.exists():
            write = file.write
            def last(text):
                write(text)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            file.write = last
        with starts.open("a") as lines:
            lines.write("started\\n")
    return file
os.fdopen = opened
"""
ENGINES = ["distil", *["evaluate"] * 4, *["finetune"] * 2, *["merge"] * 2, "score", "verify"]


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
    """As its engine said when it was ready; what it said later may not be in the log of a killed run."""
    return max((int(total) for total in re.findall(r"the model is loaded, (\d+) rows to rewrite", output)), default=0)


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


@pytest.fixture(scope="module")
def whole(data: Path, pico: Path) -> str:
    """Every stage but the drift, with one task on the quicker backend."""
    evaluate = {
        "backend": "hf", "dtype": "float32", "max_length": 1024, "tasks": {"arc_challenge": {"shots": 1, "limit": 4}},
    }  # fmt: skip
    return str(write_preset(data / "whole.yaml", pico, evaluate=evaluate))


@pytest.fixture(scope="module")
def twins(whole: str, data: Path) -> list[dict[str, Any]]:
    """The reports of two runs of one preset, started at once on two machines."""
    root = f"s3://sdd/{uuid4().hex}"
    runs = [start(RECOVER, whole, SDD_STORE=root, SDD_MIRROR=str(data / f"twin-{number}")) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return [report_of(output) for output in pool.map(end, runs)]


def report_of(output: str) -> dict[str, Any]:
    (folder,) = re.findall("^report: (.+)$", output, re.MULTILINE)
    return comparable_report(Path(folder))


def test_two_runs_of_a_preset_make_each_stage_once(twins: list[dict[str, Any]]) -> None:
    one, other = twins
    caches = {
        stage["name"]: {stage["cache"], twin["cache"]}
        for stage, twin in zip(one["stages"], other["stages"], strict=True)
    }
    assert all(cache == {"hit", "miss"} for cache in caches.values()), caches
    assert result_of(one) == result_of(other)


def test_a_run_whose_every_engine_was_killed_once(twins: list[dict[str, Any]], whole: str, data: Path) -> None:
    """Each is killed at work and started once more, and the report is that of the runs that nobody disturbed."""
    site, notes = data / "site", data / "notes"
    site.mkdir()
    notes.mkdir()
    (site / "sitecustomize.py").write_text(KILL_ONCE.format(notes=str(notes)))
    store = {"SDD_STORE": f"s3://sdd/{uuid4().hex}", "SDD_MIRROR": str(data / "engines-killed")}
    output = end(start(RECOVER, whole, PYTHONPATH=str(site), **store))
    assert output.count("was ended by SIGKILL") >= len(ENGINES)
    starts = {path.name: path.read_text().splitlines() for path in notes.iterdir()}
    assert sorted(name.split()[0] for name in starts) == ENGINES
    assert all(len(lines) == 2 for lines in starts.values()), starts
    report = report_of(output)
    assert {stage["cache"] for stage in report["stages"]} == {"miss"}
    assert result_of(report) == result_of(twins[0])
