"""How long a plan and the list of artifacts take when the store holds 10,000 of them.

    .venv/bin/python -m tests.benchmarks.many_artifacts

Starts an S3 server of its own (SeaweedFS), fills it with small artifacts of every stage, and measures whole commands.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks.record import record

ARTIFACTS = 10_000
LIMIT = 5.0  # seconds, of a plan
SAMPLES = 5


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="sdd-bench-") as folder:
        from tests.conftest import build_pico  # clears the settings from outside
        from tests.tiny_data import write_data_root, write_preset

        os.environ["SDD_STATE"] = os.environ["SDD_MIRROR"] = folder
        from deployments.local import environment

        os.environ["SDD_DATA_ROOT"] = str(write_data_root(Path(folder, "data")))
        preset = str(write_preset(Path(folder, "pico.yaml"), build_pico(Path(folder, "pico"))))
        with environment(prefect=False):
            empty = [*seconds("flows.recover", preset, "--plan")]
            fill(preset)
            full = [*seconds("flows.recover", preset, "--plan")]
            forget_the_newest()
            unnoted = [*seconds("flows.recover", preset, "--plan")]
            listed = [*seconds("flows.artifacts", "list")]
    record(
        "many_artifacts", f"the {LIMIT:g} s that a plan may take with {ARTIFACTS} artifacts",
        {"plan, empty store": empty, "plan": full, "plan, without notes": unnoted, "list": listed},
        statistics.median(full) / LIMIT, 1.0, higher_is_better=False,
    )  # fmt: skip


def fill(preset: str) -> None:
    """Artifacts as many other settings of the same preset would have left them, a manifest and a file each."""
    from dataclasses import asdict

    from flows.plan import build_plan
    from tasks.domain.recipe import load_preset
    from tasks.domain.stage import Stage
    from tasks.store.artifacts import MANIFEST, NEWEST, ArtifactStore, Manifest

    store, stages = ArtifactStore.from_environment(), [stage for _, stage in build_plan(load_preset(preset)).stages()]
    store.fs.mkdir(store.bucket)
    objects = {}
    for number in range(ARTIFACTS):
        like = stages[number % len(stages)]
        stage = Stage(like.name, like.version, {**like.recipe, "number": number}, like.inputs, like.slug)
        file = {"data.json": {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}}
        manifest = Manifest(
            stage.name, stage.key, stage.address, stage.identity(), file, {}, 1.0,
            datetime.now(UTC).isoformat(timespec="seconds"), {"host": "bench", "user": "bench", "libraries": {}},
        )  # fmt: skip
        objects[f"{store.uri(stage)}/data.json"] = b"{}"
        objects[f"{store.root}/{NEWEST}/{stage.name}"] = stage.address.encode()
        objects[f"{store.uri(stage)}/{MANIFEST}"] = json.dumps(asdict(manifest), indent=1).encode()
    store.fs.pipe(objects, batch_size=64)


def forget_the_newest() -> None:
    """As a store that was filled by copying."""
    from tasks.store.artifacts import NEWEST, ArtifactStore

    store = ArtifactStore.from_environment()
    store.fs.rm(f"{store.root}/{NEWEST}", recursive=True)


def seconds(*command: str) -> Iterator[float]:
    for _ in range(SAMPLES):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        yield round(time.monotonic() - started, 2)


if __name__ == "__main__":
    main()
