"""The whole flow on a pico model with every real part: S3, Prefect server, vLLM, peft, lm-eval. Twice."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId

from flows.plan import build_plan
from flows.recover import run_stage, set_aside
from tasks.domain.errors import ArtifactError, ConfigError
from tasks.domain.recipe import load_preset
from tasks.domain.stage import json_lines
from tasks.store.artifacts import ArtifactStore
from tests.conftest import ROOT
from tests.tiny_data import write_data_root, write_preset

STAGES = 4 + 1 + 2 * 2 + 4 * (7 + 1)  # model rows score prune, distil, two arms, four models: seven tasks, drift


def run_cli(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.recover", *arguments]
    environment = {name: value for name, value in (os.environ | variables).items() if value}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def preset(stack: dict[str, str], pico: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    os.environ["SDD_DATA_ROOT"] = str(write_data_root(folder / "data"))
    return str(write_preset(folder / "pico.yaml", pico))


@pytest.fixture(scope="module")
def first(preset: str) -> dict[str, Any]:
    return report_of(run_cli(preset))


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Error logging to API" not in done.stdout + done.stderr, "the server stopped before it had every log line"
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("report: ")
    folder = Path(last.removeprefix("report: "))
    assert "</html>" in (folder / "report.html").read_text()
    return dict(json.loads((folder / "report.json").read_text()))


def test_report_follows_the_contract(first: dict[str, Any]) -> None:
    assert first["schema"] == 1
    assert first["model"]["layers"] == 6
    assert first["span"]["removed"] == list(range(first["span"]["start"], first["span"]["start"] + 2))
    assert first["pruned"]["layers"] == 4
    assert first["pruned"]["parameters"] < first["model"]["parameters"]
    dataset = first["dataset"]
    assert dataset["accepted"] + dataset["kept_original"] + dataset["failed"] == dataset["rows"] == 12
    assert [model["role"] for model in first["models"]] == ["unpruned", "pruned", "sft", "sdd"]
    for model in first["models"]:
        assert len(model["scores"]) == 6
        assert model["scores"]["mmlu"]["items"] == 57
        assert model["average"] == pytest.approx(sum(s["value"] for s in model["scores"].values()) / 6)
        assert model["interval"][0] <= model["recovered_percent"] <= model["interval"][1]
        assert model["perplexity"] > 1 and model["own_logprob"] < 0 and 0 <= model["lambada"] <= 1
        assert (model["kl_to_unpruned"] > 0) == (model["role"] != "unpruned")
    unpruned, _, sft, sdd = first["models"]
    assert (unpruned["recovered_percent"], unpruned["interval"]) == (100, [100, 100])
    difference = first["difference"]
    assert difference["value"] == pytest.approx(sdd["average"] - sft["average"])
    assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]
    assert "at 95 %" in difference["statement"]
    for task, found in sdd["recovered_by_task"].items():
        if found:
            ratio = sdd["scores"][task]["value"] / unpruned["scores"][task]["value"]
            assert found["percent"] == pytest.approx(100 * ratio)
            assert found["interval"][0] <= found["percent"] <= found["interval"][1]
    assert sdd["recovered_by_task"].keys() == sdd["scores"].keys()
    assert all(first["training"][arm]["trained_tokens"] > first["training"][arm]["steps"] > 0 for arm in ("sft", "sdd"))
    assert len(first["stages"]) == STAGES
    assert {stage["cache"] for stage in first["stages"]} == {"miss"}


def test_every_artifact_has_a_manifest_and_holds_what_it_should(first: dict[str, Any]) -> None:
    store = ArtifactStore.from_environment()
    folders = {stage["name"]: store.fetch(store.manifest_at(stage["uri"])) for stage in first["stages"]}
    assert {path.name for path in folders["score"].iterdir()} == {"tokens.jsonl", "distances.json", "ranking.json"}
    for name in ("model", "prune", "merge sft", "merge sdd"):
        assert (folders[name] / "config.json").exists(), name
        assert (folders[name] / "tokenizer.json").exists(), name
        assert (folders[name] / "README.md").exists(), name
    assert (folders["finetune sdd"] / "adapter_config.json").exists()
    assert {p.name for p in folders["evaluate sdd gsm8k"].iterdir()} == {"results.json", "samples_gsm8k.jsonl"}
    rows = [json.loads(line) for line in json_lines(folders["distil"] / "rows.jsonl")]
    assert all(
        row.keys() >= {"id", "prompt", "reference", "rewrite", "outcome", "reason", "answer", "source"} for row in rows
    )


def test_recomputed_scores_equal_the_harness(first: dict[str, Any]) -> None:
    store = ArtifactStore.from_environment()
    stage = next(stage for stage in first["stages"] if stage["name"] == "evaluate sdd hellaswag")
    results = json.loads((store.fetch(store.manifest_at(stage["uri"])) / "results.json").read_text())
    own = next(model for model in first["models"] if model["role"] == "sdd")["scores"]["hellaswag"]
    assert own["value"] == pytest.approx(results["results"]["sdd_hellaswag"]["acc_norm,none"])


def test_second_run_is_all_hits_with_the_same_numbers(first: dict[str, Any], preset: str) -> None:
    plan = run_cli(preset, "--plan")
    assert plan.stdout.count("hit ") == STAGES, plan.stdout + plan.stderr
    second = report_of(run_cli(preset))
    assert {stage["cache"] for stage in second["stages"]} == {"hit"}
    for field in ("model", "span", "pruned", "dataset", "models"):
        assert second[field] == first[field]
    states = task_states(second["run"]["flow_run_id"])
    assert states.pop("report") == "Completed"
    assert set(states.values()) == {"Cached"}, states


def task_states(flow_run_id: str) -> dict[str, str]:
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    return {run.name: run.state_name or "" for run in runs}


def test_a_sweep_ends_in_a_comparison_and_in_its_arms(first: dict[str, Any], preset: str) -> None:
    """Of the one point that exists; several seeds: tests/flows/test_sweep.py."""
    command = [sys.executable, "-m", "flows.sweep", preset, "--blocks", "2", "--seeds", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("comparison: "))
    lines = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [(line["seed"], line["model"]) for line in lines] == [
        ("0", role) for role in ("unpruned", "pruned", "sft", "sdd")
    ]
    averages = [model["average"] for model in first["models"]]
    assert [float(line["average"]) for line in lines] == pytest.approx(averages)
    (arms,) = csv.DictReader((folder / "arms.csv").open())
    assert (arms["blocks"], arms["rows"], arms["seeds"]) == ("2", "12", "1")
    assert [float(arms["sft"]), float(arms["sdd"])] == pytest.approx(averages[2:])
    gap = float(arms["sdd"]) - float(arms["sft"])
    assert float(arms["difference"]) == pytest.approx(gap)
    assert float(arms["interval_low"]) <= gap <= float(arms["interval_high"])


def test_run_page_has_names_links_progress_and_tables(first: dict[str, Any]) -> None:
    run_id = first["run"]["flow_run_id"]
    states = task_states(run_id)
    assert {"score pico-llama", "prune pico-llama-n2", "distil pico-llama", "evaluate sdd", "report"} <= states.keys()
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run_id).name == "pico-llama minus 2 blocks (pico)"
        own = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        artifacts = client.read_artifacts(artifact_filter=own, limit=200)
    kinds = [artifact.type for artifact in artifacts]
    assert {"progress", "table", "markdown"} <= set(kinds)
    linked = {artifact.data for artifact in artifacts if artifact.key and artifact.key.endswith("-link")}
    assert all(any(stage["uri"] in str(data) for data in linked) for stage in first["stages"])


def test_sigterm_ends_the_run_and_its_children_and_the_next_run_completes(first: dict[str, Any], preset: str) -> None:
    """What is finished stays finished, what was running leaves neither a process nor half an artifact."""
    changed = ("--set", "evaluate.max_length=768")
    command = [sys.executable, "-m", "flows.recover", preset, *changed]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if "loading the model" in line:
            break
    assert own_children(run.pid)
    run.terminate()
    run.communicate(timeout=60)
    assert run.returncode != 0
    assert not own_children(run.pid)
    store = ArtifactStore.from_environment()
    folders = {path.rsplit("/", 1)[0] for path in store.fs.find(f"{store.root}/evaluate")}
    assert all(store.fs.exists(f"{folder}/manifest.json") for folder in folders)
    assert run_cli(preset, "--plan", *changed).stdout.count("hit ") == STAGES - 28


def own_children(parent: int) -> list[str]:
    """Command lines of the engine children that live below this process, or that lost it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            state, above = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if "tasks.engines.children" in command and state != "Z" and above in (str(parent), "1"):
            found.append(command)
    return found


