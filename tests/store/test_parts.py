"""Pieces of unfinished stages: whole, kept for the next run on any machine, gone when they serve nobody."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.store.artifacts import LEASE, ArtifactStore
from tasks.store.housekeeping import stale_pieces
from tasks.store.parts import PIECES_KEPT, Parts
from tests.store.conftest import objects


def machine(store: ArtifactStore, folder: Path) -> ArtifactStore:
    """The same store seen from another machine."""
    return ArtifactStore(store.root, folder)


def bucket(store: ArtifactStore) -> None:
    """As a stage's lease makes it, before any piece is written."""
    with store.hold("made/here-0123456789ab", lambda: False):
        pass


def test_what_one_machine_finished_another_finds(store: ArtifactStore, tmp_path: Path) -> None:
    bucket(store)
    first = Parts(store, "distil", ["a.jsonl", "b.jsonl", "c.jsonl"])
    first.fetch()
    (first.folder / "a.jsonl").write_text("finished")
    (first.folder / ".b.jsonl").write_text("half")
    first.commit()
    second = Parts(machine(store, tmp_path / "other"), "distil", ["a.jsonl", "b.jsonl"])
    second.fetch()
    assert {path.name: path.read_text() for path in second.folder.iterdir()} == {"a.jsonl": "finished"}


def test_the_newest_version_counts_whichever_machine_made_it(store: ArtifactStore, tmp_path: Path) -> None:
    """A training that one machine began and another went on with, before it comes back to the first."""
    bucket(store)
    first, other = (Parts(machine(store, tmp_path / name), "finetune", ["state"]) for name in ("first", "other"))
    (first.folder / "state").write_text("step 100")
    first.commit()
    other.fetch()
    (other.folder / "unfinished").write_text("step 500")
    (other.folder / "unfinished").rename(other.folder / "state")
    other.commit()
    again = Parts(machine(store, tmp_path / "first"), "finetune", ["state"])
    again.fetch()
    assert (again.folder / "state").read_text() == "step 500"
    (again.folder / "unfinished").write_text("step 600, in no store yet")
    (again.folder / "unfinished").rename(again.folder / "state")
    again.fetch()
    assert (again.folder / "state").read_text() == "step 600, in no store yet"


def test_what_was_left_on_a_machine_long_ago_goes_but_for_what_no_store_has(store: ArtifactStore) -> None:
    bucket(store)
    parts = Parts(store, "finetune", ["old", "new"])
    for name in parts.names:
        (parts.folder / name).write_text(name)
    parts.commit()
    (parts.folder / ".unfinished").write_text("half")
    (parts.folder / "in no store").write_text("finished")
    for name in ("old", ".unfinished", "in no store"):
        os.utime(parts.folder / name, (0, (parts.folder / name).stat().st_mtime - PIECES_KEPT - 1))
    Parts(store, "finetune", []).fetch()
    assert {path.name for path in parts.folder.iterdir()} == {"new", "in no store"}


