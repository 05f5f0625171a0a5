"""What each stage costs as its work grows: seconds of whole stages, engines' start included, on log-log plots.

    .venv/bin/python -m tests.benchmarks.scaling [SWEEP ...]     # results/scaling.json and .png, on a GPU scaling_gpu

A sweep varies one thing and holds the others. The models are random, in the shapes of SmolLM2 and smaller ones. The
exponent is the slope between a sweep's two largest points: 1 is growth in proportion; the engine's start, which no
work adds to, flattens small ones. `make bench` brings matplotlib, which draws the plots.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.benchmarks.material import benchmark_rows, fresh, keep_settings, random_model, servers
from tests.benchmarks.record import RESULTS, gpus, record

Points = list[tuple[float, float]]  # what grows, and seconds
Shape = tuple[int, int, int]  # hidden size, blocks, attention heads

DEVICE = "gpu" if gpus() else "cpu"
SHAPES: dict[str, list[Shape]] = {
    "cpu": [(192, 12, 3), (384, 24, 6), (576, 30, 9)],
    "gpu": [(576, 30, 9), (960, 32, 15), (2048, 24, 32), (3072, 28, 24)],
}
USUAL = {"cpu": 2, "gpu": 0}  # the shape of sweeps over something else: SmolLM2-135M's
SIZES: dict[str, dict[str, list[int]]] = {
    "cpu": {
        "samples": [8, 32, 128], "rows": [16, 64, 192], "workers": [1, 2, 4], "trained": [4, 16, 32],
        "items": [1, 4, 16], "megabytes": [1, 8, 64, 512],
    },
    "gpu": {
        "samples": [128, 512, 2048], "rows": [1024, 4096, 16384], "workers": [1, 2, 4, 8],
        "trained": [256, 1024, 4096], "items": [20, 80, 320], "megabytes": [1, 8, 64, 512],
    },
}  # fmt: skip
OF_EACH_MODEL = {"samples": 16, "trained": 8}
LENGTH, TOKENS = 256, {"cpu": 24, "gpu": 128}
TASKS = ("arc_challenge", "hellaswag")


class Sweeps:
    """One method a sweep, named `<stage>_by_<what grows>`; each returns its points."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sizes = folder, SIZES[DEVICE]
        self.models = [_model(folder / f"model-{number}", shape) for number, shape in enumerate(SHAPES[DEVICE])]
        self.usual = self.models[USUAL[DEVICE]]

    def score_by_samples(self) -> Points:
        return [(count, self._score(self.usual, count)) for count in self.sizes["samples"]]

    def score_by_parameters(self) -> Points:
        return [(_parameters(model), self._score(model, OF_EACH_MODEL["samples"])) for model in self.models]

    def prune_by_parameters(self) -> Points:
        from tasks.domain.span import Span
        from tasks.prune import cut

        def seconds(model: Path) -> float:
            layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
            out = _empty(self.folder / "pruned")
            return _timed(lambda: cut(model, out, Span(2, 2, layers)))

        return [(_parameters(model), seconds(model)) for model in self.models]

    def distil_by_rows(self) -> Points:
        return [(count, self._distil(count, engines=1)) for count in self.sizes["rows"]]

    def distil_by_workers(self) -> Points:
        """Engines side by side on the devices of this machine, as many shards for each."""
        return [(count, self._distil(self.sizes["rows"][1], engines=count)) for count in self.sizes["workers"]]

    def finetune_by_rows(self) -> Points:
        return [(count, self._finetune(self.usual, count)) for count in self.sizes["trained"]]

    def finetune_by_parameters(self) -> Points:
        return [(_parameters(model), self._finetune(model, OF_EACH_MODEL["trained"])) for model in self.models]

    def evaluate_by_items(self) -> Points:
        return [(len(TASKS) * count, self._evaluate(count)) for count in self.sizes["items"]]

    def store_by_megabytes(self) -> Points:
        """Publication and fetch: upload, manifest, download, checksums."""
        from tasks.domain.stage import Stage
        from tasks.store.artifacts import ArtifactStore

        artifacts = ArtifactStore.from_environment()
        artifacts.check()

        def seconds(size: int) -> float:
            staged = _empty(self.folder / "staged")
            (staged / "weights.bin").write_bytes(os.urandom(size * 2**20))

            def there_and_back() -> None:
                manifest = artifacts.publish(Stage("model", 1, {"size": size}, slug="bench"), staged, {}, 0.0)
                shutil.rmtree(artifacts.mirror)
                artifacts.fetch(manifest)

            return _timed(there_and_back)

        return [(size, seconds(size)) for size in self.sizes["megabytes"]]

    def _score(self, model: Path, samples: int) -> float:
        from tests.conftest import pocket_pairs

        text = " ".join(pair["answer"] for pair in pocket_pairs()) * 3
        documents = self.folder / "documents.json"
        documents.write_text(json.dumps([text[at * 50 :][:4000] for at in range(samples)]))
        request = {
            "checkpoint": str(model), "documents": str(documents), "seed": 0, "samples": samples, "length": LENGTH,
            "metric": "angular", "token": "last", "dtype": _dtype(), "commit_seconds": 3600,
            "part": str(_empty(self.folder / "parts") / "sums"),
        }  # fmt: skip
        return self._child("score", request)

    def _distil(self, rows: int, engines: int) -> float:
        from tasks.distil import generate
        from tasks.domain.recipe import Distil, Runtime
        from tests.conftest import write_jsonl

        settings = Distil(template="retell", max_tokens=TOKENS[DEVICE], attempts=1, dtype=_dtype())
        request = {
            "checkpoint": str(self.usual), "parts": str(_empty(self.folder / "parts")), **settings.model_dump(),
            "rows": str(write_jsonl(self.folder / "rows.jsonl", benchmark_rows(rows))), "messages": settings.messages(),
        }  # fmt: skip
        size = max(1, rows // (4 * self.sizes["workers"][-1]))
        shards = [(f"shard-{first}", first, first + size) for first in range(0, rows, size)]
        runtime = Runtime(engines=engines, gpu_memory=0.9 / engines)
        return _timed(lambda: generate(request, shards, self.folder / "out", runtime, lambda _d, _t: None, engines))

    def _finetune(self, model: Path, rows: int) -> float:
        from tasks.domain.recipe import Finetune
        from tests.conftest import write_jsonl

        trained = [{**row, "answer": row["reference"], "outcome": "accepted"} for row in benchmark_rows(rows)]
        request = {
            "checkpoint": str(model), "rows": str(write_jsonl(self.folder / "rows.jsonl", trained)), "name": "bench",
            "answers": "answer", "parts": str(_empty(self.folder / "parts")), "commit_seconds": 3600,
            **Finetune(dtype=_dtype(), batch=8).model_dump(),
        }  # fmt: skip
        return self._child("finetune", request)

    def _evaluate(self, items: int) -> float:
        from tasks.domain.leaderboard import LEADERBOARD
        from tests.tiny_data import write_data_root

        root = os.environ.get("SDD_DATA_ROOT") or write_data_root(self.folder / "data", items=self.sizes["items"][-1])
        where = {"data_root": str(root), "revision": None}
        request = {
            "checkpoint": str(self.usual), "backend": "vllm", "chat_template": False, "max_generated": 256, "seed": 0,
            "dtype": _dtype(), "max_length": 4096,
            "tasks": {name: {"shots": LEADERBOARD[name].shots, "limit": items, **where} for name in TASKS},
        }  # fmt: skip
        return self._child("evaluate", request)

    def _child(self, name: str, request: dict[str, Any]) -> float:
        from tasks.domain.recipe import Runtime
        from tasks.engines.child import run_child

        out = _empty(self.folder / "out")
        return _timed(lambda: run_child(name, request, out, Runtime(), lambda _done, _text: None))


def _timed(call: Callable[[], Any]) -> float:
    started = time.monotonic()
    call()
    return round(time.monotonic() - started, 3)


def _dtype() -> str:
    return "bfloat16" if DEVICE == "gpu" else "float32"


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _model(folder: Path, shape: Shape) -> Path:
    folder.mkdir()
    return Path(fresh(random_model, folder, *shape))


def _parameters(model: Path) -> int:
    from tasks.store.checkpoint import count_parameters

    return count_parameters(model, json.loads((model / "config.json").read_text()))


def exponent(points: Points) -> float:
    """The slope of the last two points, both axes logarithmic."""
    (before, less), (most, longest) = points[-2:]
    return round(math.log(longest / less) / math.log(most / before), 2)


def apart(values: Iterable[float]) -> list[float]:
    """Those far enough from the next smaller one for a label of their own."""
    chosen: list[float] = []
    for value in sorted(values):
        if not chosen or value > 1.15 * chosen[-1]:
            chosen.append(value)
    return chosen


def draw(sweeps: dict[str, Points], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = 3
    figure, axes = pyplot.subplots(math.ceil(len(sweeps) / columns), columns, figsize=(11, 8.5), layout="constrained")
    for axis, (name, points) in zip(axes.flat, sweeps.items(), strict=False):
        stage, _, grows = name.partition("_by_")
        amounts, seconds = zip(*points, strict=True)
        axis.loglog(amounts, seconds, marker="o", color="#1f5fa8")
        if grows != "workers":
            axis.loglog(amounts, [seconds[-1] * amount / amounts[-1] for amount in amounts], ls=":", color="#999999")
        axis.set(title=f"{stage}, exponent {exponent(points):g}", xlabel=grows, ylabel="seconds")
        axis.set_xticks(amounts, [f"{amount / 1e6:.0f}M" if amount >= 1e6 else f"{amount:g}" for amount in amounts])
        ticks = apart(seconds)
        axis.set_yticks(ticks, [f"{each:.3g}" for each in ticks])
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.25)
    for axis in axes.flat[len(sweeps) :]:
        axis.axis("off")
    figure.savefig(file, dpi=80)


def main() -> None:
    names = [name for name in vars(Sweeps) if "_by_" in name]
    parser = argparse.ArgumentParser()
    parser.add_argument("sweeps", nargs="*", default=names, metavar="SWEEP", help=f"default: {' '.join(names)}")
    chosen = parser.parse_args().sweeps
    keep_settings()
    measured: dict[str, Points] = {}
    with tempfile.TemporaryDirectory(prefix="sdd-scaling-") as folder, servers(Path(folder), prefect=False):
        sweeps = Sweeps(Path(folder))
        for name in chosen:
            measured[name] = getattr(sweeps, name)()
            print(f"{name}: {measured[name]}, exponent {exponent(measured[name])}", flush=True)
            write(measured)


def write(measured: dict[str, Points]) -> None:
    """What there is so far, plotted where matplotlib is; workers are not work, so that their exponent is no cost."""
    exponents = {name: exponent(points) for name, points in measured.items()}
    costs = [slope for name, slope in exponents.items() if not name.endswith("workers")]
    figures = {"seconds": measured, "exponents": exponents}
    record("scaling", "growth in proportion to the work (exponent 1)", figures, max(costs, default=0.0), 1.1,
           higher_is_better=False)  # fmt: skip
    try:
        draw(measured, Path(os.environ.get("BENCHMARK_RESULTS", RESULTS)) / f"scaling{'_gpu' if gpus() else ''}.png")
    except ImportError:
        print("  no plot: there is no matplotlib", flush=True)


if __name__ == "__main__":
    main()
