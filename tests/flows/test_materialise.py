"""A stage inside a real Prefect flow: computed once, whoever asks, and made again when its artifact went bad."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.runtime import flow_run
from prefect.states import State
from prefect.task_runners import ThreadPoolTaskRunner

from tasks.domain.errors import ArtifactError, ConfigError, EngineError
from tasks.domain.recipe import Runtime
from tasks.domain.stage import Stage
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of, materialise, parts_of, progress_artifact, transfer
from tasks.policies import STAGE, engine_slots
from tasks.store.artifacts import LEASE, MANIFEST, ArtifactStore
from tests.conftest import ROOT, enlarge
from tests.store.conftest import FILES, contents, objects, produced

ROWS = Stage("rows", 1, {"seed": 0}, slug="pico")
COPY = Stage("copy", 1, {}, {"rows": ROWS}, "pico")
computed: list[str] = []


@task(**STAGE)
def rows() -> State[Ref]:
    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        computed.append("rows")
        produced(out)
        return {"rows": 1}

    return materialise(ROWS, produce)


@task(**STAGE)
def copy(source: Ref) -> State[Ref]:
    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        computed.append("copy")
        produced(out, contents(folder_of(source)))
        return {}

    return materialise(COPY, produce)


@flow(task_runner=ThreadPoolTaskRunner(max_workers=8), persist_result=False)
def pipeline(times: int) -> list[Ref]:
    return [future.result() for future in [copy.submit(rows.submit()) for _ in range(times)]]


@pytest.fixture
def store(stack: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("SDD_STORE", f"s3://sdd/{uuid4().hex}")
    monkeypatch.setenv("SDD_MIRROR", str(tmp_path / "mirror"))
    computed.clear()
    return ArtifactStore.from_environment()


@pytest.fixture
def slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Engine slots as on a machine of its own."""
    monkeypatch.setattr("tasks.policies.SLOTS", tmp_path / "slots")
    return tmp_path / "slots"


def test_a_stage_that_many_ask_for_at_once_is_computed_once(store: ArtifactStore) -> None:
    refs = pipeline(4)
    assert sorted(computed) == ["copy", "rows"]
    assert [ref["cache"] for ref in refs].count("miss") == 1
    assert not [path for path in objects(store) if path.endswith(LEASE)]
    pipeline(1)
    assert sorted(computed) == ["copy", "rows"]


def free_slots(engines: int) -> int:
    with engine_slots(engines, least=0, most=engines) as free:
        return free


def test_what_a_stage_goes_on_from_stays_until_it_is_published(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[bool] = []

    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        with parts_of("rows", progress, ["state"], shared=False) as (parts, _):
            reached.append((parts / "state").exists())
            (parts / "state").write_text("finished")
            produced(out)
        return {}

    def away(*_: Any) -> None:
        raise ArtifactError("the store is away")

    @flow(persist_result=False)
    def one() -> State[Ref]:
        return materialise(ROWS, produce, pieces=["state"])

    with monkeypatch.context() as broken:
        broken.setattr(ArtifactStore, "publish", away)
        with pytest.raises(ArtifactError, match="the store is away"):
            one()
    assert objects(store, "parts/rows")
    one()
    assert reached == [False, True] and not objects(store, "parts/rows")


def test_a_stage_holds_the_engine_slots_that_it_needs(store: ArtifactStore, tmp_path: Path, slots: Path) -> None:
    free: list[int] = []

    @task(**STAGE)
    def shared_by_two() -> State[Ref]:
        def produce(out: Path, progress: Progress) -> dict[str, Any]:
            free.append(free_slots(3))
            produced(out)
            return {}

        return materialise(ROWS, produce, Runtime(device="cpu", engines=3), slots=2)

    @flow(persist_result=False)
    def alone() -> None:
        shared_by_two()
        free.append(free_slots(3))

    alone()
    assert free == [1, 3]


def test_runs_wait_for_slots_until_their_holder_ends_or_dies(slots: Path) -> None:
    """Two holders in processes of their own: one gives its slot back, the other is killed with -9."""
    hold = (
        "import sys, pathlib, tasks.policies as p; p.SLOTS = pathlib.Path(sys.argv[1])\n"
        "with p.engine_slots(2): print('held', flush=True); sys.stdin.readline()"
    )
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", hold, str(slots)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        for _ in range(2)
    ]
    for holder in holders:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
    assert free_slots(2) == 0
    held = threading.Event()

    def both() -> int:
        with engine_slots(2, least=2) as count:
            held.set()
            return count

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(both)
        holders[0].kill()
        holders[0].wait()
        assert not held.is_set(), "one of two is not enough"
        holders[1].communicate(b"\n")
        assert waiting.result() == 2
    assert free_slots(2) == 2