def test_a_piece_that_another_run_commits_while_the_store_is_asked_stays(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket(store)
    ours, theirs = (Parts(store, "distil", ["a.jsonl"]) for _ in range(2))
    asked = ours._stored_versions

    def meanwhile(folder: str) -> list[str]:
        found = asked(folder)
        (theirs.folder / "a.jsonl").write_text("finished")
        theirs.commit()
        return found

    monkeypatch.setattr(ours, "_stored_versions", meanwhile)
    ours.fetch()
    assert (ours.folder / "a.jsonl").read_text() == "finished"


def test_only_named_pieces_are_brought(store: ArtifactStore, tmp_path: Path) -> None:
    bucket(store)
    first = Parts(store, "distil", ["a.jsonl", "b.jsonl"])
    for name in first.names:
        (first.folder / name).write_text(name)
    first.commit()
    second = Parts(machine(store, tmp_path / "other"), "distil", ["b.jsonl"])
    second.fetch()
    assert [path.name for path in second.folder.iterdir()] == ["b.jsonl"]


def test_forgotten_pieces_are_gone_on_every_machine_but_those_that_no_store_had_yet(
    store: ArtifactStore, tmp_path: Path
) -> None:
    bucket(store)
    first, second = Parts(store, "distil", ["a", "b"]), Parts(machine(store, tmp_path / "other"), "distil", ["a", "b"])
    (first.folder / "a").write_text("of the first")
    first.commit()
    second.fetch()
    (second.folder / "b").write_text("not committed yet")
    first.remove()
    second.fetch()
    assert [path.name for path in second.folder.iterdir()] == ["b"]
    second.commit()
    assert {path.split("/")[-2] for path in store.objects("parts/distil")} == {"b"}


def test_a_piece_that_was_replaced_is_committed_again(store: ArtifactStore, tmp_path: Path) -> None:
    bucket(store)
    first = Parts(store, "finetune", ["state"])
    for text in ("step 1", "step 2"):
        (first.folder / ".state").write_text(text)
        (first.folder / ".state").rename(first.folder / "state")
        first.commit()
    assert len(store.objects("parts/finetune/state")) == 1
    second = Parts(machine(store, tmp_path / "other"), "finetune", ["state"])
    second.fetch()
    assert (second.folder / "state").read_text() == "step 2"


def test_a_piece_that_was_edited_in_the_store_is_made_again(store: ArtifactStore, tmp_path: Path) -> None:
    bucket(store)
    first, second, third = (Parts(machine(store, tmp_path / name), "distil", ["a.jsonl"]) for name in "123")
    (first.folder / "a.jsonl").write_text("as generated")
    first.commit()
    (path,) = store.objects("parts/distil/a.jsonl")
    store.fs.pipe_file(f"{first.root}/a.jsonl/{path}", b"edited by hand")
    second.fetch()
    assert not list(second.folder.iterdir())
    (second.folder / "a.jsonl").write_text("as generated")
    second.commit()
    third.fetch()
    assert (third.folder / "a.jsonl").read_text() == "as generated"


def test_who_needs_pieces_that_another_is_making_waits_for_them(store: ArtifactStore, tmp_path: Path) -> None:
    """Of two stages that share only the first piece: it is made once, and the rest of each by itself."""
    bucket(store)
    first = Parts(store, "distil", ["shared", "own"])
    second = Parts(machine(store, tmp_path / "other"), "distil", ["shared", "another"])
    waiting, made = threading.Event(), list[str]()

    def make(parts: Parts, until: Callable[[], bool], before: Callable[[], object]) -> None:
        with parts.claimed(until):
            before()
            for name in [name for name in parts.names if not (parts.folder / name).exists()]:
                made.append(name)
                (parts.folder / name).write_text(name)
            parts.commit()

    def looking() -> bool:
        waiting.set()
        return False

    with ThreadPoolExecutor(1) as pool:

        def start_the_second() -> None:
            later.append(pool.submit(make, second, looking, lambda: None))
            assert waiting.wait(60)

        later = list[Future[None]]()
        make(first, lambda: False, start_the_second)
        later[0].result()
    assert made == ["shared", "own", "another"]
    assert sorted(path.name for path in second.folder.iterdir()) == ["another", "shared"]
    assert not [path for path in objects(store) if path.endswith(LEASE)]


def test_removed_pieces_are_gone_everywhere(store: ArtifactStore, tmp_path: Path) -> None:
    bucket(store)
    first = Parts(store, "finetune", ["state", "never written"])
    (first.folder / "state").write_text("x")
    first.commit()
    first.remove()
    assert not list(first.folder.iterdir())
    second = Parts(machine(store, tmp_path / "other"), "finetune", ["state"])
    second.fetch()
    assert not list(second.folder.iterdir())


def test_only_pieces_that_nobody_wrote_for_weeks_are_stale(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}/store", tmp_path / "mirror")
    pieces = Parts(store, "distil", ["old.jsonl", "new.jsonl"])
    for name in pieces.names:
        (pieces.folder / name).write_text("12345")
    pieces.commit()
    (path,) = (tmp_path / "store" / "parts" / "distil" / "old.jsonl").iterdir()
    os.utime(path, (path.stat().st_mtime - 15 * 86400,) * 2)
    assert stale_pieces(store) == {f"parts/distil/old.jsonl/{path.name}": 5}
