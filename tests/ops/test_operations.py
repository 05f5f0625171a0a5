"""What an operator relies on: schedules, pools, retries, dying workers, cancelled runs, one stage a device."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Cancelled, Cancelling, Crashed

from flows.plan import build_plan
from flows.recover import run_stage
from tasks.domain.recipe import Preset, load_preset
from tasks.policies import engine_slots
from tasks.store.artifacts import ArtifactStore
from tests.conftest import descendants
from tests.engines.test_memory import FULL
from tests.ops.conftest import command, ended, eventually, kill, read, start, ui_url, with_settings, worker


def task_runs(run: UUID) -> dict[str, TaskRun]:
    with get_client(sync_client=True) as client:
        return {r.name: r for r in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))}


def stage_parameters(preset: Preset, name: str) -> dict[str, Any]:
    key = dict(build_plan(preset).stages())[name].key
    return {"preset": preset.model_dump(mode="json"), "name": name, "key": key}


def engines(parent: int) -> list[int]:
    """Engine children below a worker."""
    found = []
    for pid in descendants(parent):
        try:
            text = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "tasks.engines.children." in text:
            found.append(pid)
    return found


def are_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_every_deployment_has_its_preset_and_a_form(operations: Path) -> None:
    with get_client(sync_client=True) as client:
        pools = {"demo-cpu": "cpu", "smollm2-135m": "cpu", "qwen2.5-coder-1.5b": "gpu", "paper-llama3.1-8b": "gpu"}
        for name, pool in pools.items():
            known = client.read_deployment_by_name(f"recover/{name}")
            assert Preset.model_validate(known.parameters["preset"]) == load_preset(name)
            assert known.work_pool_name == pool
            schema = known.parameter_openapi_schema["definitions"]
            assert schema["Prune"]["properties"]["blocks"]["description"].startswith("Number n")
            assert schema["Distil"]["properties"]["temperature"]["default"] == 0.7
        assert client.read_deployment_by_name("stage/gpu").work_pool_name == "gpu"
        names = [automation.name for automation in client.read_automations()]
    assert len(names) == len(set(names)) == 2


def test_deploying_again_changes_nothing(operations: Path) -> None:
    def state() -> Any:
        with get_client(sync_client=True) as client:
            deployments = {
                d.id: (d.name, d.parameters, [s.schedule for s in d.schedules]) for d in client.read_deployments()
            }
            return deployments, [automation.name for automation in client.read_automations()]

    before = state()
    command("prefect", "--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml", "--all")
    command("python", "-m", "deployments.automations")
    assert state() == before


def test_a_schedule_fires_and_its_run_goes_green(operations: Path) -> None:
    from datetime import timedelta

    with get_client(sync_client=True) as client, worker("cpu"):
        known = client.read_deployment_by_name("collect-garbage/nightly")
        every = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(seconds=15)), active=True)
        (made,) = client.create_deployment_schedules(known.id, [(every.schedule, True)])
        try:
            scheduled = eventually(
                lambda: [r for r in client.read_flow_runs() if r.deployment_id == known.id and r.auto_scheduled
                         and r.state and r.state.is_completed()],
                "a scheduled run",
            )  # fmt: skip
        finally:
            client.delete_deployment_schedule(known.id, made.id)
    assert scheduled


def test_engines_run_on_the_other_pool(whole: UUID, preset: Preset) -> None:
    """Scoring, generation, training and evaluation as runs of stage/gpu, the rest in the run itself."""
    with get_client(sync_client=True) as client:
        stage = client.read_deployment_by_name("stage/gpu")
        runs = [run for run in client.read_flow_runs() if run.deployment_id == stage.id]
    names = {run.name.split(":")[0] for run in runs}
    roles = {f"evaluate {role}" for role in ("unpruned", "pruned", "sft", "sdd")}
    assert names == {"score", "distil", "finetune sft", "finetune sdd", *roles}
    assert all(run.state is not None and run.state.is_completed() for run in runs)
    assert {"prune pico-llama-n2", "merge pico-llama-n2-sdd", "report"} <= task_runs(whole).keys()
    store = ArtifactStore.from_environment()
    assert all(store.find(stage) for _, stage in build_plan(preset).stages())


def test_a_stage_in_an_environment_of_its_own_is_refused(whole: UUID, preset: Preset) -> None:
    parameters = stage_parameters(preset, "distil") | {"key": "0" * 64}
    with worker("gpu"):
        final = ended(start("stage/gpu", **parameters))
    assert final.state is not None
    assert final.state.is_failed()
    assert "lock file" in str(final.state.message)


def test_a_wrong_preset_is_not_retried(operations: Path, preset: Preset) -> None:
    wrong = with_settings(preset, "prune.blocks", 6)
    with worker("cpu"):
        run = start("recover/demo-cpu", preset=wrong.model_dump(mode="json"))
        final = ended(run)
    assert final.state is not None
    assert final.state.is_failed()
    assert "prune.blocks=6" in str(final.state.message)
    assert final.run_count == 1
    assert not task_runs(run)


@pytest.fixture
def told(operations: Path) -> Iterator[list[str]]:
    """What a webhook hears, by the automations that `make deploy` makes with SDD_NOTIFY_URL."""
    texts: list[str] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server, get_client(sync_client=True) as client:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        command("python", "-m", "deployments.automations", SDD_NOTIFY_URL=url)
        shown = client.read_block_documents(include_secrets=False)
        assert "sdd-notify" in str(shown) and url not in str(shown), "whoever knows a webhook's URL may use it"
        yield texts
        for automation in client.read_automations():
            if automation.name.startswith("sdd: tell who"):
                client.delete_automation(automation.id)
        server.shutdown()


def test_a_webhook_hears_of_failed_runs_and_low_recovery(told: list[str], whole: UUID, preset: Preset) -> None:
    wrong = with_settings(preset, "prune.blocks", 6)
    low = with_settings(preset, "runtime.alert_below", 1e6)
    with worker("cpu"):
        runs = [start("recover/demo-cpu", preset=each.model_dump(mode="json")) for each in (wrong, low)]
        failed, recovered = eventually(lambda: sorted(told) if len(told) == 2 else None, "both messages")
    wrong_run, low_run = (f"{ui_url()}/runs/flow-run/{run}" for run in runs)
    assert failed.startswith("A run failed\npico-llama minus 6 blocks (pico): ")
    assert "prune.blocks=6" in failed and failed.endswith(f" {wrong_run}")
    report = next(Path(os.environ["SDD_STATE"], "reports").glob(f"pico-{str(runs[1])[:8]}/report.json"))
    percent = round(json.loads(report.read_text())["models"][-1]["recovered_percent"], 1)
    uri = f"{os.environ['SDD_STORE']}/reports/{runs[1]}"
    assert recovered == (
        f"A run recovered too little\npico-llama minus 2 blocks (pico): SDD recovered {percent} %, less than "
        f"runtime.alert_below=1000000.0; {uri} {low_run}"
    )


def test_a_webhook_hears_of_crashed_runs(told: list[str], preset: Preset) -> None:
    with get_client(sync_client=True) as client:
        run = start("recover/demo-cpu", preset=preset.model_dump(mode="json"))
        client.set_flow_run_state(run, Crashed(message="its machine burnt"), force=True)
        (text,) = eventually(lambda: [*told], "the message")
        eventually(lambda: (state := read(run).state) and state.name == "AwaitingRetry", "its next start")
        client.set_flow_run_state(run, Cancelled(), force=True)
    name = read(run).name
    assert text == f"A run crashed\n{name}: its machine burnt (start 0) {ui_url()}/runs/flow-run/{run}"


@pytest.fixture
def short_of_memory(tmp_path: Path) -> str:
    """A folder for PYTHONPATH with which scoring finds no memory for more than two sequences (no GPU here to fill)."""
    (tmp_path / "sitecustomize.py").write_text(FULL)
    return str(tmp_path)


def test_out_of_memory_is_retried_with_smaller_batches(whole: UUID, preset: Preset, short_of_memory: str) -> None:
    changed = with_settings(preset, "score.calibration.seed", 1)
    with worker("gpu", PYTHONPATH=short_of_memory):
        run = start("stage/gpu", **stage_parameters(changed, "score"))
        final = ended(run)
    assert final.state is not None
    assert final.state.is_completed(), final.state.message
    (scored,) = (r for name, r in task_runs(run).items() if name.startswith("score"))
    assert scored.run_count == 3  # batches of 8, 4, 2


@pytest.fixture
def longer(whole: UUID, preset: Preset) -> Preset:
    """With a generation of five shards, which takes longer than from one upload of finished shards to the next."""
    tree = with_settings(preset, "distil.max_tokens", 384).model_dump(mode="json")
    tree["dataset"]["sources"] = [
        source | {"name": f"{source['name']}-{copy}", "rows": 150}
        for source in tree["dataset"]["sources"] for copy in range(4)
    ]  # fmt: skip
    return Preset.model_validate(tree)


@pytest.fixture
def generating(longer: Preset) -> dict[str, Any]:
    """Parameters of that generation."""
    run_stage(longer, "rows", dict(build_plan(longer).stages())["rows"].key)
    return stage_parameters(longer, "distil")


def test_cancelling_a_run_frees_the_device(generating: dict[str, Any]) -> None:
    with get_client(sync_client=True) as client, worker("gpu") as process:
        run = start("stage/gpu", **generating)
        found = eventually(lambda: engines(process.pid), "an engine")
        client.set_flow_run_state(run, Cancelling())
        eventually(lambda: are_gone(found) and not engines(process.pid), "the end of the engines", 60)
        final = ended(run)
    assert final.state is not None
    assert final.state.is_cancelled()


@pytest.mark.parametrize("deployment", ["recover/demo-cpu", "sweep/grid"])
def test_cancelling_a_run_cancels_what_it_started(deployment: str, longer: Preset) -> None:
    """Its runs on the other pool with their engines, and the points of a sweep."""
    preset = with_settings(longer, "runtime.engines_on", "stage/gpu").model_dump(mode="json")
    points = {"blocks": [2], "seeds": [0]} if deployment == "sweep/grid" else {}
    with get_client(sync_client=True) as client, worker("cpu"), worker("gpu") as process:
        known = {r.id for r in client.read_flow_runs()}
        run = start(deployment, preset=preset, **points)
        found = eventually(lambda: engines(process.pid), "an engine")
        started = [r.id for r in client.read_flow_runs() if r.state and r.state.is_running() and r.id not in known]
        client.set_flow_run_state(run, Cancelling())
        eventually(lambda: are_gone(found) and not engines(process.pid), "the end of the engines", 60)
        assert {str(ended(each).state_name) for each in started} == {"Cancelled"}
        passed = {state.name for each in started for state in client.read_flow_run_states(each)}
        assert "Crashed" not in passed, "crashed runs start again"
        with engine_slots(longer.runtime.engines, least=longer.runtime.engines):
            pass  # the engine's slot is free
    assert len(started) == (3 if points else 2)


def test_a_dead_worker_costs_a_shard(generating: dict[str, Any], longer: Preset) -> None:
    """kill -9 of the worker, the run and its engine; the automations start the run again on another worker."""
    store = ArtifactStore.from_environment()
    generating = stage_parameters(with_settings(longer, "distil.seed", 1), "distil")  # of which no shard is there yet

    def shards() -> dict[str, Any]:
        found = store.fs.find(f"{store.root}/parts/distil", detail=True)
        return {path: info["LastModified"] for path, info in found.items() if not path.endswith("lease.json")}

    known = shards()
    with get_client(sync_client=True) as client:
        stage = client.read_deployment_by_name("stage/gpu")
        with worker("gpu") as process:
            run = client.create_flow_run_from_deployment(stage.id, parameters=generating, tags=["reschedule"]).id
            finished = eventually(lambda: {p: t for p, t in shards().items() if p not in known}, "the first shard")
            kill(process)
    with worker("gpu"):
        final = eventually(
            lambda: found if (found := read(run)).state and found.state.is_completed() else None, "the rerun"
        )
    assert final.run_count == 2
    assert finished.items() <= shards().items(), "a finished shard was generated again"


def test_one_device_never_has_two_stages(whole: UUID, preset: Preset) -> None:
    """Two workers on one machine, whose device has one slot."""
    most, alone = 0, with_settings(preset, "runtime.engines", 1)
    with worker("gpu") as first, worker("gpu") as second:
        runs = [
            start("stage/gpu", **stage_parameters(with_settings(alone, "score.calibration.seed", seed), "score"))
            for seed in (2, 3)
        ]

        def look() -> bool:
            nonlocal most
            most = max(most, len(engines(first.pid)) + len(engines(second.pid)))
            states = [read(run).state for run in runs]
            return all(state is not None and state.is_final() for state in states)

        eventually(look, "the end of both")
        assert all(ended(run).state.is_completed() for run in runs)
    assert most == 1


def test_a_sweep_shares_what_its_points_have_in_common(whole: UUID, preset: Preset) -> None:
    parameters = {"preset": preset.model_dump(mode="json"), "blocks": [1, 2], "seeds": [0]}
    with worker("cpu"):
        final = ended(start("sweep/grid", **parameters))
    assert final.state is not None
    assert final.state.is_completed(), final.state.message
    (folder,) = Path(os.environ["SDD_STATE"], "reports").glob("sweep-pico-*")
    lines = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [(line["blocks"], line["model"]) for line in lines] == [
        (blocks, role) for blocks in ("1", "2") for role in ("unpruned", "pruned", "sft", "sdd")
    ]
    stages = {
        blocks: {s["name"]: s["cache"] for s in json.loads(Path(report, "report.json").read_text())["stages"]}
        for blocks, report in {line["blocks"]: line["report"] for line in lines}.items()
    }
    shared = {"model", "rows", "score", "distil", "evaluate unpruned arc_challenge"}
    assert {name for name, cache in stages["1"].items() if cache == "hit"} == shared
    assert set(stages["2"].values()) == {"hit"}
