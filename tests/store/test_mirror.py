"""The mirror: the least recently used goes first, what is in use stays, and no process stands in another's way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.domain.errors import ConfigError
from tasks.store import mirror
from tasks.store.artifacts import ArtifactStore
from tests.conftest import ROOT
from tests.store.conftest import FILES, contents, produced, stage

HOLD = """
import sys, pathlib
from tasks.store import mirror
{action}
print("ready", flush=True)
sys.stdin.read()
"""


def entry(root: Path, number: int, size: int = 1000) -> Path:
    """An artifact in the mirror, last used at `number`."""
    folder = root / "rows" / f"pico-{number:012x}"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(bytes(size))
    os.utime(folder, (number, number))
    return folder


def process(action: str) -> subprocess.Popen[str]:
    """Another process that has done `action` and lives until its input is closed."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(action=action)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout and child.stdout.readline() == "ready\n"
    return child


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    one, two, three = (entry(tmp_path, number) for number in (1, 2, 3))
    assert mirror.use(one)
    os.utime(one, (4, 4))
    mirror.evict(tmp_path, 2000)
    assert [folder.exists() for folder in (one, two, three)] == [True, False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_using_an_artifact_makes_it_the_most_recent(tmp_path: Path) -> None:
    one = entry(tmp_path, 1)
    mirror.use(one)
    assert one.stat().st_mtime > 1


def test_what_another_process_uses_is_never_removed(tmp_path: Path) -> None:
    one, two = entry(tmp_path, 1), entry(tmp_path, 2)
    child = process(f"assert mirror.use(pathlib.Path({str(one)!r}))")
    os.utime(one, (1, 1))
    mirror.evict(tmp_path, 0)
    assert one.exists() and not two.exists()
    child.kill()
    child.wait()
    mirror.evict(tmp_path, 0)
    assert not one.exists(), "the lock ends with the process, however it ends"


def test_a_folder_that_is_no_artifact_is_never_removed(tmp_path: Path) -> None:
    """Whoever points SDD_MIRROR at a folder of other things loses none of them."""
    (tmp_path / "photos" / "summer").mkdir(parents=True)
    (tmp_path / "photos" / "summer" / "sea.png").write_bytes(bytes(5000))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / f"link-{1:012x}").symlink_to(tmp_path / "photos", target_is_directory=True)
    mirror.evict(tmp_path, 0)
    assert (tmp_path / "photos" / "summer" / "sea.png").exists()


def test_what_a_dead_process_was_writing_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    action = f"context = mirror.staging(pathlib.Path({str(tmp_path)!r})); (context.__enter__() / 'x').touch()"
    child = process(action)
    with mirror.staging(tmp_path):
        assert len(list(tmp_path.glob(".staging-*/artifact/x"))) == 1
    child.kill()
    child.wait()
    with mirror.staging(tmp_path):
        assert not list(tmp_path.glob(".staging-*/artifact/x"))
    assert not list(tmp_path.iterdir())


def test_a_limit_keeps_the_mirror_small_while_a_run_goes_on(store: ArtifactStore, tmp_path: Path) -> None:
    """What this process uses stays, whatever the limit; what it does not goes, and is downloaded when needed."""
    small = ArtifactStore(store.root, tmp_path / "small", mirror_bytes=1)
    manifests = [store.publish(stage(rows=n), produced(tmp_path / f"out-{n}"), {}, 0) for n in range(3)]
    old = entry(small.mirror, 1)
    folders = [small.fetch(manifest) for manifest in manifests]
    assert [contents(folder) for folder in folders] == [FILES] * 3
    assert not old.exists()


def test_inputs_are_downloaded_once_a_machine(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    reader = ArtifactStore(store.root, tmp_path / "reader")
    get, downloads, start = reader._get, list[str](), threading.Barrier(8)

    def counted(path: str, *rest: Any) -> None:
        downloads.append(path)
        get(path, *rest)

    monkeypatch.setattr(reader, "_get", counted)

    def fetch(_: int) -> dict[str, bytes]:
        start.wait()
        return contents(reader.fetch(published))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetch, range(8))) == [FILES] * 8
    assert len(downloads) == len(FILES)


def test_a_folder_store_and_its_mirror_share_the_files(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}/store", tmp_path / "mirror")
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    other = ArtifactStore(store.root, tmp_path / "other")
    paths = [Path(tmp_path / "store" / stage().address), store.mirror / stage().address, other.fetch(published)]
    assert len({(path / "rows.jsonl").stat().st_ino for path in paths}) == 1


def test_a_checked_file_is_not_read_again_and_a_touched_one_is(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    real = mirror.sha256_of
    monkeypatch.setattr(mirror, "sha256_of", counted)
    folder = store.fetch(published)
    assert not hashed
    os.utime(folder / "rows.jsonl", (5, 5))
    store.fetch(published)
    store.fetch(published)
    assert hashed == ["rows.jsonl"]


@pytest.mark.parametrize("value", ["much", "nan", "inf", ""])
def test_a_limit_that_is_no_number_is_named(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDD_STORE", f"file://{tmp_path}")
    monkeypatch.setenv("SDD_MIRROR_GB", value)
    with pytest.raises(ConfigError, match=f"SDD_MIRROR_GB={value}: give a number of gigabytes"):
        ArtifactStore.from_environment()
    monkeypatch.setenv("SDD_MIRROR_GB", "0.5")
    assert ArtifactStore.from_environment().mirror_bytes == 500_000_000
