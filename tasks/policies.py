"""How stages are tried again, and how many engines a machine runs at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from tasks.domain.errors import PipelineError
from tasks.engines.child import is_stopping, refuse_while_stopping
from tasks.engines.gpus import locked

# A slot is a file that its holder has locked; the kernel frees those of a killed process at once.
SLOTS = Path(tempfile.gettempdir(), f"sdd-engine-slots-{os.getuid()}")
LOOK_SECONDS = 0.2  # from one look at slots that others hold to the next


def may_pass(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what waiting may cure (engine crash, store away), never a wrong setting or a failed gate."""
    error = state.result(raise_on_failure=False)
    return error.retryable if isinstance(error, PipelineError) else False


# The store decides what is cached (see tasks/materialise.py); Prefect keeps no results of its own.
STAGE: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(10),  # 10, 20, 40 s
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": may_pass,
}


@contextmanager
def engine_slots(engines: int, least: int = 1, most: int = 0) -> Iterator[int]:
    """Hold `least` of the machine's engine slots, waiting for them, and up to `most` that are free; yields how many.

    engines: how many slots the machine has. A slot is a child process that may use the machine's devices beside others.
    """
    SLOTS.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as held:
        yield _collect(held, engines, min(least, engines), min(max(least, most), engines))


def _collect(held: ExitStack, engines: int, least: int, most: int) -> int:
    """One run at a time collects, else two that need several would wait for each other's."""
    while not (queue := locked(SLOTS / "queue")):
        if not least:
            return 0
        _pause()
    count = 0
    with queue:
        while True:
            for number in range(engines):
                if count < most and (slot := locked(SLOTS / str(number))):
                    held.enter_context(slot)
                    count += 1
            if count >= least:
                return count
            _pause()


def _pause() -> None:
    if is_stopping(LOOK_SECONDS):
        refuse_while_stopping("waiting for an engine slot")
