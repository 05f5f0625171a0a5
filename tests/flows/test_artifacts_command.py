"""`python -m flows.artifacts` on a small family of artifacts: two runs, one shared model, and what is left over."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from uuid import uuid4

import pytest

from flows.artifacts import main
from flows.plan import build_plan
from tasks.domain.recipe import load_preset
from tasks.domain.stage import Stage
from tasks.store import housekeeping
from tasks.store.artifacts import LEASE, MANIFEST, ArtifactStore
from tasks.store.conditional import create
from tasks.store.lease import Lease
from tests.store.conftest import objects, produced
from tests.tiny_data import write_data_root, write_preset

MODEL = Stage("model", 1, {"id": "pico"}, slug="pico")
OLD = Stage("prune", 1, {"blocks": 1, "seed": 0}, {"model": MODEL}, "pico-n1")
NEW = Stage("prune", 1, {"blocks": 2, "seed": 0}, {"model": MODEL}, "pico-n2")
LOOSE = Stage("prune", 1, {"blocks": 9, "seed": 7}, {"model": MODEL}, "pico-n9")
STAGES = (MODEL, OLD, NEW, LOOSE)


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """All four artifacts; a report of each of two runs, the older of which used OLD and the newer NEW."""
    if request.param == "s3":
        request.getfixturevalue("stack")
    root = f"s3://sdd/{uuid4().hex}" if request.param == "s3" else f"file://{tmp_path}/store"
    monkeypatch.setenv("SDD_STORE", root)
    monkeypatch.setenv("SDD_MIRROR", str(tmp_path / "mirror"))
    store = ArtifactStore.from_environment()
    for stage in STAGES:
        store.publish(stage, produced(tmp_path / stage.slug, {"config.json": stage.key.encode()}), {}, 0)
    report(store, tmp_path, "run-old", [MODEL, OLD])
    report(store, tmp_path, "run-new", [NEW])
    return store


def report(store: ArtifactStore, tmp_path: Path, run: str, stages: list[Stage]) -> None:
    text = json.dumps({"stages": [{"key": stage.key, "uri": store.uri(stage)} for stage in stages]})
    store.upload_report(produced(tmp_path / run, {"report.json": text.encode()}), run)


@pytest.fixture
def next_week(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's clock is a week and a bit ahead, and the newer report is really the newer one for it."""
    real, changed = housekeeping._now, housekeeping._changed
    monkeypatch.setattr(housekeeping, "_now", lambda store: real(store) + 169 * 3600)
    monkeypatch.setattr(housekeeping, "_changed", lambda info: changed(info) + 5 * ("run-new" in info["name"]))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(list(arguments))
    output = capsys.readouterr()
    return status, output.out + output.err


def addresses(store: ArtifactStore) -> set[str]:
    return {path.rsplit("/", 1)[0] for path in objects(store) if path.endswith(MANIFEST) and "quarantine" not in path}


