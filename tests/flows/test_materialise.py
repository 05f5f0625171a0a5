"""A stage inside a real Prefect flow: computed once, whoever asks, and made again when its artifact went bad."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.runtime import flow_run
from prefect.states import State
from prefect.task_runners import ThreadPoolTaskRunner

from tasks.domain.stage import Stage
from tasks.engines.child import Progress
from tasks.materialise import Ref, folder_of, materialise, progress_artifact, transfer
from tasks.policies import STAGE, free_engine_slots, provide_engine_slots
from tasks.store.artifacts import LEASE, MANIFEST, ArtifactStore
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

    return materialise(ROWS, produce, engine=False)


@task(**STAGE)
def copy(source: Ref) -> State[Ref]:
    def produce(out: Path, progress: Progress) -> dict[str, Any]:
        computed.append("copy")
        produced(out, contents(folder_of(source)))
        return {}

    return materialise(COPY, produce, engine=False)


@flow(task_runner=ThreadPoolTaskRunner(max_workers=8), persist_result=False)
def pipeline(times: int) -> list[Ref]:
    return [future.result() for future in [copy.submit(rows.submit()) for _ in range(times)]]


@pytest.fixture
def store(stack: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("SDD_STORE", f"s3://sdd/{uuid4().hex}")
    monkeypatch.setenv("SDD_MIRROR", str(tmp_path / "mirror"))
    computed.clear()
    return ArtifactStore.from_environment()


def test_a_stage_that_many_ask_for_at_once_is_computed_once(store: ArtifactStore) -> None:
    refs = pipeline(4)
    assert sorted(computed) == ["copy", "rows"]
    assert [ref["cache"] for ref in refs].count("miss") == 1
    assert not [path for path in objects(store) if path.endswith(LEASE)]
    pipeline(1)
    assert sorted(computed) == ["copy", "rows"]


def test_a_stage_holds_the_engine_slots_that_it_needs(store: ArtifactStore) -> None:
    free: list[int] = []

    @task(**STAGE)
    def shared_by_two() -> State[Ref]:
        def produce(out: Path, progress: Progress) -> dict[str, Any]:
            free.append(free_engine_slots())
            produced(out)
            return {}

        return materialise(ROWS, produce, engine=2)

    @flow(persist_result=False)
    def alone() -> None:
        provide_engine_slots(3)
        shared_by_two()
        free.append(free_engine_slots())

    alone()
    assert free == [1, 3]


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
