"""Look after the artifacts in the store that SDD_STORE names, or in that of the embedded servers.

    python -m flows.artifacts list [STAGE]                   stage, address, size, age, who made it from what
    python -m flows.artifacts show ADDRESS                   one artifact with everything it was made from
    python -m flows.artifacts explain PRESET [STAGE]         which fields make a stage a miss
    python -m flows.artifacts verify [ADDRESS] [--quarantine]    read every byte; status 1 if any is wrong
    python -m flows.artifacts gc [--newest N] [--keep RUN] [--hours H] [--delete]    what no report reaches

An ADDRESS is what `list` prints, its URI, or the first digits of its key.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime

from deployments.local import environment
from flows.plan import build_plan
from tasks.domain.errors import ArtifactError, ConfigError, PipelineError
from tasks.domain.recipe import load_preset
from tasks.domain.stage import Stage
from tasks.store import mirror
from tasks.store.artifacts import ArtifactStore, Manifest
from tasks.store.housekeeping import (
    Listed,
    ancestry,
    faults,
    listing,
    manifests,
    manifests_of,
    mirror_faults,
    nearest,
    remove,
    stale_pieces,
    unneeded,
)

WEEK = 168.0  # hours; longer than a run, whose artifacts no report names before its end


def print_list(store: ArtifactStore, stage: str | None) -> int:
    entries = [entry for entry in listing(store, stage or "").values() if entry.is_artifact]
    for address, manifest in manifests(store, [entry.address for entry in entries]):
        print(f"{address:64} {manifest}" if isinstance(manifest, ArtifactError) else _line(manifest))
    print(f"{len(entries)} artifacts, {_size(sum(entry.bytes for entry in entries))}")
    return 0


def print_one(store: ArtifactStore, name: str) -> int:
    manifest = store.manifest_at(f"{store.root}/{find_entry(store, name).address}")
    print(_line(manifest))
    for file, facts in manifest.files.items():
        print(f"    {_size(facts['bytes']):>10}  {facts['sha256'][:12]}  {file}")
    for depth, role, parent in ancestry(store, manifest):
        print(f"{'  ' * depth}{role}: {_line(parent) if isinstance(parent, Manifest) else f'{parent[:12]} is gone'}")
    return 0


def explain(store: ArtifactStore, preset: str, overrides: tuple[str, ...], name: str | None) -> int:
    stages = dict(build_plan(load_preset(preset, overrides)).stages())
    if name is not None and name not in stages:
        raise ConfigError(f"{name}: no stage of this preset; there are {', '.join(stages)}")
    known: dict[str, list[Manifest]] = {}
    for title, stage in stages.items():
        if name in (None, title):
            print("\n".join([f"{title}: {reason}" for reason in _reasons(store, stage, known)]))
    return 0


def verify(store: ArtifactStore, name: str | None, *, quarantine: bool) -> int:
    """Read every object, and this machine's copies; `quarantine` moves bad artifacts away and removes bad copies."""
    if name:
        addresses = [find_entry(store, name).address]
    else:
        addresses = [entry.address for entry in listing(store).values() if entry.is_artifact]
    bad = 0
    for address, manifest in manifests(store, addresses):
        if isinstance(manifest, Manifest):
            found, judged = [*faults(store, manifest)], manifest
            copies = [*mirror_faults(store, manifest)]
        else:
            found, judged, copies = [str(manifest)], None, []
        for fault in found + copies:
            print(f"bad   {fault}")
        if copies and quarantine:
            mirror.discard(store.mirror / address)
        if found and quarantine:
            print(f"      {store.quarantine(address, judged, address)}")
        bad += bool(found or copies)
    print(f"{len(addresses)} artifacts, {bad} bad")
    return 1 if bad else 0


