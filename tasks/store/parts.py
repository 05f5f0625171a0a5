"""Pieces of unfinished stages that are finished in themselves: shards of rows, the last training checkpoint.

    <root>/parts/<stage>/<name>/<sha256>      a piece; one whose bytes are not those of its name is none
    <root>/parts/<stage>/<name>/lease.json    somebody is making this piece and those that it needs after it

A name says what the piece was made from, so a run on any machine may go on from where another was ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tasks.store.artifacts import LEASE, ArtifactStore
from tasks.store.conditional import link
from tasks.store.mirror import sha256_of

PARTS = "parts"
PIECES_KEPT = 14 * 86400.0  # seconds; shards serve later runs on some of the same rows, too
COMMITTED = 0o100444  # mode of a local piece that the store has or had


class Parts:
    """The named pieces of one stage, in a folder that children write to by renaming; hidden files are unfinished."""

    def __init__(self, store: ArtifactStore, stage: str, names: Sequence[str]) -> None:
        self.store, self.stage, self.names = store, stage, names
        self.root = f"{store.root}/{PARTS}/{stage}"
        self.folder: Path = store.mirror / PARTS / stage
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stored: dict[str, int] = {}  # name -> time of the version that the store has

    def fetch(self) -> None:
        """Bring what the store has and this machine has not, or has an older version of; drop what the store had and
        has no more, and what was left here long ago.
        """
        self._drop_stale()
        gone, found, asked = set(self.names), set[str](), time.time()
        for path in self._stored_versions(f"{PARTS}/{self.stage}"):
            name, _, digest = path.rpartition("/")
            gone.discard(name)
            if name in self.names and name not in found and (self._has(name, digest) or self._download(name, digest)):
                found.add(name)
                self.stored[name] = (self.folder / name).stat().st_mtime_ns
        for name in gone:
            self.stored.pop(name, None)
            with suppress(FileNotFoundError):
                here = (self.folder / name).stat()
                # Another run on this machine may have committed one since the store was asked.
                if here.st_mode == COMMITTED and here.st_ctime < asked:
                    (self.folder / name).unlink()

    @contextmanager
    def claimed(self, until: Callable[[], bool]) -> Iterator[None]:
        """While open, let no other run make the first of the pieces that are missing.

        So runs that share pieces, whichever their stages, do not make them at the same time: who comes second waits,
        and then brings what the first one made. until: as in `lease.acquire`.
        """
        while missing := self._missing():
            with self.store.hold(f"{PARTS}/{self.stage}/{missing[0]}", until):
                self.fetch()
                if self._missing()[:1] == missing[:1]:
                    yield
                    return
        yield

    def commit(self) -> None:
        """Upload every piece that is new or was replaced."""
        for name in self.names:
            with suppress(FileNotFoundError):
                written = (self.folder / name).stat().st_mtime_ns
                if self.stored.get(name) != written:
                    self._upload(name)
                    self.stored[name] = written
                    (self.folder / name).chmod(COMMITTED)

    def remove(self) -> None:
        """Forget the pieces: their stage is finished, and nothing else can use them."""
        for name in self.names:
            (self.folder / name).unlink(missing_ok=True)
            self._remove_versions(name)

    def _drop_stale(self) -> None:
        """Copies of stored pieces, and unfinished ones, whose run never came back to this machine."""
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                here = path.stat()
                stale = time.time() - here.st_mtime > PIECES_KEPT
                if stale and (here.st_mode == COMMITTED or path.name.startswith(".")):
                    path.unlink()

    def _has(self, name: str, digest: str) -> bool:
        """Whether this machine's piece is that version, or is newer, since no store has it yet."""
        piece = self.folder / name
        return piece.exists() and (piece.stat().st_mode != COMMITTED or sha256_of(piece) == digest)

    def _missing(self) -> list[str]:
        return [name for name in self.names if not (self.folder / name).exists()]

    def _stored_versions(self, folder: str) -> list[str]:
        """Paths of pieces relative to `folder`, the newest first."""
        found = self.store.objects(folder)
        written = {path: str(info.get("LastModified", info.get("mtime"))) for path, info in found.items()}
        return sorted([path for path in found if not path.endswith(LEASE)], key=written.__getitem__, reverse=True)

    def _upload(self, name: str) -> None:
        with self.store.staging() as folder:
            link(self.folder / name, copy := folder / "piece")  # it may be replaced meanwhile
            digest = sha256_of(copy)
            self.store.patiently(partial(self.store.fs.put_file, str(copy), f"{self.root}/{name}/{digest}"))
        if name in self.stored:
            self._remove_versions(name, digest)

    def _download(self, name: str, digest: str) -> bool:
        """Copy one piece; False when it is gone or not what its name says, twice, so that it is no bad transfer."""
        for _ in range(2):
            with self.store.staging() as folder:
                copy = folder / digest
                try:
                    self.store.patiently(partial(self.store.fs.get_file, f"{self.root}/{name}/{digest}", str(copy)))
                except FileNotFoundError:
                    return False
                if sha256_of(copy) == digest:
                    copy.chmod(COMMITTED)
                    copy.rename(self.folder / name)
                    return True
        return False

    def _remove_versions(self, name: str, but: str = "") -> None:
        for version in self._stored_versions(f"{PARTS}/{self.stage}/{name}"):
            if version != but:
                with suppress(FileNotFoundError):
                    self.store.patiently(partial(self.store.fs.rm_file, f"{self.root}/{name}/{version}"))
