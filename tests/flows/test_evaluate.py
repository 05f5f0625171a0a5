"""One published checkpoint scored alone, with the keys that its run would give the scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client

from flows.evaluate import evaluate_checkpoint
from flows.plan import build_plan
from flows.recover import run_stage
from tasks.domain.errors import ConfigError
from tasks.domain.recipe import Preset, load_preset
from tasks.store.artifacts import ArtifactStore
from tests.tiny_data import write_data_root, write_preset

TASKS = {"arc_challenge": {"shots": 1, "limit": 4}, "winogrande": {"shots": 1, "limit": 4}}


@pytest.fixture(scope="module")
def preset(stack: dict[str, str], pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preset]:
    """With a store of its own, in which no other test finds artifacts."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDD_STORE", f"s3://sdd/{uuid4().hex}")
        patch.setenv("SDD_MIRROR", str(folder / "mirror"))
        patch.setenv("SDD_DATA_ROOT", str(write_data_root(folder / "data")))
        settings = {"dtype": "float32", "max_length": 1024, "tasks": TASKS}
        yield load_preset(str(write_preset(folder / "pico.yaml", pico, evaluate=settings)))


def states_of_the_newest_run() -> dict[str, str]:
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_task_runs() if run.name.startswith("evaluate ")]
        newest = max(runs, key=lambda run: run.start_time or run.created)
        return {run.name: run.state_name or "" for run in runs if run.flow_run_id == newest.flow_run_id}


def test_a_published_checkpoint_is_scored_once(preset: Preset) -> None:
    plan, store = build_plan(preset), ArtifactStore.from_environment()
    run_stage(preset, "model", plan.model.key)
    scores = evaluate_checkpoint(plan.model.address, preset.evaluate, preset.runtime)
    assert scores.keys() == TASKS.keys()
    made = {task: store.find(stage) for task, stage in plan.scores["unpruned"].items()}
    assert {task: manifest.facts["value"] for task, manifest in made.items() if manifest} == scores
    assert states_of_the_newest_run() == {"evaluate pico-llama": "Completed"}
    assert evaluate_checkpoint(plan.model.key[:12], preset.evaluate, preset.runtime) == scores
    assert states_of_the_newest_run() == {"evaluate pico-llama": "Cached"}
    assert {task: store.find(stage) for task, stage in plan.scores["unpruned"].items()} == made


def test_what_is_no_checkpoint_is_refused(preset: Preset) -> None:
    plan = build_plan(preset)
    run_stage(preset, "rows", plan.rows.key)
    with pytest.raises(ConfigError, match="merge/nothing-000000000000: 0 artifacts"):
        evaluate_checkpoint("merge/nothing-000000000000", preset.evaluate, preset.runtime)
    with pytest.raises(ConfigError, match=f"checkpoint={plan.rows.address}: an artifact of stage rows; give one of"):
        evaluate_checkpoint(plan.rows.address, preset.evaluate, preset.runtime)
