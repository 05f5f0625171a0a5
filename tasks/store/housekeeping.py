"""What lies in a store, what is wrong with it, and what nobody needs any more."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

from tasks.domain.errors import ArtifactError, ConfigError
from tasks.domain.stage import KEY_LENGTH, Stage, changed_fields
from tasks.store.artifacts import CHUNK, LEASE, MANIFEST, PLANS, QUARANTINE, REPORTS, ArtifactStore, Manifest
from tasks.store.mirror import ENTRY, sha256_of
from tasks.store.parts import PARTS, PIECES_KEPT

READERS = 16  # manifests read at the same time
DEAD_LEASE = 600.0  # seconds; a living holder renews it three times in half a minute


@dataclass
class Listed:
    """One address as the store lists it. changed: the newest of its objects, unix seconds by the store's clock."""

    address: str
    files: dict[str, int] = field(default_factory=dict)  # relative path, manifest and lease included -> bytes
    changed: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def is_artifact(self) -> bool:
        return MANIFEST in self.files

    @property
    def key(self) -> str:
        """The first hex digits of its key."""
        return self.address[-KEY_LENGTH:]


def listing(store: ArtifactStore, only: str = "") -> dict[str, Listed]:
    """Everything at an artifact's address, by address: artifacts, and uploads that are under way or broke off.

    only: of one stage.
    """
    found: dict[str, Listed] = {}
    for path, info in store.objects(only).items():
        stage, _, rest = (f"{only}/{path}" if only else path).partition("/")
        slug, _, name = rest.partition("/")
        if name and ENTRY.fullmatch(slug) and stage not in (QUARANTINE, REPORTS):
            entry = found.setdefault(f"{stage}/{slug}", Listed(f"{stage}/{slug}"))
            entry.files[name] = info["size"]
            entry.changed = max(entry.changed, _changed(info))
    return dict(sorted(found.items()))


def manifests(store: ArtifactStore, addresses: Sequence[str]) -> Iterator[tuple[str, Manifest | ArtifactError]]:
    """The manifests at these addresses, as they arrive; the error where one cannot be read."""

    def read(address: str) -> Manifest | ArtifactError:
        try:
            return store.manifest_at(f"{store.root}/{address}")
        except ArtifactError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        yield from zip(addresses, pool.map(read, addresses), strict=True)


def ancestry(store: ArtifactStore, manifest: Manifest) -> Iterator[tuple[int, str, Manifest | str]]:
    """What it was made from, depth first, as (depth, role, manifest, or the key of an artifact that is gone)."""
    addresses = {entry.key: entry.address for entry in listing(store).values() if entry.is_artifact}

    def walk(child: Manifest, depth: int) -> Iterator[tuple[int, str, Manifest | str]]:
        for role, key in child.identity["inputs"].items():
            address = addresses.get(key[:KEY_LENGTH])
            if address is None:
                yield depth, role, key
            else:
                parent = store.manifest_at(f"{store.root}/{address}")
                yield depth, role, parent
                yield from walk(parent, depth + 1)

    return walk(manifest, 1)


def manifests_of(store: ArtifactStore, stage: str) -> list[Manifest]:
    """Those of all artifacts of a stage that can be read, the newest first."""
    addresses = [address for address, entry in listing(store, stage).items() if entry.is_artifact]
    found = [manifest for _, manifest in manifests(store, addresses) if isinstance(manifest, Manifest)]
    return sorted(found, key=lambda manifest: manifest.created, reverse=True)


def nearest(candidates: Sequence[Manifest], stage: Stage) -> tuple[Manifest, list[str]] | None:
    """The first of those that differ from `stage` in the fewest fields, and the fields."""
    found = [(manifest, changed_fields(manifest.identity, stage.identity())) for manifest in candidates]
    return min(found, key=lambda pair: len(pair[1]), default=None)


def faults(store: ArtifactStore, manifest: Manifest) -> Iterator[str]:
    """What differs from the manifest in the store, every object read in full."""
    for name, expected in manifest.files.items():
        path = f"{store.root}/{manifest.address}/{name}"
        try:
            if store.patiently(partial(_digest, store, path)) != (expected["bytes"], expected["sha256"]):
                yield f"{path} does not have the size and sha256 of its manifest"
        except FileNotFoundError:
            yield f"{path} is gone, though its manifest names it"


def mirror_faults(store: ArtifactStore, manifest: Manifest) -> Iterator[str]:
    """The files of this machine's copy, if there is one, that differ from the manifest."""
    folder = store.mirror / manifest.address
    if folder.is_dir():
        for name, expected in manifest.files.items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != expected["sha256"]:
                yield f"{path} does not have the sha256 of its manifest"


