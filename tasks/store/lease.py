"""The right to make one artifact: an object with a heartbeat, taken over only when its holder is dead.

Nobody compares wall clocks: a holder is dead when its object has not changed for LEASE_SECONDS of the
waiting process's own monotonic clock, so a clock that is off costs nothing. Every write is conditional
on the version that was seen, so one process at a time holds the object. A holder that was stopped for
longer than that finds out by its own clock (`held()`), before it writes anything else.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

from tasks.store.conditional import create, replace, version

LEASE_SECONDS = 30.0  # a holder that died is followed after this long; it renews three times as often
POLL_SECONDS = 0.5


class Lease:
    """Held from `acquire` to `release` while a thread renews it; never held where `acquire` stopped waiting."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._owner, self._beat = uuid4().hex, 0
        self._version: str | None = None
        self._renewed = 0.0
        self._guard = threading.Lock()
        self._done = threading.Event()

    def held(self) -> bool:
        """Whether nobody else can have taken it yet, by this process's own clock."""
        return self._version is not None and time.monotonic() - self._renewed < LEASE_SECONDS

    def renew(self) -> bool:
        """Whether it still is this one's, asked of the store; if so, it runs for LEASE_SECONDS from now."""
        with self._guard:
            return self._version is not None and self._write(self._version)

    def release(self) -> None:
        self._done.set()
        with suppress(Exception):  # it runs out by itself, and the work that it was held for is done
            if self.held() or self.renew():
                self._fs.rm_file(self._path)
        self._version = None

    def _write(self, seen: str | None) -> bool:
        """Write the object where there is none, or over the version `seen`."""
        started = time.monotonic()  # before the request: others may count from the moment it arrives
        content = {"owner": self._owner, "host": platform.node(), "pid": os.getpid(), "beat": self._beat}
        data = json.dumps(content).encode()
        if seen is None:
            self._version = create(self._fs, self._path, data)
        else:
            self._version = replace(self._fs, self._path, data, seen)
        self._renewed = started
        self._beat += 1  # not after an error: a request that did arrive is then recognised by its content
        return self._version is not None

    def _beat_until_done(self) -> None:
        while self._version is not None and not self._done.wait(LEASE_SECONDS / 3):
            with suppress(Exception):  # the store is away: the next beat tries again, and held() counts the time
                self.renew()


def acquire(fs: Any, path: str, until: Callable[[], bool], attempt: Callable[[Callable[[], Any]], Any]) -> Lease:
    """Take the lease at `path`; while another process holds it, wait until it is free or its holder is dead.

    until: asked at every look while another holds it; True ends the wait with a lease that is not held.
    attempt: runs each request, so that the caller decides how often one is repeated.
    Raises FileNotFoundError when the bucket does not exist.
    """
    lease = Lease(fs, path)
    watched, since, looked = None, 0.0, 0.0
    while not attempt(lambda: lease._write(None)):
        seen = attempt(lambda: version(fs, path))
        now = time.monotonic()
        if seen is None:
            continue
        if until():
            return lease
        if seen != watched or now - looked > LEASE_SECONDS / 2:  # not looking is no sign of its death
            watched, since = seen, now
        elif now - since >= LEASE_SECONDS and attempt(partial(lease._write, seen)):
            break
        looked = now
        time.sleep(POLL_SECONDS)
    threading.Thread(target=lease._beat_until_done, daemon=True, name="lease").start()
    return lease
