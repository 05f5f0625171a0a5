"""Leases on a clock that only the test moves: the living are waited for, the dead followed, one at a time holds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.domain.errors import StoreUnavailable
from tasks.store import lease as lease_module
from tasks.store.artifacts import LEASE, ArtifactStore
from tasks.store.conditional import create, replace, version
from tasks.store.lease import LEASE_SECONDS, Lease, acquire
from tests.store.conftest import contents, objects, produced, stage


class Clock:
    """Stands for the time module in the lease; `at_sleep` is what other processes do meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.at_sleep: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at_sleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


def path(store: ArtifactStore) -> str:
    return f"{store.uri(stage())}/{LEASE}"


def dead_lease(store: ArtifactStore) -> None:
    """A lease whose holder was killed."""
    store.fs.makedirs(store.uri(stage()), exist_ok=True)
    with store.lease(stage()):  # makes the bucket, too
        pass
    assert create(store.fs, path(store), b'{"owner": "dead"}')


def never() -> bool:
    return False


def test_a_dead_holder_is_followed_once_its_lease_has_not_changed_for_its_length(
    store: ArtifactStore, clock: Clock
) -> None:
    dead_lease(store)
    started = clock.now
    with store.hold(stage().address, never) as lease:
        assert lease.held()
        assert LEASE_SECONDS <= clock.now - started < LEASE_SECONDS + 2
    assert not store.fs.exists(path(store))


