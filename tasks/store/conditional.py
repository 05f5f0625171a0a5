"""Small objects written on a condition: where there is none, or over exactly the version that was seen.

On S3 these are `If-None-Match: *` and `If-Match: <ETag>`, in a folder hard links and a locked comparison.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

REFUSED = (404, 409, 412)  # gone, being written by another at this moment, another version


def create(fs: Any, path: str, data: bytes) -> str | None:
    """Write an object unless there is one; its version, or None when another's is there.

    Raises FileNotFoundError when the bucket does not exist.
    """
    if not isinstance(fs, LocalFileSystem):
        return _put(fs, path, data, IfNoneMatch="*")
    target = _local(fs, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parents[1], prefix=".new-") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, target)
        except FileExistsError:
            return None
        return _inode(Path(file.name))


def replace(fs: Any, path: str, data: bytes, seen: str) -> str | None:
    """Overwrite the object if it still is the version `seen`; the new version, or None when it is not.

    data: must differ from what any other writer writes there.
    """
    if not isinstance(fs, LocalFileSystem):
        try:
            return _put(fs, path, data, IfMatch=seen)
        except FileNotFoundError:
            return None
    target = _local(fs, path)
    with (target.parents[1] / ".lock").open("w") as lock:  # one a stage, outside of every artifact
        fcntl.flock(lock, fcntl.LOCK_EX)
        if version(fs, path) != seen:
            return None
        descriptor, new = tempfile.mkstemp(dir=target.parents[1], prefix=".new-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        written = _inode(Path(new))
        Path(new).replace(target)
        return written


def version(fs: Any, path: str) -> str | None:
    """What changes with every write of the object; None when there is no object."""
    try:
        return _inode(_local(fs, path)) if isinstance(fs, LocalFileSystem) else str(fs.info(path)["ETag"])
    except FileNotFoundError:
        return None


def _put(fs: Any, path: str, data: bytes, **condition: str) -> str | None:
    bucket, key, _ = fs.split_path(path)
    try:
        return str(fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
    except OSError as error:
        status = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status not in REFUSED or (status == 404 and "IfNoneMatch" in condition):
            raise
    try:  # a repeated request may have met its own first try
        return version(fs, path) if fs.cat_file(path) == data else None
    except FileNotFoundError:
        return None


def _local(fs: Any, path: str) -> Path:
    return Path(fs._strip_protocol(path))


def _inode(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"