def test_plan_names_the_changed_field(first: dict[str, Any], preset: str) -> None:
    plan = run_cli(preset, "--plan", "--set", "distil.temperature=0.1").stdout
    line = next(line for line in plan.splitlines() if line.split()[1] == "distil")
    assert line.startswith("miss")
    assert "recipe.temperature: 0.7 -> 0.1" in line


def test_generated_rows_are_never_generated_again(first: dict[str, Any], preset: str) -> None:
    """The dataset's artifact is gone, its shards are not: the stage runs, and no engine does."""
    store = ArtifactStore.from_environment()
    uri = next(stage["uri"] for stage in first["stages"] if stage["name"] == "distil")
    folder = store.fetch(store.manifest_at(uri))
    before = (folder / "rows.jsonl").read_bytes()
    store.fs.rm(uri, recursive=True)
    done = run_cli(preset)
    stages = {stage["name"]: stage["cache"] for stage in report_of(done)["stages"]}
    assert [name for name, cache in stages.items() if cache == "miss"] == ["distil"]
    assert "rewrites accepted" not in done.stdout + done.stderr
    assert (store.fetch(store.manifest_at(uri)) / "rows.jsonl").read_bytes() == before


def test_deleted_artifact_runs_exactly_its_stage_again(first: dict[str, Any], preset: str) -> None:
    store = ArtifactStore.from_environment()
    uri = next(stage["uri"] for stage in first["stages"] if stage["name"] == "finetune sft")
    store.fs.rm(uri, recursive=True)
    plan = run_cli(preset, "--plan").stdout
    assert [line.split()[1:3] for line in plan.splitlines() if line.startswith("miss")] == [["finetune", "sft"]]


