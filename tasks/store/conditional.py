"""Objects written on a condition: where there is none, or over exactly the version that was seen.

On S3 these are `If-None-Match: *` and `If-Match: <ETag>`, in a folder hard links and a locked comparison.
What is written is bytes, or a local file of any size.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback, NoOpCallback
from fsspec.implementations.local import LocalFileSystem

NO_REPORT = NoOpCallback()
REFUSED = (404, 409, 412)  # gone, being written by another at this moment, another version


def create(fs: Any, path: str, data: bytes | Path, moved: Callback = NO_REPORT) -> str | None:
    """Write an object unless there is one; its version, or None when another's is there.

    moved: counts the bytes of a file as they go. Raises FileNotFoundError when the bucket does not exist.
    """
    if not isinstance(fs, LocalFileSystem):
        return _put(fs, path, data, moved, IfNoneMatch="*")
    target = _local(fs, path)
    with _beside(target, data) as new:
        try:
            os.link(new, target)
        except FileExistsError:
            return None
        return _inode(new)


def replace(fs: Any, path: str, data: bytes | Path, seen: str, moved: Callback = NO_REPORT) -> str | None:
    """Overwrite the object if it still is the version `seen`; the new version, or None when it is not.

    data: must differ from what any other writer writes there, unless equal bytes serve them all.
    """
    if not isinstance(fs, LocalFileSystem):
        try:
            return _put(fs, path, data, moved, IfMatch=seen)
        except FileNotFoundError:
            return None
    target = _local(fs, path)
    with _beside(target, data) as new, (target.parents[1] / ".lock").open("w") as lock:  # outside of a leased folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        if version(fs, path) != seen:
            return None
        written = _inode(new)
        new.replace(target)
        return written


def version(fs: Any, path: str) -> str | None:
    """What changes with every write of the object; None when there is no object."""
    try:
        return _inode(_local(fs, path)) if isinstance(fs, LocalFileSystem) else str(fs.info(path)["ETag"])
    except FileNotFoundError:
        return None


def _put(fs: Any, path: str, data: bytes | Path, moved: Callback, **condition: str) -> str | None:
    bucket, key, _ = fs.split_path(path)
    try:
        if isinstance(data, bytes):
            return str(fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
        if "IfMatch" in condition:  # `put_file` knows only the other condition
            options = {"s3_additional_kwargs": fs.s3_additional_kwargs | condition, "skip_instance_cache": True}
            fs = type(fs)(**fs.storage_options | options)
        mode = "create" if "IfNoneMatch" in condition else "overwrite"
        fs.put_file(str(data), path, callback=moved, chunksize=fs.default_block_size, mode=mode)
        return version(fs, path)
    except OSError as error:
        status = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status not in REFUSED or (status == 404 and "IfNoneMatch" in condition):
            raise
    try:  # a repeated request may have met its own first try
        return version(fs, path) if isinstance(data, bytes) and fs.cat_file(path) == data else None
    except FileNotFoundError:
        return None


@contextmanager
def _beside(target: Path, data: bytes | Path) -> Iterator[Path]:
    """The data as a file on the target's file system, a hard link where that can be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parents[1], prefix=".new-") as folder:
        new = Path(folder, "new")
        if isinstance(data, bytes):
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        else:
            link(data, new)
        yield new


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it to another file system."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def _local(fs: Any, path: str) -> Path:
    return Path(fs._strip_protocol(path))


def _inode(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"
