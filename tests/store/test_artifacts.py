"""The artifact store on a real S3 server and on a folder: what is published is whole, and what is not is not found."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fsspec import get_filesystem_class

from tasks.domain.errors import ArtifactError, ConfigError, PipelineError, StoreUnavailable
from tasks.store.artifacts import LEASE, MANIFEST, ArtifactStore, Manifest, Quarantined, Transfer
from tasks.store.conditional import create
from tasks.store.lease import Lease
from tasks.store.mirror import sha256_of
from tests.store.conftest import FILES, contents, objects, produced, stage

WRITERS = 24


@pytest.fixture
def s3(stack: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """A root on S3 for tests that change the environment; clients made meanwhile are forgotten."""
    get_filesystem_class("s3").clear_instance_cache()
    yield f"s3://sdd/{uuid4().hex}"
    get_filesystem_class("s3").clear_instance_cache()


def mirrored(store: ArtifactStore) -> list[Path]:
    return [path for path in store.mirror.rglob("*") if path.is_file()] if store.mirror.exists() else []


def test_publish_find_and_fetch_give_the_same_files(store: ArtifactStore, tmp_path: Path) -> None:
    assert store.find(stage()) is None
    published = store.publish(stage(), produced(tmp_path / "out"), {"rows": 1}, 1.23456)
    found = store.find(stage())
    assert found == published
    assert found.facts == {"rows": 1} and found.seconds == 1.235
    assert found.identity == stage().identity() and found.key == stage().key
    assert {name: entry["bytes"] for name, entry in found.files.items()} == {n: len(c) for n, c in FILES.items()}
    assert contents(store.fetch(found)) == FILES
    assert store.manifest_at(store.uri(stage())) == published


def test_another_machine_downloads_the_same_files(store: ArtifactStore, tmp_path: Path) -> None:
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    elsewhere = ArtifactStore(store.root, tmp_path / "elsewhere")
    folder = elsewhere.fetch(published)
    assert folder == tmp_path / "elsewhere" / stage().address
    assert contents(folder) == FILES
    assert [path.name for path in elsewhere.mirror.iterdir()] == ["rows"], "nothing of the download is left beside it"


def test_a_deleted_mirror_is_downloaded_again(store: ArtifactStore, tmp_path: Path) -> None:
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    shutil.rmtree(store.mirror)
    assert contents(store.fetch(published)) == FILES


def test_the_manifest_says_who_made_it(store: ArtifactStore, tmp_path: Path) -> None:
    made_by = store.publish(stage(), produced(tmp_path / "out"), {}, 0).made_by
    assert made_by["host"] and made_by["user"] and made_by["libraries"]["torch"]
    assert len(made_by["code_commit"].removesuffix("-dirty")) == 40


def test_without_a_manifest_there_is_no_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    store.fs.rm_file(f"{store.uri(stage())}/{MANIFEST}")
    assert store.fs.exists(f"{store.uri(stage())}/rows.jsonl")
    assert store.find(stage()) is None
    with pytest.raises(ArtifactError, match=r"is gone from the store; run the flow again"):
        store.manifest_at(store.uri(stage()))


def test_a_stage_with_another_recipe_is_not_found(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    assert store.find(stage(rows=5)) is None


def test_the_second_publisher_gets_what_the_first_published(store: ArtifactStore, tmp_path: Path) -> None:
    first = store.publish(stage(), produced(tmp_path / "one"), {"rows": 1}, 1)
    second = store.publish(stage(), produced(tmp_path / "two", {"rows.jsonl": b"other"}), {"rows": 2}, 2)
    assert second == first
    shutil.rmtree(store.mirror)
    assert contents(store.fetch(second)) == FILES


def test_a_stage_that_wrote_nothing_is_not_published(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="rows: the stage wrote no file"):
        store.publish(stage(), tmp_path / "out", {}, 0)
    assert store.find(stage()) is None


def test_an_upload_that_breaks_off_leaves_no_artifact(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.store.artifacts.PATIENCE_SECONDS", 0.0)
    put, puts = store._put, list[str]()

    def half(source: Path, path: str, *rest: Any) -> bool:
        if puts:
            raise ConnectionResetError("the network went away")
        puts.append(path)
        return put(source, path, *rest)

    monkeypatch.setattr(store, "_put", half)
    with pytest.raises(StoreUnavailable) as caught:
        store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    assert caught.value.retryable
    assert store.find(stage()) is None
    assert objects(store) == {f"{stage().address}/{name}" for name in sorted(FILES)[:1]}
    assert not mirrored(store)
    monkeypatch.undo()
    other = {"rows.jsonl": b"of the run after"}
    published = store.publish(stage(), produced(tmp_path / "again", other), {}, 0)
    shutil.rmtree(store.mirror)
    assert contents(store.fetch(published)) == other
    assert objects(store) == {f"{stage().address}/rows.jsonl", f"{stage().address}/{MANIFEST}"}


def test_a_transfer_counts_the_bytes_of_all_files(store: ArtifactStore, tmp_path: Path) -> None:
    up, down = Transfer(), Transfer()
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0, moved=up)
    ArtifactStore(store.root, tmp_path / "reader").fetch(published, down)
    assert up.size == down.size == published.bytes
    linked = store.root.startswith("file://")
    assert up.value == down.value == (0 if linked else published.bytes)


def test_the_manifest_is_written_after_every_file(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, seen = store._put, []

    def watched(*arguments: Any) -> bool:
        written = put(*arguments)
        seen.append(store.find(stage()))
        return written

    monkeypatch.setattr(store, "_put", watched)
    store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    assert seen == [None] * len(FILES)


def test_an_upload_that_arrives_cut_off_is_sent_again(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.store.artifacts.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(store.fs, "size", lambda path: 1)
    with pytest.raises(StoreUnavailable, match=r"has 1 bytes after the upload of 0"):
        store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    assert store.find(stage()) is None


@pytest.mark.parametrize("planted", [b'{"id": 2}\n', b""], ids=["other bytes", "cut off"])
def test_an_object_that_rotted_is_quarantined_and_made_again(
    store: ArtifactStore, tmp_path: Path, planted: bytes
) -> None:
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    plant(store, "rows.jsonl", planted)
    with pytest.raises(Quarantined, match=r"rows\.jsonl does not have the 10 bytes and the sha256") as caught:
        store.fetch(published)
    assert store.uri(stage()) in str(caught.value)
    assert not mirrored(store)
    assert not objects(store, stage().address), "nothing of it is left where readers look"
    moved = quarantined(store)
    assert moved.keys() == {*FILES, MANIFEST} and moved["rows.jsonl"] == planted
    assert store.find(stage()) is None
    again = store.publish(stage(), produced(tmp_path / "again"), {}, 0)
    shutil.rmtree(store.mirror)
    assert contents(store.fetch(again)) == FILES


def test_an_object_that_is_gone_quarantines_the_rest(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    store.fs.rm_file(f"{store.uri(stage())}/rows.jsonl")
    shutil.rmtree(store.mirror)
    with pytest.raises(Quarantined, match=r"rows\.jsonl is gone"):
        store.obtain(stage())
    assert not mirrored(store)
    assert store.obtain(stage()) is None
    assert quarantined(store).keys() == {*FILES, MANIFEST} - {"rows.jsonl"}


@pytest.mark.parametrize("text", [b"", b"no json", b"[]", b'{"stage": "rows"}', b"other key"])
def test_a_manifest_that_is_none_is_quarantined_by_who_needs_it_and_not_by_a_plan(
    store: ArtifactStore, tmp_path: Path, text: bytes
) -> None:
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    if text == b"other key":
        text = json.dumps({**published.__dict__, "key": published.key[:12] + "f" * 52}).encode()
    store.fs.pipe_file(f"{store.uri(stage())}/{MANIFEST}", text)
    with pytest.raises(ArtifactError):
        store.find(stage())
    assert not quarantined(store)
    with pytest.raises(Quarantined):
        store.obtain(stage())
    assert quarantined(store)[MANIFEST] == text
    assert store.obtain(stage()) is None


def test_only_the_artifact_that_was_judged_is_quarantined(store: ArtifactStore, tmp_path: Path) -> None:
    bad = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    good = store.publish(stage(rows=2), produced(tmp_path / "two"), {}, 0)
    replaced = replace(bad, facts={"made": "again"})
    store.fs.pipe_file(f"{store.uri(stage())}/{MANIFEST}", json.dumps(replaced.__dict__).encode())
    assert "replaced it meanwhile" in str(store.quarantine(stage().address, bad, "bad"))
    assert store.find(stage()) == replaced and store.find(stage(rows=2)) == good
    assert not quarantined(store)


def test_a_quarantine_that_was_suspended_and_overtaken_moves_no_more(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is lost after the first object has been moved."""
    bad = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    move, held = store.fs.mv, [True]

    def move_and_lose(*arguments: Any) -> None:
        move(*arguments)
        held.clear()

    monkeypatch.setattr(store.fs, "mv", move_and_lose)
    monkeypatch.setattr(Lease, "held", lambda _lease: bool(held))
    assert "replaced it meanwhile" in str(store.quarantine(stage().address, bad, "bad"))
    assert quarantined(store).keys() == {MANIFEST}


