"""Pieces of unfinished stages: whole, kept for the next run on any machine, gone when they serve nobody."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.store.artifacts import ArtifactStore
from tasks.store.housekeeping import stale_pieces
from tasks.store.parts import Parts


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


def test_only_named_pieces_are_brought(store: ArtifactStore, tmp_path: Path) -> None:
    bucket(store)
    first = Parts(store, "distil", ["a.jsonl", "b.jsonl"])
    for name in first.names:
        (first.folder / name).write_text(name)
    first.commit()
    second = Parts(machine(store, tmp_path / "other"), "distil", ["b.jsonl"])
    second.fetch()
    assert [path.name for path in second.folder.iterdir()] == ["b.jsonl"]


def test_a_piece_that_was_replaced_is_committed_again(store: ArtifactStore, tmp_path: Path) -> None:
    bucket(store)
    first = Parts(store, "finetune", ["state"])
    for text in ("step 1", "step 2"):
        (first.folder / ".state").write_text(text)
        (first.folder / ".state").rename(first.folder / "state")
        first.commit()
    second = Parts(machine(store, tmp_path / "other"), "finetune", ["state"])
    second.fetch()
    assert (second.folder / "state").read_text() == "step 2"


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
    path = tmp_path / "store" / "parts" / "distil" / "old.jsonl"
    os.utime(path, (path.stat().st_mtime - 15 * 86400,) * 2)
    assert stale_pieces(store) == {"parts/distil/old.jsonl": 5}
