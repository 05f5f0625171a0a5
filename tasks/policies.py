"""How Prefect runs a stage: retries, caching, slots. The only place that knows."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.tasks import exponential_backoff

from tasks.domain.errors import PipelineError

# Child processes that use this machine's device at the same time.
ENGINE_SLOTS = f"sdd-engine-{platform.node() or 'host'}"
LEASE_SECONDS = 60  # a killed holder's slot is free again after about this long


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


def provide_engine_slots(count: int) -> None:
    """Create or adjust this machine's limit on engine processes."""
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(ENGINE_SLOTS, count)


def free_engine_slots() -> int:
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name(ENGINE_SLOTS)
    return max(0, int(limit.limit - limit.active_slots))


@contextmanager
def engine_slots(count: int = 1) -> Iterator[None]:
    """Hold so many slots, waiting for them."""
    if count == 0:
        yield
        return
    with concurrency(ENGINE_SLOTS, occupy=count, strict=True, lease_duration=LEASE_SECONDS):
        yield
