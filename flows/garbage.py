"""Remove, on a schedule, what no report needs: `flows.artifacts gc` as a flow.

prefect deployment run collect-garbage/nightly
"""

from __future__ import annotations

from prefect import flow

from flows.artifacts import WEEK, collect
from tasks.store.artifacts import REPORTS, ArtifactStore


@flow(name="collect-garbage", persist_result=False, log_prints=True)
def collect_garbage(newest: int = 10, hours: float = WEEK, delete: bool = True) -> None:
    """Keep what the newest reports reach, what is leased, and what is younger than so many hours with its inputs.

    hours: more than the longest run takes; what it has made is in no report before its end.
    """
    store = ArtifactStore.from_environment()
    store.check()
    if not store.fs.exists(f"{store.root}/{REPORTS}"):
        print(f"nothing removed: no report under {store.root}/{REPORTS} says what to keep")
        return
    collect(store, newest, [], hours, delete=delete)
