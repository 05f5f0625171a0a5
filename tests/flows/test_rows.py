"""Rows of every kind in one form, without what overlaps a benchmark item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow

from flows.plan import build_plan
from tasks.domain.errors import ConfigError, DataError
from tasks.domain.recipe import Preset, Rows, load_preset
from tasks.materialise import Ref, folder_of
from tasks.rows import draw, load_rows
from tasks.store.artifacts import ArtifactStore
from tests.conftest import write_jsonl
from tests.tiny_data import write_data_root, write_preset

TURNS: list[list[dict[str, str]]] = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"},
     {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And now?"},
     {"role": "assistant", "content": " Goodbye. "}],
    [{"role": "user", "content": "Are you there?"}, {"role": "assistant", "content": "Yes."},
     {"role": "user", "content": "Nobody answered this."}],
    [{"role": "assistant", "content": "I begin, and nobody asked."}],
    [{"role": "user", "content": "Nobody answers at all."}],
]  # fmt: skip
# Of a question of tests/tiny_data.py, which has eight words.
LEAKED = "Tell me this: what did traveller 2 see near the garden? I must know."


@flow(persist_result=False)
def loading(preset: Preset) -> Ref:
    ref: Ref = load_rows.submit(build_plan(preset).rows, preset.dataset, None).result()
    return ref


@pytest.fixture
def preset_with(stack: dict[str, str], pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from the settings of the dataset to a preset on the tiny data root, with a store of its own."""
    monkeypatch.setenv("SDD_STORE", f"s3://sdd/{uuid4().hex}")
    monkeypatch.setenv("SDD_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("SDD_DATA_ROOT", str(write_data_root(tmp_path / "data")))

    def make(source: dict[str, Any], **dataset: Any) -> Preset:
        path = write_preset(tmp_path / "p.yaml", pico, dataset={"sources": [{"name": "mine", **source}], **dataset})
        return load_preset(str(path))

    return make


def rows_of(preset: Preset) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    ref = loading(preset)
    lines = (folder_of(ref) / "rows.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda row: str(row["id"])), ref["facts"]


def test_a_conversation_is_asked_up_to_its_last_answer(preset_with: Any, tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "chat.jsonl", [{"turns": turns} for turns in TURNS])
    rows, _ = rows_of(preset_with({"kind": "chat", "path": str(table), "messages": "turns"}))
    assert [(row["id"], row["reference"]) for row in rows] == [("mine-000000", "Goodbye."), ("mine-000001", "Yes.")]
    assert [[turn["role"] for turn in row["prompt"]] for row in rows] == [
        ["system", "user", "assistant", "user"], ["user"],
    ]  # fmt: skip


def test_rows_that_overlap_a_benchmark_item_are_dropped_and_counted(preset_with: Any, tmp_path: Path) -> None:
    pairs = [{"q": f"What is {number} and one?", "a": f"It is {number + 1}."} for number in range(4)]
    table = write_jsonl(tmp_path / "mine.jsonl", [*pairs, {"q": LEAKED, "a": "the cloud"}])
    source = {"kind": "custom", "path": str(table), "instruction": "q", "answer": "a"}
    rows, facts = rows_of(preset_with(source))
    assert len(rows) == facts["rows"] == 4 and facts["overlapping"] == {"mine": 1}
    assert all(row["prompt"][0]["content"] != LEAKED for row in rows)
    kept, facts = rows_of(preset_with(source, overlap_words=None))
    assert len(kept) == 5 and facts["overlapping"] == {"mine": 0}
    limited, _ = rows_of(preset_with({**source, "rows": 4}))
    assert [row["id"] for row in limited] == [row["id"] for row in rows], "another row takes the dropped one's place"


def test_nothing_left_is_an_error(preset_with: Any, tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "mine.jsonl", [{"q": LEAKED, "a": "the cloud"}])
    with pytest.raises(DataError, match=r"dataset\.overlap_words: every row overlaps"):
        loading(preset_with({"kind": "custom", "path": str(table), "instruction": "q", "answer": "a"}))
    store = ArtifactStore.from_environment()
    assert not store.fs.glob(f"{store.root}/rows/*/manifest.json")


def test_an_instruction_is_asked_with_its_context_below(tmp_path: Path) -> None:
    """As Dolly's and Alpaca's rows, of which most have none."""
    rows: list[dict[str, Any]] = [{"instruction": "Sum up.", "input": " A text. ", "output": "So."},
            {"instruction": "Hello?", "input": None, "output": "Hi."}]  # fmt: skip
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    drawn = draw(Rows(name="mine", kind="instruction", path=path, context="input", answer="output"), 0)
    found = {row["id"]: (row["prompt"], row["reference"]) for row in drawn}
    assert found == {
        "mine-000000": ([{"role": "user", "content": "Sum up.\n\nA text."}], "So."),
        "mine-000001": ([{"role": "user", "content": "Hello?"}], "Hi."),
    }


def test_a_custom_dataset_names_its_columns(preset_with: Any) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.sources\.0.*set `instruction` and `answer`"):
        preset_with({"kind": "custom", "path": "x.jsonl"})