def plant(store: ArtifactStore, name: str, content: bytes) -> None:
    """Change an object of the published stage in the store only; the mirror is gone."""
    shutil.rmtree(store.mirror)
    store.fs.rm_file(f"{store.uri(stage())}/{name}")
    store.fs.pipe_file(f"{store.uri(stage())}/{name}", content)


def quarantined(store: ArtifactStore) -> dict[str, bytes]:
    """Relative path and content of what lies in the one quarantined folder."""
    found = {path.split("/", 3)[3]: store.fs.cat_file(f"{store.root}/{path}") for path in objects(store, "quarantine")}
    assert len({path.split("/")[2] for path in objects(store, "quarantine")}) <= 1
    return found


@pytest.mark.parametrize("damage", ["other bytes", "cut off", "removed"])
def test_a_damaged_mirror_is_never_used(store: ArtifactStore, tmp_path: Path, damage: str) -> None:
    elsewhere = ArtifactStore(store.root, tmp_path / "elsewhere")
    store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    published = elsewhere.obtain(stage())
    assert published
    weights = elsewhere.mirror / stage().address / "deep/er/weights.bin"
    before = weights.read_bytes()
    weights.unlink()  # not through the hard link that a file:// store shares
    if damage != "removed":
        weights.write_bytes(before[:-1] if damage == "cut off" else before[:-1] + b"!")
    assert contents(elsewhere.fetch(published)) == FILES
    assert [path.name for path in elsewhere.mirror.iterdir()] == ["rows"]