def test_one_stage_alone_as_another_machine_makes_it(first: dict[str, Any], preset: str) -> None:
    loaded, store = load_preset(preset), ArtifactStore.from_environment()
    stage = dict(build_plan(loaded).stages())["drift sdd"]
    store.fs.rm(store.uri(stage), recursive=True)
    run_stage(loaded, "drift sdd", stage.key)
    assert store.find(stage)
    with pytest.raises(ConfigError, match=r"would make .*, the run waits for 000000000000; .*lock file"):
        run_stage(loaded, "drift sdd", "0" * 64)
    with pytest.raises(ConfigError, match="name=drift sda: no stage"):
        run_stage(loaded, "drift sda", stage.key)
    other = load_preset(preset, ("finetune.seed=1",))
    with pytest.raises(ArtifactError, match="merge sdd needs its adapter"):
        run_stage(other, "merge sdd", build_plan(other).merged["sdd"].key)


def test_refreshed_stages_are_made_anew_once(first: dict[str, Any], preset: str) -> None:
    """The artifact goes to quarantine/; what the run then makes stays when the run is started again."""
    loaded, store = load_preset(preset), ArtifactStore.from_environment()
    plan = build_plan(loaded)
    stage = plan.drifts["pruned"]
    before = store.find(stage)
    found = []

    @flow(persist_result=False)
    def refreshing() -> None:
        set_aside(plan, ["drift pruned"])
        found.append(store.find(stage))
        run_stage(loaded, "drift pruned", stage.key)
        found.append(store.find(stage))
        set_aside(plan, ["drift pruned"])
        found.append(store.find(stage))

    refreshing()
    assert before and found[0] is None and found[1] == found[2] != before
    assert any(path.startswith(f"{stage.address}-") for path in store.objects("quarantine"))


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["no-such-preset"], {}, ["no-such-preset", "demo-cpu"]),
        (["@", "--set", "finetune.rnak=3"], {}, ["finetune.rnak", "unknown setting"]),
        (["@", "--set", "prune.blocks=6"], {}, ["prune.blocks=6", "6 blocks", "between 1 and 5"]),
        (
            ["@", "--set", "dataset.sources.0.answer=solution"],
            {},
            ["no column 'solution'", "kind, instruction, answer"],
        ),
        (["@", "--set", "dataset.sources.0.path=@empty"], {}, ["is empty"]),
        (["@", "--set", "model.path=@encoder"], {}, ["no causal language model", "BertModel"]),
        (["@", "--refresh", "distill"], {}, ["refresh=['distill']", "--plan"]),
        (["@"], {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ["AWS_ENDPOINT_URL", "http://127.0.0.1:9"]),
        (["@"], {"AWS_SECRET_ACCESS_KEY": "wrong"}, ["AWS_SECRET_ACCESS_KEY"]),
        (["@"], {"SDD_STORE": "ftp://somewhere"}, ["SDD_STORE=ftp://somewhere"]),
        (["@"], {"SDD_DATA_ROOT": "/nonexistent"}, ["SDD_DATA_ROOT=/nonexistent"]),
        (["@"], {"PREFECT_API_URL": "http://127.0.0.1:9/api"}, ["PREFECT_API_URL=http://127.0.0.1:9/api"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_input_is_refused_in_one_sentence(
    arguments: list[str], variables: dict[str, str], words: list[str], preset: str, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "encoder").mkdir()
    config = {"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 6}
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config))
    (tmp_path / "encoder" / "model.safetensors").write_bytes(b"")
    names = {"@": preset, "@empty": str(tmp_path / "empty.jsonl"), "@encoder": str(tmp_path / "encoder")}
    filled = [_fill(argument, names) for argument in arguments]
    store = ArtifactStore.from_environment()
    before = set(store.fs.find(store.root))
    done = run_cli(*filled, **variables)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert "wrong" not in done.stderr.split("error: ")[1] or "AWS_SECRET" not in str(variables)
    assert set(store.fs.find(store.root)) == before


def test_a_refreshed_dataset_takes_what_is_made_from_it_and_its_shards_along(
    first: dict[str, Any], preset: str
) -> None:
    """Runs last: little is left of the artifacts."""
    loaded, store = load_preset(preset), ArtifactStore.from_environment()
    plan = build_plan(loaded)
    shown = run_cli(preset, "--plan", "--refresh", "distil").stdout
    expected = {"distil", *(name for name, _ in plan.stages() if " sft" in name or " sdd" in name)}
    assert {line[6:38].strip() for line in shown.splitlines() if not line.startswith("hit")} == expected
    assert "anew  distil" in shown
    shards = [path for path in store.objects("parts/distil") if not path.endswith("lease.json")]

    @flow(persist_result=False)
    def refreshing() -> None:
        set_aside(plan, ["distil"])

    refreshing()
    assert {name for name, stage in plan.stages() if store.find(stage) is None} == expected
    left = [path for path in store.objects("parts/distil") if not path.endswith("lease.json")]
    assert shards and not left


def _fill(argument: str, names: dict[str, str]) -> str:
    key, equals, value = argument.partition("=")
    return names.get(key, key) if not equals else f"{key}={names.get(value, value)}"