def unneeded(store: ArtifactStore, newest: int, runs: Sequence[str], age: float) -> list[Listed]:
    """Artifacts that neither the `newest` reports nor those of `runs` reach, and uploads that broke off.

    age: seconds; what changed less than this ago stays with all that it was made from, as a run may still be going on,
    and so does what a run needs that began since then, and whatever somebody holds a lease on.
    Raises ConfigError when a report of `runs` is not there, ArtifactError when one cannot be read.
    """
    keep, entries, now = _reported(store, newest, runs), listing(store), _now(store)
    keep |= _planned(store, now - age)
    found = dict(manifests(store, [address for address, entry in entries.items() if entry.is_artifact]))
    inputs = {m.key: m.identity["inputs"].values() for m in found.values() if isinstance(m, Manifest)}
    keep |= {m.key for address, m in found.items() if isinstance(m, Manifest) and now - entries[address].changed <= age}
    queue = deque(keep)
    while queue:
        new = set(inputs.get(queue.popleft(), ())) - keep
        keep |= new
        queue += new
    kept = {address for address, m in found.items() if isinstance(m, ArtifactError) or m.key in keep}
    return [
        entry
        for address, entry in entries.items()
        if address not in kept and now - entry.changed > (max(age, DEAD_LEASE) if LEASE in entry.files else age)
    ]


def stale_pieces(store: ArtifactStore) -> dict[str, int]:
    """Pieces of unfinished stages (tasks/store/parts.py) and plans of runs that nobody wrote for PIECES_KEPT, and their
    bytes.
    """
    now = _now(store)
    return {
        f"{folder}/{name}": info["size"]
        for folder in (PARTS, PLANS)
        for name, info in store.objects(folder).items()
        if now - _changed(info) > PIECES_KEPT
    }


def remove(store: ArtifactStore, entry: Listed) -> bool:
    """Delete what `unneeded` listed, manifest first; False when somebody has begun to write there."""
    if LEASE in entry.files:  # its holder has not renewed it for DEAD_LEASE
        store.fs.rm_file(f"{store.root}/{entry.address}/{LEASE}")
    with store.hold(entry.address, lambda: True) as lease:
        files = store.objects(entry.address)
        files.pop(LEASE, None)
        if any(_changed(info) > entry.changed for info in files.values()):
            return False
        for name in sorted(files, key=lambda name: name != MANIFEST):
            if not lease.held():  # nor may it be after a suspension
                return False
            store.fs.rm_file(f"{store.root}/{entry.address}/{name}")
    return True


def _reported(store: ArtifactStore, newest: int, runs: Sequence[str]) -> set[str]:
    """Keys of all stages of the newest reports and of those of the named runs."""
    reports = {
        path.split("/")[0]: _changed(info)
        for path, info in store.objects(REPORTS).items()
        if path.endswith("/report.json")
    }
    if unknown := set(runs) - reports.keys():
        raise ConfigError(f"no report of run {', '.join(sorted(unknown))} under {store.root}/{REPORTS}")
    if not reports:
        raise ConfigError(f"no report under {store.root}/{REPORTS} says what to keep")
    keys = set()
    for run in {*runs, *sorted(reports, key=lambda run: reports[run], reverse=True)[:newest]}:
        path = f"{store.root}/{REPORTS}/{run}/report.json"
        try:
            keys |= {stage["key"] for stage in json.loads(store.fs.cat_file(path))["stages"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} cannot be read ({error!r}); remove it if its artifacts may go") from None
    return keys


def _planned(store: ArtifactStore, since: float) -> set[str]:
    """Keys of all stages of the runs that began since then."""
    plans = [name for name, info in store.objects(PLANS).items() if _changed(info) >= since]
    return {key for name in plans for key in json.loads(store.fs.cat_file(f"{store.root}/{PLANS}/{name}"))}


def _changed(info: dict[str, Any]) -> float:
    changed = info.get("LastModified", info.get("mtime"))
    return changed.timestamp() if isinstance(changed, datetime) else float(changed or 0)


def _now(store: ArtifactStore) -> float:
    """The store's clock, unix seconds: this machine's may be off."""
    if store.root.startswith("file://"):
        return datetime.now(UTC).timestamp()
    reply = store.patiently(lambda: store.fs.call_s3("head_bucket", Bucket=store.bucket))
    return parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()


def _digest(store: ArtifactStore, path: str) -> tuple[int, str]:
    """Size and sha256 of an object, read once in blocks of CHUNK bytes."""
    digest, size = hashlib.sha256(), 0
    with store.fs.open(path, "rb", block_size=CHUNK, cache_type="none") as file:
        while block := file.read(CHUNK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()