def test_a_folder_of_an_artifact_that_was_deleted_is_not_taken_for_the_new_one(
    store: ArtifactStore, tmp_path: Path
) -> None:
    store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    store.fs.rm(store.uri(stage()), recursive=True)
    other = {"rows.jsonl": b"made again, otherwise"}
    assert contents(store.fetch(store.publish(stage(), produced(tmp_path / "two", other), {}, 0))) == other


@pytest.mark.parametrize(
    "changes",
    [
        *({"files": {name: {"bytes": 10, "sha256": "0" * 64}}} for name in ("../x", "/etc/x", "a/../../x", "..", "")),
        {"files": {"x": {"bytes": "10", "sha256": "0" * 64}}},
        {"files": {"x": {"bytes": 10, "sha256": "0"}}},
        {"files": {"x": {}}},
        {"address": "../rows/pico-" + "0" * 12},
        {"address": "rows/../pico-" + "0" * 12},
        {"address": "/rows/pico-" + "0" * 12},
        {"address": "score/pico-" + "0" * 12, "stage": "score", "key": "0" * 64},
        {"stage": "score"},
        {"key": "f" * 64},
        {"created": "yesterday"},
    ],
    ids=str,
)
def test_a_manifest_may_not_lead_elsewhere(store: ArtifactStore, tmp_path: Path, changes: dict[str, Any]) -> None:
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    shutil.rmtree(store.mirror)
    evil = json.dumps({**published.__dict__, **changes}).encode()
    store.fs.pipe_file(f"{store.uri(stage())}/{MANIFEST}", evil)
    before = {path for path in tmp_path.rglob("*") if store.root.removeprefix("file://") not in str(path)}
    reads: list[Callable[[], object]] = [
        lambda: store.find(stage()), lambda: store.manifest_at(store.uri(stage())), lambda: store.obtain(stage()),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(ArtifactError, match="is no manifest"):
            read()
    after = {path for path in tmp_path.rglob("*") if store.root.removeprefix("file://") not in str(path)}
    assert after == before


@pytest.mark.parametrize("text", [b"", b"no json", b"[]", b'{"stage": "rows"}'])
def test_a_broken_manifest_is_named(store: ArtifactStore, tmp_path: Path, text: bytes) -> None:
    store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    store.fs.pipe_file(f"{store.uri(stage())}/{MANIFEST}", text)
    with pytest.raises(ArtifactError, match=rf"{stage().address}/{MANIFEST} is no manifest"):
        store.find(stage())


def test_a_manifest_of_another_key_is_never_taken(store: ArtifactStore, tmp_path: Path) -> None:
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    other = json.dumps({**published.__dict__, "key": "f" * 64}).encode()
    store.fs.pipe_file(f"{store.uri(stage())}/{MANIFEST}", other)
    with pytest.raises(ArtifactError, match="f" * 64):
        store.find(stage())


def test_the_newest_artifact_tells_what_changed(store: ArtifactStore, tmp_path: Path) -> None:
    assert store.newest_change(stage()) is None
    store.publish(stage(), produced(tmp_path / "one"), {}, 0)
    assert store.newest_change(stage(rows=5)) == ["recipe.rows: absent -> 5"]
    assert store.newest_change(stage()) == []
    assert store.newest_change(stage("score")) is None


def test_a_report_lies_beside_the_artifacts(store: ArtifactStore, tmp_path: Path) -> None:
    folder = produced(tmp_path / "report", {"report.html": b"<html>", "report.json": b"{}"})
    uri = store.upload_report(folder, "run-1")
    assert uri == f"{store.root}/reports/run-1"
    assert store.fs.cat_file(f"{uri}/report.html") == b"<html>"
    assert store.fs.cat_file(f"{uri}/report.json") == b"{}"


def test_many_publishers_at_once_agree_on_one(store: ArtifactStore, tmp_path: Path) -> None:
    """Every one brings other bytes, as two GPUs may; the files that stand must be those of the manifest that stands."""
    winner = publish_at_once(store, tmp_path, lambda number: {"rows.jsonl": f"written by {number}\n".encode()})
    assert contents(store.fetch(winner)) == {"rows.jsonl": f"written by {winner.facts['writer']}\n".encode()}


def test_many_publishers_of_equal_files_leave_one_whole_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    assert contents(store.fetch(publish_at_once(store, tmp_path, lambda number: FILES))) == FILES


def publish_at_once(store: ArtifactStore, tmp_path: Path, files: Callable[[int], dict[str, bytes]]) -> Manifest:
    """WRITERS publishers of one key, each with a mirror of its own; returns the manifest on which all must agree."""
    start = threading.Barrier(WRITERS)

    def publish(number: int) -> Manifest:
        folder = produced(tmp_path / f"out-{number}", files(number))
        own = ArtifactStore(store.root, tmp_path / f"mirror-{number}")
        start.wait()
        return own.publish(stage(), folder, {"writer": number}, 0)

    with ThreadPoolExecutor(WRITERS) as pool:
        manifests = list(pool.map(publish, range(WRITERS)))
    winner = store.find(stage())
    assert winner is not None
    assert [manifest.facts for manifest in manifests] == [winner.facts] * WRITERS
    return winner


def test_a_second_publisher_waits_for_the_first_and_takes_its_artifact(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one starts while the first is uploading, with other bytes; the first one's stand."""
    second = ArtifactStore(store.root, tmp_path / "second-mirror")
    put, uploads = store._put, list[str]()
    with ThreadPoolExecutor(1) as pool:
        later: list[Any] = []

        def put_beside_the_second(source: Path, path: str, *rest: Any) -> bool:
            uploads.append(path)
            if not later:
                produced(tmp_path / "second", {"rows.jsonl": b"second"})
                later.append(pool.submit(second.publish, stage(), tmp_path / "second", {}, 0))
            return put(source, path, *rest)

        monkeypatch.setattr(store, "_put", put_beside_the_second)
        monkeypatch.setattr(second, "_put", put_beside_the_second)
        first = store.publish(stage(), produced(tmp_path / "first", {"rows.jsonl": b"first"}), {}, 0)
        assert later[0].result() == first
    assert len(uploads) == 1
    assert contents(ArtifactStore(store.root, tmp_path / "third").fetch(first)) == {"rows.jsonl": b"first"}
    assert not store.fs.exists(f"{store.uri(stage())}/{LEASE}")


def test_an_object_is_created_by_exactly_one(store: ArtifactStore) -> None:
    start = threading.Barrier(WRITERS)

    def write(number: int) -> bool:
        start.wait()
        return create(store.fs, f"{store.root}/exclusive/object.json", str(number).encode()) is not None

    with ThreadPoolExecutor(WRITERS) as pool:
        created = list(pool.map(write, range(WRITERS)))
    assert created.count(True) == 1
    assert store.fs.cat_file(f"{store.root}/exclusive/object.json") == str(created.index(True)).encode()


def test_many_readers_at_once_get_one_folder(store: ArtifactStore, tmp_path: Path) -> None:
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    shutil.rmtree(store.mirror)
    start = threading.Barrier(8)

    def fetch(_: int) -> dict[str, bytes]:
        start.wait()
        return contents(store.fetch(published))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetch, range(8))) == [FILES] * 8
    assert [path.name for path in store.mirror.iterdir()] == ["rows"]