def test_a_waiting_run_that_is_stopped_waits_no_longer(slots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = threading.Event()
    monkeypatch.setattr("tasks.engines.child._stopping", stopping)
    with engine_slots(1), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: engine_slots(1).__enter__())
        stopping.set()
        with pytest.raises(EngineError, match="the run is being stopped"):
            waiting.result()


@pytest.mark.parametrize("damage", ["other bytes", "cut off", "gone", "manifest", "in the mirror"])
def test_a_bad_artifact_is_made_again_within_the_run_that_needs_it(store: ArtifactStore, damage: str) -> None:
    """Exactly its stage, once; what was made from it has the same key and stays."""
    pipeline(1)
    computed.clear()
    path = f"{store.uri(ROWS)}/{MANIFEST if damage == 'manifest' else 'rows.jsonl'}"
    if damage == "in the mirror":
        (store.mirror / ROWS.address / "rows.jsonl").write_bytes(b"edited by hand")
    else:
        shutil.rmtree(store.mirror)
        store.fs.rm_file(path)
        if damage != "gone":
            store.fs.pipe_file(path, FILES["rows.jsonl"][:-1] + b"!" * (damage == "other bytes"))
    pipeline(1)
    assert computed == ([] if damage == "in the mirror" else ["rows"])
    assert bool(objects(store, "quarantine")) == (damage != "in the mirror")
    computed.clear()
    shutil.rmtree(store.mirror)
    assert contents(folder_of(pipeline(1)[0])) == FILES
    assert not computed


def test_an_engine_that_fills_the_disk_is_not_retried_and_goes_on_once_there_is_room(
    store: ArtifactStore, pico: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real child writes a checkpoint of 1 MB where half of that is free."""
    monkeypatch.setenv("SDD_MIRROR", str(small_disk / "mirror"))
    (small_disk / "other").write_bytes(bytes(3 * 2**19))

    @task(**STAGE)
    def merge() -> State[Ref]:
        def produce(out: Path, progress: Progress) -> dict[str, Any]:
            computed.append("merge")
            run_child("merge", {"checkpoint": str(pico), "adapter": str(pico)}, out, Runtime(device="cpu"), progress)
            return {}

        return materialise(ROWS, produce, Runtime(device="cpu"))

    @flow(persist_result=False)
    def run() -> Ref:
        ref: Ref = merge.submit().result()
        return ref

    with pytest.raises(ConfigError, match=rf"no space left on the disk of SDD_MIRROR, in {small_disk}/mirror/.*; free"):
        run()
    assert computed == ["merge"] and not objects(store)
    enlarge(small_disk)
    assert (folder_of(run()) / "model.safetensors").stat().st_size > 2**19
    assert computed == ["merge", "merge"]


def test_a_server_that_cannot_show_progress_ends_no_stage(
    stack: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outage is a stand-in: the client's own tries last more than a minute."""
    monkeypatch.setattr("tasks.materialise.PROGRESS_SECONDS", 0)
    asked: list[float] = []

    def away(percent: float, **_fields: Any) -> None:
        asked.append(percent)
        raise httpx.ConnectError("nobody there")

    @flow(persist_result=False)
    def run() -> None:
        show = progress_artifact(Stage("upload", 1, {"test": uuid4().hex}, slug="pico"))
        with monkeypatch.context() as patched:
            patched.setattr("tasks.materialise.create_progress_artifact", away)
            show(0.1, "begun")
        show(0.2, "the server is back")

    run()
    assert asked == [10.0]


def test_a_long_transfer_moves_the_bar_on_the_runs_page(stack: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the thread that shows it, in the run that waits for it, and up to its end."""
    monkeypatch.setattr("tasks.materialise.PROGRESS_SECONDS", 0.01)
    upload = Stage("upload", 1, {"test": uuid4().hex}, slug="pico")

    @task
    def uploading() -> None:
        show, shown = progress_artifact(upload), threading.Event()

        def progress(done: float, text: str) -> None:
            show(done, text)
            shown.set()

        with transfer("uploaded", progress) as moved:
            moved.size = 10_000_000
            moved.relative_update(4_000_000)
            assert shown.wait(60)
            moved.relative_update(6_000_000)

    @flow(persist_result=False)
    def run() -> str:
        uploading()
        return str(flow_run.id)

    run_id = run()
    with get_client(sync_client=True) as client:
        key = ArtifactFilterKey(any_=[f"upload-{upload.key[:12]}-progress"])
        (artifact,) = client.read_artifacts(artifact_filter=ArtifactFilter(key=key))
    assert (artifact.data, artifact.description) == (100.0, "10 of 10 MB uploaded")
    assert str(artifact.flow_run_id) == run_id
