"""Scoring inside a real flow: a killed pass goes on from its running sums, on any machine, to the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow

import tasks.score
from flows.plan import build_plan
from tasks.domain.errors import EngineError
from tasks.domain.recipe import Preset, Runtime, load_preset
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of
from tasks.model import resolve_model
from tasks.policies import provide_engine_slots
from tasks.score import score_blocks
from tasks.store.artifacts import ArtifactStore
from tests.engines.test_child import children_running
from tests.store.conftest import contents, objects
from tests.tiny_data import write_data_root, write_preset

SAMPLES = 200


@flow(persist_result=False)
def scoring(preset: Preset) -> Ref:
    provide_engine_slots(1)
    plan = build_plan(preset)
    model = resolve_model.submit(plan.model, preset.model, preset.runtime)
    once = score_blocks.with_options(retries=0)
    ref: Ref = once.submit(plan.distances, model, None, None, preset.score, preset.runtime).result()
    return ref


def test_a_killed_pass_goes_on_and_ends_with_the_same_bytes(
    stack: dict[str, str], pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDD_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("SDD_DATA_ROOT", str(write_data_root(tmp_path / "data")))
    monkeypatch.setattr(tasks.score, "COMMIT_SECONDS", -1)  # after every batch
    calibration = {"file": "calibration/text.jsonl", "samples": SAMPLES, "length": 32}
    path = write_preset(
        tmp_path / "p.yaml", pico, score={"calibration": calibration},
        runtime={"device": "cpu", "kv_cache_gb": 1, "batch": 2},
    )  # fmt: skip
    preset, seen = load_preset(str(path), ("dataset.overlap_words=null",)), list[str]()
    kill_at = SAMPLES + 1

    def watched(name: str, request: dict[str, Any], out: Path, runtime: Runtime, progress: Progress) -> None:
        def watch(done: float, text: str) -> None:
            progress(done, text)
            seen.append(text)
            if int(text.split()[0]) >= kill_at:
                for pid in children_running("score"):
                    os.kill(pid, signal.SIGKILL)

        run_child(name, request, out, runtime, watch)

    monkeypatch.setattr(tasks.score, "run_child", watched)

    monkeypatch.setenv("SDD_STORE", f"s3://sdd/{uuid4().hex}")
    undisturbed = contents(folder_of(scoring(preset)))
    assert seen[0] == f"2 of {SAMPLES} samples" and seen[-1] == f"{SAMPLES} of {SAMPLES} samples"

    monkeypatch.setenv("SDD_STORE", f"s3://sdd/{uuid4().hex}")
    store = ArtifactStore.from_environment()
    kill_at = 20
    with pytest.raises(EngineError, match="ended by SIGKILL"):
        scoring(preset)
    assert objects(store, "parts/score")
    shutil.rmtree(store.mirror)  # as another machine would go on
    kill_at = SAMPLES + 1
    seen.clear()
    assert contents(folder_of(scoring(preset))) == undisturbed
    assert int(seen[0].split()[0]) > 20, "what was committed is not repeated"
    assert not objects(store, "parts/score")
