"""Artifacts as plain folders on this machine, the least recently used removed first when they fill the limit.

    <mirror>/<stage>/<slug>-<key12>/    an artifact; its folder's mtime is its last use
    <mirror>/.staging-*/artifact/       being written; what a dead process left is removed by the next

A lock is a flock on a folder, so it ends with the process that holds it: shared on an artifact in use,
exclusive on one that is being removed and on a `.staging-*`. The mirror belongs on a local disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.domain.errors import disk_full

STAGING = ".staging-"
ENTRY = re.compile(r".+-[0-9a-f]{12}")  # never remove a folder that does not look like an artifact

_in_use: dict[Path, int] = {}  # folder -> descriptor with a shared lock, kept until this process ends
_in_use_guard = threading.Lock()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def use(folder: Path) -> bool:
    """Keep an artifact from being removed while this process lives; False when it is not there."""
    with _in_use_guard:
        known = _in_use.get(folder)
        if known is None or not _is_at(known, folder):
            descriptor = _lock(folder, fcntl.LOCK_SH)
            if descriptor is None:
                return False
            if known is not None:
                os.close(known)
            _in_use[folder] = descriptor
    with suppress(FileNotFoundError):  # another process has just replaced it by a whole one
        os.utime(folder)
    return True


def is_whole(folder: Path, files: Mapping[str, Mapping[str, Any]], stamp: float) -> bool:
    """Whether every file has the size of the manifest, and the mtime `stamp` that only checked files bear.

    A file with another mtime is hashed again; so whatever was written to is found, and bytes that changed
    on the disk behind the file system's back are not (`python -m flows.artifacts verify` reads them all).
    """
    try:
        for name, expected in files.items():
            path = folder / name
            stat = path.stat()
            if stat.st_size != expected["bytes"]:
                return False
            if stat.st_mtime != stamp:
                if sha256_of(path) != expected["sha256"]:
                    return False
                os.utime(path, (stamp, stamp))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def staging(mirror: Path, name: str | None = None) -> Iterator[Path]:
    """An empty folder on the mirror's file system; what is left of it is removed afterwards.

    name: only one process at a time gets the folder of a name; the others wait for it.
    Raises ConfigError where the disk is full, here or in the block.
    """
    with _full_disk_named(mirror):
        mirror.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(mirror)
        descriptor = None
        while descriptor is None:
            if name is None:
                outer = Path(tempfile.mkdtemp(prefix=STAGING, dir=mirror))
            else:
                outer = mirror / f"{STAGING}{name}"
                with suppress(FileExistsError):
                    outer.mkdir()
            descriptor = _lock(outer, fcntl.LOCK_EX)
    try:
        with _full_disk_named(mirror):  # before what was written goes, and makes room
            folder = outer / "artifact"  # the locked folder itself stays here: others may be waiting for its lock
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def _full_disk_named(mirror: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if full := disk_full(error, {"SDD_MIRROR": mirror, "TMPDIR": Path(tempfile.gettempdir())}):
            raise full from error
        raise


def keep(staged: Path, folder: Path) -> None:
    """Make a finished folder the artifact's; one that was there before gives way."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            staged.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            discard(folder)


def discard(folder: Path) -> None:
    """Remove an artifact from the mirror; whoever looks meanwhile sees all of it or nothing."""
    with staging(folder.parents[1]) as grave, suppress(FileNotFoundError):
        folder.rename(grave / folder.name)


def evict(mirror: Path, limit: int) -> None:
    """Remove the least recently used artifacts that no process uses, until the rest takes at most `limit` bytes."""
    entries = []
    for folder in mirror.glob("[!.]*/*"):
        if ENTRY.fullmatch(folder.name) and not folder.is_symlink():
            with suppress(FileNotFoundError, NotADirectoryError):  # removed by another process
                entries.append((folder.stat().st_mtime, _bytes(folder), folder))
    excess = sum(size for _, size, _ in entries) - limit
    for _, size, folder in sorted(entries):
        if excess <= 0:
            return
        descriptor = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is not None:
            discard(folder)
            os.close(descriptor)
            excess -= size


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove_abandoned(mirror: Path) -> None:
    for folder in mirror.glob(f"{STAGING}*"):
        descriptor = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _lock(folder: Path, operation: int) -> int | None:
    """A descriptor that locks the folder; None when it is not there (any more), or taken and not to be waited for."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, operation)
        if _is_at(descriptor, folder):
            return descriptor
    os.close(descriptor)
    return None


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False