def test_list_shows_every_artifact_with_what_it_is_made_of(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = run(capsys, "list")
    assert status == 0
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines.keys() == {stage.address for stage in STAGES} | {"4"}
    assert re.search(rf"64 B .* \d+ s +\S+@\S+ +[0-9a-f]{{12}}.* +from model {MODEL.key[:12]}$", lines[NEW.address])
    assert run(capsys, "list", "model")[1].splitlines()[0].startswith(MODEL.address)
    assert len(run(capsys, "list", "model")[1].splitlines()) == 2


@pytest.mark.parametrize("name", [NEW.address, NEW.key[:6], NEW.key])
def test_show_prints_files_and_ancestry(store: ArtifactStore, capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, text = run(capsys, "show", name)
    first, file, parent = text.splitlines()
    assert status == 0
    assert first.startswith(NEW.address) and file.endswith("config.json")
    assert parent.startswith(f"  model: {MODEL.address}")
    store.fs.rm(store.uri(MODEL), recursive=True)
    assert run(capsys, "show", name)[1].splitlines()[-1] == f"  model: {MODEL.key[:12]} is gone"


def test_show_asks_for_one_that_is_there(store: ArtifactStore, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "show", "prune/none")
    assert (status, text) == (2, "error: prune/none: 0 artifacts have this address or key; see `list`\n")


def test_explain_compares_with_the_nearest_and_follows_changed_inputs(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], pico: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SDD_DATA_ROOT", str(write_data_root(tmp_path / "data")))
    preset = str(write_preset(tmp_path / "pico.yaml", pico))
    plan = build_plan(load_preset(preset, ()))
    assert "miss, nearest" in run(capsys, "explain", preset, "model")[1]
    near, far = (
        load_preset(preset, changes) for changes in (("distil.seed=5",), ("distil.seed=6", "distil.top_p=0.5"))
    )
    for number, other in enumerate((near, far)):
        store.publish(build_plan(other).distilled, produced(tmp_path / f"distil-{number}"), {}, 0)
    newest = f"{store.uri(build_plan(far).distilled)}/{MANIFEST}"
    later = json.loads(store.fs.cat_file(newest)) | {"created": "2099-01-01T00:00:00+00:00"}
    store.fs.pipe_file(newest, json.dumps(later).encode())
    status, text = run(capsys, "explain", preset, "distil")
    assert (status, text) == (0, f"distil: miss, nearest {build_plan(near).distilled.address}: recipe.seed: 5 -> 0\n")
    store.publish(plan.model, produced(tmp_path / "model"), {}, 0)
    assert run(capsys, "explain", preset, "model")[1] == f"model: hit, {plan.model.address}\n"
    changed = ("--set", "dataset.seed=3")
    store.publish(plan.rows, produced(tmp_path / "rows"), {}, 0)
    store.publish(plan.distilled, produced(tmp_path / "distil"), {}, 0)
    text = run(capsys, "explain", preset, "distil", *changed)[1]
    assert "inputs.rows: " in text
    assert f"distil: rows: miss, nearest {plan.rows.address}: recipe.seed: 0 -> 3" in text
    assert len(run(capsys, "explain", preset)[1].splitlines()) >= 33
    assert run(capsys, "explain", preset, "no such")[0] == 2


def test_verify_reads_every_byte_and_quarantines_on_demand(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "verify") == (0, "4 artifacts, 0 bad\n")
    shutil.rmtree(store.mirror)
    path = f"{store.uri(NEW)}/config.json"
    store.fs.rm_file(path)
    store.fs.pipe_file(path, NEW.key[::-1].encode())  # as long as before
    store.fs.rm_file(f"{store.uri(OLD)}/config.json")
    store.fs.pipe_file(f"{store.uri(LOOSE)}/{MANIFEST}", b"no json")
    before = objects(store)
    status, text = run(capsys, "verify")
    assert status == 1 and text.endswith("4 artifacts, 3 bad\n")
    assert f"bad   {path} does not have the size and sha256" in text
    assert f"bad   {store.uri(OLD)}/config.json is gone" in text
    assert f"{store.uri(LOOSE)}/{MANIFEST} is no manifest" in text
    assert objects(store) == before
    assert run(capsys, "verify", MODEL.address) == (0, "1 artifacts, 0 bad\n")
    assert run(capsys, "verify", "--quarantine")[0] == 1
    assert addresses(store) == {MODEL.address}
    assert (
        len([path for path in objects(store) if path.startswith("quarantine/prune/")]) == 5
    )  # two and two files, and a manifest
    assert run(capsys, "verify") == (0, "1 artifacts, 0 bad\n")


def test_verify_finds_a_copy_that_rotted_on_this_machine(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = store.mirror / NEW.address / "config.json"
    stat = copy.stat()
    copy.unlink()
    copy.write_bytes(NEW.key[::-1].encode())
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if the disk, and no program, had changed it
    status, text = run(capsys, "verify", "--quarantine")
    assert status == 1 and f"bad   {copy} does not have the sha256" in text
    assert not copy.exists() and addresses(store) == {stage.address for stage in STAGES}
    assert run(capsys, "verify")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "removed"),
    [
        ((), [LOOSE]),
        (("--newest", "1"), [OLD, LOOSE]),
        (("--newest", "1", "--keep", "run-old"), [LOOSE]),
        (("--newest", "0", "--keep", "run-old"), [NEW, LOOSE]),
        (("--hours", "170"), []),
    ],
)
def test_gc_removes_what_no_report_reaches(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], next_week: None, arguments: tuple[str, ...],
    removed: list[Stage],
) -> None:  # fmt: skip
    """The model stays with every run: each of them needs it, though only one report names it."""
    before = objects(store)
    status, text = run(capsys, "gc", *arguments)
    assert status == 0
    assert {line.split()[2] for line in text.splitlines()[:-1]} == {stage.address for stage in removed}
    assert objects(store) == before, "it removes nothing unless told to"
    run(capsys, "gc", *arguments, "--delete")
    assert addresses(store) == {stage.address for stage in STAGES if stage not in removed}
    assert not [path for path in objects(store) for stage in removed if path.startswith(stage.address)]
    assert len([path for path in objects(store) if path.startswith("reports/")]) == 2


def test_gc_leaves_the_young_the_leased_and_what_is_being_made(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, "gc", "--delete")[1] == "0 B removed\n", "everything is younger than a week"
    partial = Stage("prune", 1, {"blocks": 5}, {"model": MODEL}, "pico-n5")
    store.fs.makedirs(store.uri(partial), exist_ok=True)
    store.fs.pipe_file(f"{store.uri(partial)}/config.json", b"{")
    real = housekeeping._now
    monkeypatch.setattr(housekeeping, "_now", lambda store: real(store) + 500)
    with store.lease(partial), store.hold(LOOSE.address, lambda: False):
        assert run(capsys, "gc", "--hours", "0", "--delete")[1] == "0 B removed\n"
    text = run(capsys, "gc", "--hours", "0", "--delete")[1]
    assert re.search(rf"removed +{partial.address} .* broken-off upload", text)
    assert re.search(rf"removed +{LOOSE.address} .* artifact", text)
    assert not objects(store, partial.address) and not objects(store, LOOSE.address)


