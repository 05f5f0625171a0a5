"""Pieces of unfinished stages that are finished in themselves: shards of rows, the last training checkpoint.

    <root>/parts/<stage>/<name>

A name says what the piece was made from, so a run on any machine may go on from where another was ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tasks.store.artifacts import ArtifactStore

PARTS = "parts"


class Parts:
    """The named pieces of one stage, in a folder that children write to by renaming; hidden files are unfinished."""

    def __init__(self, store: ArtifactStore, stage: str, names: Sequence[str]) -> None:
        self.store, self.stage, self.names = store, stage, names
        self.root = f"{store.root}/{PARTS}/{stage}"
        self.folder: Path = store.mirror / PARTS / stage
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stored: dict[str, int] = {}  # name -> time of the version that the store has

    def fetch(self) -> None:
        """Bring what the store has and this machine has not."""
        with self.store.translated():
            for name in self.store.objects(f"{PARTS}/{self.stage}").keys() & {*self.names}:
                path = self.folder / name
                if not path.exists():
                    self.store.fs.get_file(f"{self.root}/{name}", str(path.with_name(f".{name}")))
                    path.with_name(f".{name}").rename(path)
                self.stored[name] = path.stat().st_mtime_ns

    def commit(self) -> None:
        """Upload every piece that is new or was replaced."""
        for name in self.names:
            with suppress(FileNotFoundError), self.store.translated():
                written = (self.folder / name).stat().st_mtime_ns
                if self.stored.get(name) != written:
                    self.store.fs.put_file(str(self.folder / name), f"{self.root}/{name}")
                    self.stored[name] = written

    def remove(self) -> None:
        """Forget the pieces: their stage is finished, and nothing else can use them."""
        with self.store.translated():
            for name in self.names:
                (self.folder / name).unlink(missing_ok=True)
                with suppress(FileNotFoundError):
                    self.store.fs.rm_file(f"{self.root}/{name}")