def test_a_living_holder_is_waited_for_whatever_the_clocks_say(
    store: ArtifactStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It renews every third of the time; that its wall clock is years off is no reason to take its lease."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with store.lease(stage()) as living:
        beats = [clock.now + LEASE_SECONDS / 3 * number for number in range(1, 31)]

        def beat() -> None:
            while beats and clock.now >= beats[0]:
                beats.pop(0)
                assert living.renew()

        clock.at_sleep = beat
        with store.hold(stage().address, lambda: not beats) as waiting:
            assert not waiting.held()
        assert living.held()
    assert clock.now > 1000 + 9 * LEASE_SECONDS


def test_a_waiter_that_did_not_look_for_a_while_starts_to_watch_anew(store: ArtifactStore, clock: Clock) -> None:
    """As after a suspended machine: that the object is the same as long ago does not say that nobody renewed it."""
    dead_lease(store)
    slept: list[float] = []

    def suspend() -> None:
        if not slept:
            slept.append(clock.now)
            clock.now += 10 * LEASE_SECONDS

    clock.at_sleep = suspend
    with store.hold(stage().address, never):
        assert clock.now - (slept[0] + 10 * LEASE_SECONDS) >= LEASE_SECONDS


def test_only_one_of_many_takes_over_from_a_dead_holder(store: ArtifactStore) -> None:
    dead_lease(store)
    seen = version(store.fs, path(store))
    assert seen
    start = threading.Barrier(12)

    def take(number: int) -> bool:
        start.wait()
        return replace(store.fs, path(store), f'{{"owner": "{number}"}}'.encode(), seen) is not None

    with ThreadPoolExecutor(12) as pool:
        taken = list(pool.map(take, range(12)))
    assert taken.count(True) == 1
    assert store.fs.cat_file(path(store)) == f'{{"owner": "{taken.index(True)}"}}'.encode()


def test_a_lease_that_was_released_is_not_taken_over_by_who_saw_it_before(store: ArtifactStore) -> None:
    dead_lease(store)
    seen = version(store.fs, path(store))
    store.fs.rm_file(path(store))
    assert seen
    assert replace(store.fs, path(store), b"late", seen) is None
    assert not store.fs.exists(path(store))


def test_who_lost_the_lease_knows_it_and_leaves_it_alone(store: ArtifactStore, clock: Clock) -> None:
    with store.lease(stage()) as stopped:
        clock.now += LEASE_SECONDS
        assert not stopped.held(), "by its own clock, without asking"
        seen = version(store.fs, path(store))
        assert seen and replace(store.fs, path(store), b'{"owner": "another"}', seen)
        assert not stopped.renew()
    assert store.fs.cat_file(path(store)) == b'{"owner": "another"}'


def test_work_done_under_a_lost_lease_gives_way_to_the_artifact_that_was_made_meanwhile(
    store: ArtifactStore, tmp_path: Path, clock: Clock
) -> None:
    other = ArtifactStore(store.root, tmp_path / "other")
    with store.lease(stage()) as stopped:
        clock.now += LEASE_SECONDS
        seen = version(store.fs, path(store))
        store.fs.rm_file(path(store))
        assert seen
        first = other.publish(stage(), produced(tmp_path / "one", {"rows.jsonl": b"first"}), {}, 0)
        again = store.publish(stage(), produced(tmp_path / "two", {"rows.jsonl": b"second"}), {}, 0, stopped)
    assert again == first
    assert contents(store.fetch(again)) == {"rows.jsonl": b"first"}


def test_work_done_under_a_lost_lease_is_published_where_nobody_else_did(
    store: ArtifactStore, tmp_path: Path, clock: Clock
) -> None:
    with store.lease(stage()) as stopped:
        clock.now += 2 * LEASE_SECONDS
        store.fs.rm_file(path(store))
        manifest = store.publish(stage(), produced(tmp_path / "out"), {}, 0, stopped)
    assert store.find(stage()) == manifest
    assert objects(store) == {f"{stage().address}/{name}" for name in [*manifest.files, "manifest.json"]}


def test_the_second_run_waits_for_the_first_ones_artifact(store: ArtifactStore, tmp_path: Path, clock: Clock) -> None:
    """The lease covers the computation: whoever waited finds the artifact and computes nothing."""
    first = ArtifactStore(store.root, tmp_path / "first")
    looks: list[bool] = []
    with first.lease(stage()) as held:

        def finish() -> None:
            if not looks:
                first.publish(stage(), produced(tmp_path / "out"), {"by": "first"}, 0, held)
            looks.append(True)

        clock.at_sleep = finish
        with store.lease(stage()) as second:
            found = store.find(stage())
            assert found and found.facts == {"by": "first"}
    assert looks
    assert second is not held


def test_a_run_that_gives_up_hands_the_lease_on_at_once(store: ArtifactStore, clock: Clock) -> None:
    failing = store.lease(stage())
    failing.__enter__()
    clock.at_sleep = lambda: failing.__exit__(None, None, None)
    before = clock.now
    with store.lease(stage()) as second:
        assert second.held() and clock.now - before < LEASE_SECONDS / 2


def test_what_ends_the_run_ends_the_wait(store: ArtifactStore, clock: Clock) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with store.lease(stage()) as living:
        with pytest.raises(KeyboardInterrupt), store.lease(stage(), stop):
            pass
        assert living.renew(), "and takes nothing from the holder"


def test_the_heartbeat_outlives_a_store_that_is_away(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 0.3)
    renewed, failures = threading.Event(), [ConnectionResetError("away")] * 3
    real = replace

    def unsteady(fs: Any, path: str, data: bytes, seen: str) -> str | None:
        if failures:
            raise failures.pop()
        written = real(fs, path, data, seen)
        renewed.set()
        return written

    with store.lease(stage()):
        monkeypatch.setattr(lease_module, "replace", unsteady)
        assert renewed.wait(30)


def test_a_renewal_whose_answer_was_lost_is_recognised(
    store: ArtifactStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.root.startswith("file://"):
        pytest.skip("a folder answers or fails")
    with store.lease(stage()) as lease:
        real = replace

        def answer_lost(fs: Any, path: str, data: bytes, seen: str) -> str | None:
            real(fs, path, data, seen)
            raise ConnectionResetError("after the write")

        monkeypatch.setattr(lease_module, "replace", answer_lost)
        with pytest.raises(ConnectionResetError):
            lease.renew()
        monkeypatch.setattr(lease_module, "replace", real)
        assert lease.renew() and lease.held()


def test_a_request_of_the_wait_that_fails_is_repeated(store: ArtifactStore, clock: Clock) -> None:
    """`attempt` runs every request, so a store that is away for a moment does not end a wait of hours."""
    dead_lease(store)
    failed: list[int] = []

    def attempt(request: Callable[[], Any]) -> Any:
        failed.append(1)
        return request()

    lease = acquire(store.fs, path(store), never, attempt)
    assert isinstance(lease, Lease) and len(failed) > LEASE_SECONDS
    lease.release()

    def broken(request: Callable[[], Any]) -> Any:
        raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        acquire(store.fs, path(store), never, broken)
