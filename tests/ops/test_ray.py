"""Shards and points of a sweep on two Ray workers, with stores of their own: the results are those without Ray."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.states import Cancelling

from deployments.local import _free_port
from flows.plan import build_plan
from tasks.domain.recipe import Preset
from tests.conftest import ROOT, comparable_report, result_of
from tests.ops.conftest import ended, eventually, kill, start, with_settings, worker
from tests.ops.test_operations import engines

AGENTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
STARTS = 5


@contextmanager
def ray_worker(*where: str, **variables: str) -> Iterator[int]:
    """`ray start`, with one processor; yields the process that all of it is below.

    Ray gives its agents 15 s to come up, chosen ports or not, and gives up on a busy machine: then once more.
    """
    for _ in range(STARTS):
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", *where, "--block", "--num-cpus=1", "--disable-usage-stats",
             "--object-store-memory=100000000", "--node-ip-address=127.0.0.1",
             *(f"--{agent}={_free_port()}" for agent in AGENTS)],
            cwd=ROOT, env=os.environ | variables, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            if any("Ray runtime started" in line for line in process.stdout):
                yield process.pid
                return
        finally:
            kill(process)
    raise AssertionError(f"`ray start` gave up {STARTS} times")


class Cluster(NamedTuple):
    workers: tuple[int, int]  # their processes
    variables: dict[str, str]  # of who uses them


@pytest.fixture(scope="module")
def cluster(operations: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers, each with a mirror of its own as on two machines."""
    port, store, mirrors = _free_port(), {"SDD_STORE": "s3://sdd/ray"}, tmp_path_factory.mktemp("mirrors")
    with (
        TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as session,  # pytest's are too long for a socket
        ray_worker(
            "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={session}",
            SDD_MIRROR=str(mirrors / "first"), **store,
        ) as first,
        ray_worker(f"--address=127.0.0.1:{port}", SDD_MIRROR=str(mirrors / "second"), **store) as second,
    ):  # fmt: skip
        yield Cluster(
            (first, second), {"RAY_ADDRESS": f"127.0.0.1:{port}", "SDD_MIRROR": str(mirrors / "driver"), **store}
        )


@pytest.fixture
def wide(preset: Preset) -> Preset:
    """With rows for two shards."""
    tree = preset.model_dump(mode="json")
    for source in tree["dataset"]["sources"]:
        source["rows"] = 150
    return Preset.model_validate(tree)


def run(module: str, *arguments: str, **variables: str) -> str:
    """The last word of what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"flows.{module}", *arguments], cwd=ROOT, env=os.environ | variables,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.split()[-1]


def test_two_ray_workers_make_what_one_process_makes(wide: Preset, cluster: Cluster, tmp_path: Path) -> None:
    preset, alone = tmp_path / "pico.yaml", {"SDD_STORE": "s3://sdd/alone", "SDD_MIRROR": str(tmp_path / "alone")}
    preset.write_text(yaml.safe_dump(wide.model_dump(mode="json")))
    swept = run("sweep", str(preset), "--blocks", "1", "2", "--set", "runtime.engines_on=ray", **cluster.variables)
    report = comparable_report(Path(run("recover", str(preset), **alone)))
    lines = list(csv.DictReader(Path(swept, "comparison.csv").read_text().splitlines()))
    assert [line["blocks"] for line in lines] == ["1"] * 4 + ["2"] * 4
    assert result_of(comparable_report(Path(lines[-1]["report"]))) == result_of(report)
    dataset = build_plan(wide).distilled.address
    mirrors = [Path(alone["SDD_MIRROR"]), *Path(cluster.variables["SDD_MIRROR"]).parent.iterdir()]
    (rows,) = {path.read_bytes() for mirror in mirrors for path in mirror.glob(f"{dataset}/rows.jsonl")}
    assert rows.count(b"\n") == 300
    with get_client(sync_client=True) as client:
        parts = [r for r in client.read_task_runs() if r.name.startswith("distil, part")]
    assert {part.name for part in parts} == {"distil, part 1", "distil, part 2"}
    assert {part.state.message for part in parts if part.state} <= {"finished 1 of the shards", f"{dataset} exists"}


def test_cancelling_a_run_on_ray_frees_the_devices(wide: Preset, cluster: Cluster) -> None:
    changed = with_settings(wide, "runtime.engines_on", "ray", "score.calibration.seed", 5)

    def at_work() -> list[int]:
        return [engine for pid in cluster.workers for engine in engines(pid)]

    with get_client(sync_client=True) as client, worker("cpu", **cluster.variables):
        run = start("recover/demo-cpu", preset=changed.model_dump(mode="json"))
        eventually(at_work, "an engine")
        client.set_flow_run_state(run, Cancelling())
        eventually(lambda: not at_work(), "the end of the engines", 60)
        assert ended(run).state_name == "Cancelled"
