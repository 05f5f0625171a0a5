"""Credentials: reading is enough to plan, and none of them appears anywhere."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fsspec import get_filesystem_class
from fsspec.config import conf, set_conf_env

from deployments import local
from tasks.domain.errors import ArtifactError, ConfigError
from tasks.store.artifacts import ArtifactStore, Quarantined
from tasks.store.parts import Parts
from tests.conftest import ROOT
from tests.store.conftest import FILES, contents, objects, produced, stage
from tests.tiny_data import write_data_root, write_preset

ADMIN = {"accessKey": "admin-key-6f1c0e", "secretKey": "admin-secret-93b7ab41"}
READER = {"accessKey": "reader-key-27d9c4", "secretKey": "reader-secret-e05d6612"}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server with an administrator, who published, and a reader, who the environment names from then on."""
    monkeypatch.setattr(local, "STATE", tmp_path / "state")
    identities = tmp_path / "state" / "s3" / "identities.json"
    identities.parent.mkdir(parents=True)
    people = [
        {"name": "admin", "credentials": [ADMIN], "actions": ["Admin"]},
        {"name": "reader", "credentials": [READER], "actions": ["Read", "List"]},
    ]
    identities.write_text(json.dumps({"identities": people}))
    get_filesystem_class("s3").clear_instance_cache()
    with local._s3() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        admin = ArtifactStore("s3://sdd/artifacts", tmp_path / "admin")
        admin.publish(stage(), produced(tmp_path / "out"), {}, 0)
        get_filesystem_class("s3").clear_instance_cache()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER["accessKey"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER["secretKey"])
        yield
    get_filesystem_class("s3").clear_instance_cache()


def test_a_reader_finds_and_fetches_and_is_told_what_it_may_not(reader: None, tmp_path: Path) -> None:
    store = ArtifactStore("s3://sdd/artifacts", tmp_path / "mirror")
    before = objects(store)
    store.check()
    published = store.obtain(stage())
    assert published and contents(store.fetch(published)) == FILES
    assert store.find(stage(rows=2)) is None
    assert store.newest_change(stage(rows=2)) == ["recipe.rows: absent -> 2"]
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY, and that they may read there and"):
        store.lease(stage(rows=2)).__enter__()
    with pytest.raises(ConfigError, match="SDD_STORE=s3://sdd/artifacts"):
        store.publish(stage(rows=2), produced(tmp_path / "two"), {}, 0)
    refused = store.quarantine(stage().address, published, "bad bytes")
    assert type(refused) is ArtifactError and not isinstance(refused, Quarantined)
    assert "could not be moved out of the way" in str(refused)
    assert objects(store) == before


def test_a_reader_can_plan(reader: None, pico: Path, tmp_path: Path) -> None:
    preset = str(write_preset(tmp_path / "pico.yaml", pico))
    command = [sys.executable, "-m", "flows.recover", preset, "--plan"]
    data = {"SDD_STORE": "s3://sdd/artifacts", "SDD_DATA_ROOT": str(write_data_root(tmp_path / "data"))}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | data, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 41 and "miss  distil" in done.stdout


def test_credentials_are_in_no_artifact_log_or_error(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    secrets = [os.environ.get("AWS_ACCESS_KEY_ID", ""), os.environ.get("AWS_SECRET_ACCESS_KEY", "")]
    if store.root.startswith("file://"):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN["secretKey"])
        secrets = [ADMIN["secretKey"]]
    assert all(secrets)
    with store.lease(stage()) as lease:
        held = store.fs.cat_file(f"{store.uri(stage())}/lease.json").decode()
        published = store.publish(stage(), produced(tmp_path / "out"), {}, 0, lease)
    error = store.quarantine(stage().address, published, "bad bytes")
    everything = [held, repr(published), str(error), repr(store), caplog.text]
    everything += [store.fs.cat_file(f"{store.root}/{path}").decode("latin-1") for path in objects(store)]
    assert len(everything) == 5 + len(FILES) + 1
    assert not [text for text in everything if any(secret in text for secret in secrets)]


def test_encryption_and_acl_of_the_client_reach_every_object(
    moto: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fsspec takes them from the environment: files in one part and in several, manifest, lease, copies, pieces."""
    wanted = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "key-of-the-client", "ACL": "public-read"}
    for name, value in (moto | {"FSSPEC_S3": json.dumps({"s3_additional_kwargs": wanted})}).items():
        monkeypatch.setenv(name, value)
    set_conf_env(settings := dict[str, Any]())
    monkeypatch.setitem(conf, "s3", settings["s3"])
    for name in ("CHUNK", "DOWNLOAD_CHUNK"):
        monkeypatch.setattr(f"tasks.store.artifacts.{name}", 5 * 2**20)
    get_filesystem_class("s3").clear_instance_cache()
    store = ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror")
    checked: list[str] = []

    def check() -> None:
        for path in objects(store):
            bucket, key, _ = store.fs.split_path(f"{store.root}/{path}")
            head = store.fs.call_s3("head_object", Bucket=bucket, Key=key)
            assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "key-of-the-client"), path
            grants = store.fs.call_s3("get_object_acl", Bucket=bucket, Key=key)["Grants"]
            assert "READ" in [grant["Permission"] for grant in grants], path
            checked.append(path)

    with store.lease(stage()) as lease:
        assert lease.renew()
        store.fs.pipe_file(f"{store.uri(stage())}/rows.jsonl", b"of an upload that broke off")
        check()
        published = store.publish(stage(), produced(tmp_path / "out", FILES | {"big": bytes(11 * 2**20)}), {}, 0, lease)
    pieces = Parts(store, "distil", ["a.jsonl"])
    (pieces.folder / "a.jsonl").write_text("a row")
    pieces.commit()
    check()
    store.quarantine(stage().address, published, "bad bytes")
    check()
    get_filesystem_class("s3").clear_instance_cache()
    assert len(checked) == 2 + 2 * (len(FILES) + 3)