def test_the_first_lease_makes_the_bucket_and_a_check_does_not(s3: str, tmp_path: Path) -> None:
    bucket = f"sdd-{uuid4().hex[:8]}"
    store = ArtifactStore(f"s3://{bucket}/artifacts/", tmp_path / "mirror")
    store.check()
    assert store.find(stage()) is None and store.newest_change(stage()) is None
    assert not store.fs.exists(bucket)
    with store.lease(stage()) as lease:
        assert lease.held()
        store.publish(stage(), produced(tmp_path / "out"), {}, 0, lease)
    store.check()
    assert store.uri(stage()) == f"s3://{bucket}/artifacts/{stage().address}"
    assert contents(ArtifactStore(store.root, tmp_path / "other").fetch(store.manifest_at(store.uri(stage())))) == FILES


@pytest.mark.timeout(30)  # "within seconds": one who mistypes an endpoint must not wait for rounds of retries
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret-1b9f"}, ConfigError),
        ({"AWS_ACCESS_KEY_ID": "WRONGID7c2e", "AWS_SECRET_ACCESS_KEY": "wrong-secret-1b9f"}, ConfigError),
        ({"AWS_ENDPOINT_URL": "closed port"}, StoreUnavailable),
    ],
    ids=["wrong secret", "unknown key id", "closed port"],
)
@pytest.mark.parametrize("action", ["check", "find", "publish"])
def test_a_store_that_cannot_be_used_says_which_setting(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str], expected: type[PipelineError], action: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("tasks.store.artifacts.PATIENCE_SECONDS", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        for name, value in changed.items():
            port = unused.getsockname()[1]
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}" if value == "closed port" else value)
        store = ArtifactStore(s3, tmp_path / "mirror")
        actions: dict[str, Callable[[], object]] = {
            "check": store.check,
            "find": lambda: store.find(stage()),
            "publish": lambda: store.publish(stage(), produced(tmp_path / "out"), {}, 0),
        }
        with pytest.raises(PipelineError) as caught:
            actions[action]()
    if action == "check":  # at the start of a run the setting is the likelier culprit
        assert type(caught.value) is ConfigError
    else:
        assert type(caught.value) is expected
    message = str(caught.value)
    assert ("AWS_ENDPOINT_URL" if expected is StoreUnavailable else "AWS_SECRET_ACCESS_KEY") in message
    assert "127.0.0.1" in message and "\n" not in message
    for secret in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert os.environ[secret] not in message