def collect(store: ArtifactStore, newest: int, runs: list[str], hours: float, *, delete: bool) -> int:
    entries = unneeded(store, newest, runs, hours * 3600)
    removed = 0
    for entry in entries:
        outcome = "would remove"
        if delete:
            outcome = "removed" if remove(store, entry) else "in use"
        removed += entry.bytes if outcome != "in use" else 0
        kind = "artifact" if entry.is_artifact else "broken-off upload"
        print(f"{outcome:13} {entry.address:64} {_size(entry.bytes):>10}  {kind}")
    for path, size in stale_pieces(store).items():
        if delete:
            store.fs.rm_file(f"{store.root}/{path}")
        removed += size
        print(f"{'removed' if delete else 'would remove':13} {path:64} {_size(size):>10}  old piece")
    print(f"{_size(removed)} {'removed' if delete else 'to remove; give --delete to remove them'}")
    return 0


def find_entry(store: ArtifactStore, name: str) -> Listed:
    """The artifact that an ADDRESS means. Raises ConfigError when it means none, or several."""
    name = name.removeprefix(f"{store.root}/")
    found = [e for e in listing(store).values() if e.is_artifact and (e.address == name or e.key.startswith(name[:12]))]
    if len(found) != 1:
        raise ConfigError(f"{name}: {len(found)} artifacts have this address or key; see `list`")
    return found[0]


def _reasons(store: ArtifactStore, stage: Stage, known: dict[str, list[Manifest]]) -> list[str]:
    """Why a stage is a miss; where an input changed, that one's own reasons. known: manifests read before, by stage."""
    if store.find(stage):
        return [f"hit, {stage.address}"]
    if stage.name not in known:
        known[stage.name] = manifests_of(store, stage.name)
    found = nearest(known[stage.name], stage)
    if found is None:
        return ["miss, the first of its kind"]
    manifest, changes = found
    reasons = [f"miss, nearest {manifest.address}: {change}" for change in changes]
    for role, parent in stage.inputs.items():
        if any(change.startswith(f"inputs.{role}:") for change in changes):
            reasons += [f"{role}: {reason}" for reason in _reasons(store, parent, known)]
    return reasons


def _line(manifest: Manifest) -> str:
    made, age = manifest.made_by, time.time() - datetime.fromisoformat(manifest.created).timestamp()
    who = f"{made.get('user', '?')}@{made.get('host', '?')} {str(made.get('code_commit', ''))[:12]}".strip()
    origin = ", ".join(f"{role} {key[:12]}" for role, key in manifest.identity["inputs"].items())
    return f"{manifest.address:64} {_size(manifest.bytes):>10} {_age(age):>7}  {who}" + (
        f"  from {origin}" * bool(origin)
    )


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.artifacts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="all artifacts")
    command.add_argument("stage", nargs="?", help="only this stage, e.g. finetune")
    command = commands.add_parser("show", help="one artifact and its ancestry")
    command.add_argument("address")
    command = commands.add_parser("explain", help="why a stage of a preset is a miss")
    command.add_argument("preset")
    command.add_argument("stage", nargs="?", help="as in --plan, e.g. 'finetune sdd'; all without it")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    command = commands.add_parser("verify", help="all checksums")
    command.add_argument("address", nargs="?")
    command.add_argument("--quarantine", action="store_true", help="move what is bad out of the way")
    command = commands.add_parser("gc", help="remove what no report needs")
    command.add_argument("--newest", type=int, default=10, help="reports whose artifacts stay (10)")
    command.add_argument("--keep", action="append", default=[], metavar="RUN", help="and those of this flow run's")
    command.add_argument("--hours", type=float, default=WEEK, help=f"what is younger stays, too ({WEEK:g}, a week)")
    command.add_argument("--delete", action="store_true", help="without it nothing is removed")
    options = parser.parse_args(arguments)
    try:
        with environment(prefect=False):
            store = ArtifactStore.from_environment()
            store.check()
            match options.command:
                case "list":
                    return print_list(store, options.stage)
                case "show":
                    return print_one(store, options.address)
                case "explain":
                    return explain(store, options.preset, tuple(options.overrides), options.stage)
                case "verify":
                    return verify(store, options.address, quarantine=options.quarantine)
                case _:
                    return collect(store, options.newest, options.keep, options.hours, delete=options.delete)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
