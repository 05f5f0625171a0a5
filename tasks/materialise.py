"""What every stage does: return its artifact, and produce and publish it only if the store has none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any
from uuid import UUID

from httpx import HTTPError
from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from prefect.states import Completed, State

from tasks.domain.recipe import Runtime
from tasks.domain.stage import KEY_LENGTH, Stage
from tasks.engines.child import Progress, refuse_while_stopping
from tasks.policies import engine_slots
from tasks.store.artifacts import ArtifactStore, Manifest, Quarantined, Transfer
from tasks.store.parts import Parts

Ref = dict[str, Any]  # stage, key, uri, cache ("hit" | "miss"), seconds, facts
Produce = Callable[[Path, Progress], dict[str, Any]]  # fills the folder, returns the facts

PROGRESS_SECONDS = 2.0


def materialise(
    stage: Stage, produce: Produce, runtime: Runtime | None = None, slots: int = 1, pieces: Sequence[str] = ()
) -> State[Ref]:
    """Return the stage's artifact as a completed state, named Cached when nothing had to run.

    produce: fills an empty folder and returns the facts. runtime: that of an engine, which holds so many slots.
    pieces: of `parts_of` that serve this stage alone, and go once it is published.
    What an interrupted stage wrote stays out of the store: only a finished folder is published.
    """
    store = ArtifactStore.from_environment()
    manifest = existing(store, stage)
    if not manifest:
        with store.lease(stage, lambda: refuse_while_stopping(stage.name)) as lease, store.staging() as folder:
            manifest = store.find(stage)  # made by the run that held the lease before
            if not manifest:
                progress = progress_artifact(stage)
                with engine_slots(runtime.engines, slots) if runtime else nullcontext():
                    started = time.monotonic()
                    facts = produce(folder, progress)
                    seconds = time.monotonic() - started
                # Without the slot: publishing waits for whoever took a lost lease over, who may wait for the slot.
                with transfer("uploaded", progress) as moved:
                    manifest = store.publish(stage, folder, facts, seconds, lease, moved)
                if pieces:
                    Parts(store, stage.name, pieces).remove()
                link(stage, store.uri(stage))
                return Completed(message=f"published {store.uri(stage)}", data=ref_of(store, manifest, "miss"))
    link(stage, store.uri(stage))
    return Completed(name="Cached", message=f"{store.uri(stage)} exists", data=ref_of(store, manifest, "hit"))


def existing(store: ArtifactStore, stage: Stage) -> Manifest | None:
    """The stage's artifact, checked and on this machine; a bad one is quarantined, and the stage to be made again."""
    try:
        with transfer("downloaded", progress_artifact(stage)) as moved:
            return store.obtain(stage, moved)
    except Quarantined as error:
        get_run_logger().warning("%s %s: %s", stage.name, stage.slug, error)
        return None


@contextmanager
def transfer(what: str, progress: Progress) -> Iterator[Transfer]:
    """A counter of bytes that is shown as progress, if what is done with it takes longer than PROGRESS_SECONDS."""
    moved, ended = Transfer(), threading.Event()

    def show() -> None:
        shown = False
        while not ended.wait(PROGRESS_SECONDS) or shown:
            if shown := bool(moved.size):
                text = f"{moved.value / 1e6:.0f} of {moved.size / 1e6:.0f} MB {what}"
                progress(moved.value / moved.size, text)
            if ended.is_set():
                return

    # The client's own thread, which counts, must not wait for Prefect, and knows nothing of this run.
    showing = threading.Thread(target=copy_context().run, args=(show,), daemon=True, name="transfer")
    showing.start()
    try:
        yield moved
    finally:
        ended.set()
        showing.join()


@contextmanager
def parts_of(stage: str, progress: Progress, names: Sequence[str], *, shared: bool) -> Iterator[tuple[Path, Progress]]:
    """A folder with those of the named pieces that earlier runs finished, and a progress that commits new ones.

    shared: the pieces serve other stages too, whose runs wait while this one makes them.
    """
    parts = Parts(ArtifactStore.from_environment(), stage, names)
    parts.fetch()
    committed = time.monotonic()

    def committing(done: float, text: str) -> None:
        nonlocal committed
        progress(done, text)
        if time.monotonic() - committed > PROGRESS_SECONDS:  # a row's progress should not look at every shard
            parts.commit()
            committed = time.monotonic()

    def never() -> bool:
        refuse_while_stopping(stage)
        return False

    with parts.claimed(never) if shared else nullcontext():
        try:
            yield parts.folder, committing
        finally:
            parts.commit()


def folder_of(ref: Ref) -> Path:
    """The artifact's files on this machine."""
    store = ArtifactStore.from_environment()
    return store.fetch(store.manifest_at(ref["uri"]))


def ref_of(store: ArtifactStore, manifest: Manifest, cache: str) -> Ref:
    return {
        "stage": manifest.stage, "key": manifest.key, "uri": f"{store.root}/{manifest.address}", "cache": cache,
        "seconds": manifest.seconds if cache == "miss" else 0.0, "facts": manifest.facts,
    }  # fmt: skip


def link(stage: Stage, uri: str) -> None:
    create_link_artifact(
        uri, link_text=uri, key=_artifact_key(stage, "link"), description=f"{stage.name}: {stage.slug}"
    )


def progress_artifact(stage: Stage) -> Progress:
    """A progress bar on the run's page, moved at most every two seconds, and a log line every tenth."""
    logger = get_run_logger()
    shown: dict[str, Any] = {"id": None, "at": 0.0, "tenth": -1}

    def progress(done: float, text: str) -> None:
        percent, now = round(100 * min(done, 1.0), 1), time.monotonic()
        if int(percent // 10) != shown["tenth"]:
            shown["tenth"] = int(percent // 10)
            logger.info("%s %s: %s", stage.name, stage.slug, text)
        if now - shown["at"] < PROGRESS_SECONDS and percent < 100:
            return
        shown["at"] = now
        with suppress(HTTPError):  # a server that is away must not end the work that it would show
            if shown["id"] is None:
                shown["id"] = create_progress_artifact(percent, key=_artifact_key(stage, "progress"), description=text)
            else:
                assert isinstance(shown["id"], UUID)
                update_progress_artifact(shown["id"], percent, description=text)

    return progress


def _artifact_key(stage: Stage, what: str) -> str:
    return f"{stage.name}-{stage.key[:KEY_LENGTH]}-{what}"
