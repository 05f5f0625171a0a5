"""The harness's prompts do not depend on where the items come from: a data root, or the hub's own tables.

The hub cannot be had here: `datasets.load_dataset` is replaced by tables with the hub's columns, named as on the hub.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from tasks.domain.leaderboard import BENCHMARKS, LEADERBOARD
from tasks.engines.children.evaluate import _write_yamls
from tests.tiny_data import write_data_root

COMMIT = "c" * 40
# Columns of the hub's tables that the files of a data root do without.
FURTHER: dict[str, dict[str, Any]] = {
    "hellaswag": {"ctx": "A man sits. he", "source_id": "activitynet~v_1", "split": "val", "split_type": "indomain"},
    "lambada_openai": {},
}


class Recorder(LM):
    """Keeps every request and answers none."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        self.asked += [tuple(request.args) for request in requests]
        return [(0.0, False) for _ in requests]

    def generate_until(self, requests: Any) -> list[str]:
        self.asked += [(request.args[0], json.dumps(request.args[1], sort_keys=True)) for request in requests]
        return ["" for _ in requests]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        raise NotImplementedError  # no task of ours asks for it; one that did must fail


def read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        yield from (json.loads(line) for line in lines)


def asked(task: str, settings: dict[str, Any], folder: Path) -> list[tuple[Any, ...]]:
    folder.mkdir()
    names = _write_yamls(task, settings, folder)
    if task == "mmlu":
        names = names[:3]
    recorder, manager = Recorder(), TaskManager(include_path=str(folder), include_defaults=False)
    lm_eval.simple_evaluate(
        model=recorder, tasks=names, task_manager=manager, limit=2, bootstrap_iters=0,
        num_fewshot=min(BENCHMARKS[task].shots, 4), random_seed=0, numpy_random_seed=0, torch_random_seed=0,
        fewshot_random_seed=1234,
    )  # fmt: skip
    return recorder.asked


def test_tasks_shots_metrics_and_filters_are_the_leaderboards() -> None:
    """As the harness's own group says, whose tasks draw their examples from the training split unless it names one."""
    folder = Path(str(lm_eval.__file__)).parent / "tasks"
    group = {task["task"]: task for task in yaml.safe_load((folder / "benchmarks/openllm.yaml").read_text())["task"]}
    names = {name: name.removesuffix("_mc2") for name in LEADERBOARD}  # of TruthfulQA only mc2 counts
    assert {names[name]: benchmark.shots for name, benchmark in LEADERBOARD.items()} == {
        name: task["num_fewshot"] for name, task in group.items()
    }
    metrics = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "truthfulqa_mc2": "acc", "mmlu": "acc",
               "winogrande": "acc", "gsm8k": "exact_match"}  # fmt: skip
    assert {name: benchmark.metric for name, benchmark in LEADERBOARD.items()} == metrics
    assert {name: benchmark.filter for name, benchmark in LEADERBOARD.items()} == {
        **dict.fromkeys(metrics, "none"), "gsm8k": "strict-match",
    }  # fmt: skip
    for name, benchmark in LEADERBOARD.items():
        config = load_yaml(min(folder.glob(benchmark.upstream)), resolve_func=False)
        assert (config.get("test_split") or config.get("validation_split")) == [*benchmark.files][-1]
        assert benchmark.metric in [metric["metric"] for metric in config["metric_list"]]
        assert benchmark.filter in [step["name"] for step in config.get("filter_list", [{"name": "none"}])]
        wanted = group[names[name]].get("fewshot_split")
        assert wanted is None or (config.get("fewshot_split") or config["training_split"]) == wanted


@pytest.mark.parametrize("task", BENCHMARKS)
def test_prompts_are_those_of_the_hub(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, benchmark = write_data_root(tmp_path / "root", items=9), BENCHMARKS[task]
    local = asked(task, {"data_root": str(root), "revision": None}, tmp_path / "local")
    loaded: list[str] = []

    def from_hub(path: str, name: str | None = None, revision: str | None = None, **_: Any) -> datasets.DatasetDict:
        assert (path, revision) == (benchmark.hub.split(":")[0], COMMIT)
        loaded.append(str(name))
        files = {split: root / "openllm" / file.replace("*", str(name)) for split, file in benchmark.files.items()}
        tables = {split: [{**row, **FURTHER.get(task, {})} for row in read(file)] for split, file in files.items()}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in tables.items()})

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    hub = asked(task, {"data_root": None, "revision": COMMIT}, tmp_path / "hub")
    assert local == hub and local
    assert loaded and (task == "mmlu" or set(loaded) <= {benchmark.hub.partition(":")[2], "None"})
    assert random.Random(0).sample(local, 1)[0][0].strip(), "prompts are not empty"