def test_gc_leaves_what_a_young_artifact_was_made_from(
    store: ArtifactStore, tmp_path: Path, next_week: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a run that goes on for days and has no report yet."""
    young = Stage("finetune", 1, {}, {"pruned": LOOSE}, "young")
    store.publish(young, produced(tmp_path / "young", {"adapter.safetensors": b"x"}), {}, 0)
    changed = housekeeping._changed
    monkeypatch.setattr(housekeeping, "_changed", lambda info: changed(info) + 168 * 3600 * ("young" in info["name"]))
    assert [entry.address for entry in housekeeping.unneeded(store, 10, [], 2 * 3600)] == []
    assert {entry.address for entry in housekeeping.unneeded(store, 10, [], 0)} == {LOOSE.address, young.address}


def test_gc_leaves_what_a_run_that_has_begun_takes_as_it_is(
    store: ArtifactStore, next_week: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hit changes nothing in the store, and what is made next to it need not be made from it."""
    store.announce("run-going-on", [LOOSE])
    changed = housekeeping._changed
    young = 168 * 3600
    monkeypatch.setattr(housekeeping, "_changed", lambda info: changed(info) + young * ("going-on" in info["name"]))
    assert [entry.address for entry in housekeeping.unneeded(store, 10, [], 2 * 3600)] == []
    assert housekeeping.stale_pieces(store) == {}
    young = 0
    assert [entry.address for entry in housekeeping.unneeded(store, 10, [], 2 * 3600)] == [LOOSE.address]
    monkeypatch.setattr(housekeeping, "PIECES_KEPT", 0.0)
    assert list(housekeeping.stale_pieces(store)) == ["plans/run-going-on.json"]


def test_gc_follows_a_lease_whose_holder_is_long_dead(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], next_week: None
) -> None:
    assert create(store.fs, f"{store.uri(LOOSE)}/{LEASE}", b'{"owner": "dead"}')
    assert "removed" in run(capsys, "gc", "--delete")[1]
    assert not objects(store, LOOSE.address)


def test_gc_leaves_what_somebody_began_to_write_after_it_looked(store: ArtifactStore, next_week: None) -> None:
    entries = housekeeping.unneeded(store, 10, [], 3600)
    assert [entry.address for entry in entries] == [LOOSE.address]
    with store.hold(LOOSE.address, lambda: False):
        assert not housekeeping.remove(store, entries[0])
    entries[0].changed = time.time() - 1000
    assert not housekeeping.remove(store, entries[0])
    assert store.find(LOOSE) is not None


def test_gc_that_was_suspended_and_overtaken_deletes_no_more(
    store: ArtifactStore, next_week: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is lost after the first deletion."""
    (entry,) = housekeeping.unneeded(store, 10, [], 3600)
    before = objects(store, LOOSE.address)
    remove, held = store.fs.rm_file, [True]

    def remove_and_lose(path: str) -> None:
        remove(path)
        held.clear()

    monkeypatch.setattr(store.fs, "rm_file", remove_and_lose)
    monkeypatch.setattr(Lease, "held", lambda _lease: bool(held))
    assert not housekeeping.remove(store, entry)
    assert before - objects(store, LOOSE.address) == {f"{LOOSE.address}/{MANIFEST}"}


@pytest.mark.parametrize(
    ("arguments", "words"), [(("--keep", "run-none"), "no report of run run-none"), ((), "says what to keep")]
)
def test_gc_needs_to_know_what_to_keep(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], next_week: None, arguments: tuple[str, ...], words: str
) -> None:
    if not arguments:
        store.fs.rm(f"{store.root}/reports", recursive=True)
    status, text = run(capsys, "gc", "--delete", *arguments)
    assert status == 2 and words in text
    assert addresses(store) == {stage.address for stage in STAGES}


def test_gc_of_a_store_without_a_bucket_says_the_same(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    none = f"s3://{uuid4().hex}/artifacts" if store.root.startswith("s3://") else f"{store.root}-none"
    monkeypatch.setenv("SDD_STORE", none)
    status, text = run(capsys, "gc", "--delete")
    assert status == 2 and "says what to keep" in text


def test_gc_stops_at_a_report_that_it_cannot_read(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], next_week: None
) -> None:
    store.fs.pipe_file(f"{store.root}/reports/run-new/report.json", b"{")
    status, text = run(capsys, "gc", "--delete")
    assert status == 1 and "run-new/report.json cannot be read" in text
    assert addresses(store) == {stage.address for stage in STAGES}