def test_no_credentials_at_all_are_asked_for(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID"):
        ArtifactStore(s3, tmp_path).check()


def test_an_unset_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDD_STORE", raising=False)
    with pytest.raises(ConfigError, match="SDD_STORE is not set"):
        ArtifactStore.from_environment()
    monkeypatch.setenv("SDD_STORE", "")
    with pytest.raises(ConfigError, match="SDD_STORE is not set"):
        ArtifactStore.from_environment()


@pytest.mark.parametrize("root", ["bucket/prefix", "/tmp/store", "http://host/x", "gs://bucket", "S3"])
def test_an_unknown_scheme_is_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDD_STORE", root)
    with pytest.raises(ConfigError, match=f"SDD_STORE={root}: give s3://bucket/prefix or file:///folder"):
        ArtifactStore.from_environment()


def test_the_environment_names_store_and_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDD_STORE", f"file://{tmp_path}/store/")
    monkeypatch.setenv("SDD_MIRROR", str(tmp_path / "mirror"))
    store = ArtifactStore.from_environment()
    assert (store.root, store.mirror) == (f"file://{tmp_path}/store", tmp_path / "mirror")
    assert ArtifactStore.from_environment() is store


def test_a_store_that_may_not_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    store = ArtifactStore(f"file://{tmp_path}/store", tmp_path / "mirror")
    with pytest.raises(PipelineError, match="SDD_STORE"):
        store.publish(stage(), produced(tmp_path / "out"), {}, 0)


def test_sha256_of_a_known_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
