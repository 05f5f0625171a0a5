"""A machine of operations: PostgreSQL, Prefect and S3 servers, deployments, automations, and workers as processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from tasks.domain.recipe import Preset
from tests.conftest import ROOT, descendants
from tests.tiny_data import write_data_root, write_preset

LONGEST = 1200.0  # seconds that anything here may take before it counts as one that never comes
PAUSE = 0.5  # between two looks
T = TypeVar("T")


def eventually(look: Callable[[], T | None], what: str, seconds: float = LONGEST) -> T:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(PAUSE)
    raise AssertionError(f"{what} did not come within {seconds:.0f} s")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """PostgreSQL of the system's package, on a socket of its own; as root it runs as the user `postgres`."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    assert programs, "PostgreSQL is not installed; apt-get install postgresql"
    folder = Path(tempfile.mkdtemp(prefix="sdd-postgres-"))
    user = "postgres" if os.getuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    data = str(folder / "data")
    run: dict[str, Any] = {"cwd": folder, "user": user, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([programs[-1] / "initdb", "-D", data, "--auth", "trust", "--username", "prefect"], **run)
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    subprocess.run([programs[-1] / "pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "log", "start"], **run)
    yield f"postgresql+asyncpg://prefect@/postgres?host={folder}"
    subprocess.run([programs[-1] / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **run)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def operations(postgres: str, pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything that the README's operations section starts, but the workers; yields the file of a pico preset."""
    from deployments.local import environment

    folder = tmp_path_factory.mktemp("operations")
    os.environ["PREFECT_API_DATABASE_CONNECTION_URL"] = postgres
    os.environ["SDD_DATA_ROOT"] = str(write_data_root(folder / "data"))
    preset = write_preset(folder / "pico.yaml", pico)
    with environment(prefect=True):
        for pool in ("cpu", "gpu"):
            command("prefect", "--no-prompt", "work-pool", "create", pool, "--type", "process", "--overwrite")
        command("prefect", "--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml", "--all")
        command("python", "-m", "deployments.automations")
        yield preset


@pytest.fixture(scope="session")
def preset(operations: Path) -> Preset:
    """The pico preset with one task and no held-out text: the shortest whole run."""
    tree = yaml.safe_load(operations.read_text())
    tree["evaluate"]["tasks"] = {"arc_challenge": {"shots": 1, "limit": 4}}
    del tree["evaluate"]["held_out"]
    return Preset.model_validate(tree)


@pytest.fixture(scope="session")
def whole(preset: Preset) -> UUID:
    """A run that a worker of the pool `cpu` makes, its engines on the pool `gpu`."""
    changed = with_settings(preset, "runtime.engines_on", "stage/gpu")
    with worker("cpu"), worker("gpu"):
        run = start("recover/demo-cpu", preset=changed.model_dump(mode="json"))
        final = ended(run)
    assert final.state is not None
    assert final.state.is_completed(), final.state.message
    return run


def with_settings(preset: Preset, *pairs: Any) -> Preset:
    tree = preset.model_dump(mode="json")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return Preset.model_validate(tree)


def ui_url() -> str:
    return os.environ["PREFECT_API_URL"].removesuffix("/api")


def command(program: str, *arguments: str, **variables: str) -> str:
    tool = str(Path(sys.executable).with_name(program))
    environment = os.environ | variables
    done = subprocess.run([tool, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@contextmanager
def worker(pool: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """`prefect worker start`, in a process group of its own; yields once the server knows it."""
    tool = str(Path(sys.executable).with_name("prefect"))
    name = f"{pool}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [tool, "worker", "start", "--pool", pool, "--type", "process", "--limit", "1", "--name", name],
        cwd=ROOT, env=os.environ | {"PREFECT_WORKER_QUERY_SECONDS": "2"} | variables, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with get_client(sync_client=True) as client:
            eventually(
                lambda: [w for w in client.read_workers_for_work_pool(pool) if w.name == name], f"worker {name}", 120
            )
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[Any]) -> None:
    """The worker and every run of its, at once, as when the machine loses its power."""
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def start(deployment: str, **parameters: Any) -> UUID:
    """A run of the deployment, as the UI's button makes it."""
    with get_client(sync_client=True) as client:
        known = client.read_deployment_by_name(deployment)
        return UUID(str(client.create_flow_run_from_deployment(known.id, parameters=parameters).id))


def read(run: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run)


def ended(run: UUID) -> FlowRun:
    def look() -> FlowRun | None:
        found = read(run)
        return found if found.state and found.state.is_final() else None

    return eventually(look, f"the end of run {run}")
