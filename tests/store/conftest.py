"""A store of its own for each test, on two S3 servers of different make and on a folder, and what to put into it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fsspec import get_filesystem_class

from tasks.domain.stage import Stage
from tasks.store.artifacts import ArtifactStore

FILES = {"rows.jsonl": b'{"id": 1}\n', "deep/er/weights.bin": bytes(range(256)) * 40, "deep/empty.txt": b""}


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A second S3 server of another make; yields the environment that names it."""
    log = tmp_path_factory.mktemp("moto") / "log.txt"
    with log.open("wb") as output:
        command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", "0"]
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while not (started := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None, log.read_text()
        yield {
            "AWS_ENDPOINT_URL": started[1], "AWS_ACCESS_KEY_ID": "moto-key-5d1e",
            "AWS_SECRET_ACCESS_KEY": "moto-secret-77c2", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["s3", "moto", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ArtifactStore]:
    if request.param == "file":
        yield ArtifactStore(f"file://{tmp_path}/store", tmp_path / "mirror")
        return
    for name, value in request.getfixturevalue("stack" if request.param == "s3" else "moto").items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    get_filesystem_class("s3").clear_instance_cache()  # clients remember the environment that they were made in
    yield ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror")
    get_filesystem_class("s3").clear_instance_cache()


def stage(name: str = "rows", **recipe: Any) -> Stage:
    return Stage(name, 1, {"seed": 0, **recipe}, slug="pico")


def produced(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects(store: ArtifactStore, folder: str = "") -> set[str]:
    """Relative paths of everything below a folder of the store, but for locks and the notes of what is newest."""
    paths = {f"{folder}/{path}".lstrip("/") for path in store.objects(folder)}
    return {path for path in paths if not path.endswith("/.lock") and not path.startswith("newest/")}
