"""A store of its own for each test, once on a real S3 server and once on a folder, and what to put into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tasks.domain.stage import Stage
from tasks.store.artifacts import ArtifactStore

FILES = {"rows.jsonl": b'{"id": 1}\n', "deep/er/weights.bin": bytes(range(256)) * 40, "deep/empty.txt": b""}


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "s3":
        request.getfixturevalue("stack")
        root = f"s3://sdd/{uuid4().hex}"
    else:
        root = f"file://{tmp_path}/store"
    return ArtifactStore(root, tmp_path / "mirror")


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
    """Relative paths of everything below a folder of the store."""
    return {f"{folder}/{path}".lstrip("/") for path in store.objects(folder) if not path.endswith("/.lock")}
