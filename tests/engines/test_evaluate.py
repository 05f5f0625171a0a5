"""The evaluation child against the harness's own vLLM backend, item by item."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.domain.recipe import Runtime
from tasks.engines.child import _environment, run_child
from tasks.evaluate import item_scores, score_facts
from tests.conftest import ROOT
from tests.tiny_data import write_data_root

RUNTIME = Runtime(device="cpu", kv_cache_gb=1)
# The harness with its own VLLM class, called as its documentation says, on the same task files.
INDEPENDENT = """
import json, sys, tempfile
from pathlib import Path
from tasks.engines.children.evaluate import _name_cpu_build, _write_yamls
_name_cpu_build()
import lm_eval
from lm_eval.models.vllm_causallms import VLLM
from lm_eval.tasks import TaskManager
request = json.loads(sys.argv[1])
folder = tempfile.mkdtemp()
names = {task: _write_yamls(task, settings, Path(folder)) for task, settings in request["tasks"].items()}
model = VLLM(pretrained=request["checkpoint"], dtype="float32", max_model_len=1024, enforce_eager=True, seed=0)
found = {}
for task, settings in request["tasks"].items():
    scored = lm_eval.simple_evaluate(
        model=model, tasks=names[task], task_manager=TaskManager(include_path=folder), log_samples=True,
        num_fewshot=settings["shots"], limit=settings["limit"], bootstrap_iters=0,
    )
    found[task] = sorted([s["doc_id"], [r[0][0] for r in s["resps"]]] for x in scored["samples"].values() for s in x)
Path(sys.argv[2]).write_text(json.dumps(found))
"""

# Tokens that each choice of an item read from the cache.
WATCHED = """
import json, sys
from tasks.engines.children.evaluate import _name_cpu_build
_name_cpu_build()
from tasks.engines.children.prefix_cache import PrefixCachedVLLM
class Watched(PrefixCachedVLLM):
    def _after_their_contexts(self, requests):
        outputs = super()._after_their_contexts(requests)
        print(json.dumps([output.num_cached_tokens for output in outputs]))
        return outputs
model = Watched(pretrained=sys.argv[1], dtype="float32", max_model_len=1024, enforce_eager=True, seed=0)
context = [5 + 7 * place % 400 for place in range(700)]
model._loglikelihood_tokens([(None, context, [choice]) for choice in (6, 7, 8, 9)], disable_tqdm=True)
"""


@pytest.fixture(scope="module")
def request_of(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    shots = {"arc_challenge": 4, "hellaswag": 3, "truthfulqa_mc2": 0}
    root = str(write_data_root(tmp_path_factory.mktemp("root"), items=12))
    return {
        "checkpoint": str(pico),
        "backend": "vllm", "chat_template": False, "dtype": "float32", "seed": 0,
        "max_length": 1024, "max_generated": 8,
        "tasks": {name: {"shots": count, "limit": 6, "data_root": root} for name, count in shots.items()},
    }  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(request_of: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated")
    run_child("evaluate", request_of, out, RUNTIME, lambda done, text: None)
    return out


def test_log_likelihoods_equal_the_harness_without_prefix_cache(
    request_of: dict[str, Any], evaluated: Path, tmp_path: Path
) -> None:
    script = [sys.executable, "-c", INDEPENDENT, json.dumps(request_of), str(tmp_path / "found.json")]
    subprocess.run(script, cwd=ROOT, env=_environment(RUNTIME), check=True, capture_output=True, timeout=300)
    for task, items in json.loads((tmp_path / "found.json").read_text()).items():
        samples = [json.loads(line) for line in (evaluated / task / f"samples_{task}.jsonl").read_text().splitlines()]
        own = sorted((s["doc_id"], [float(r[0][0]) for r in s["resps"]]) for s in samples)
        assert [doc for doc, _ in own] == [doc for doc, _ in items]
        for (_, mine), (_, theirs) in zip(own, items, strict=True):
            np.testing.assert_allclose(mine, [float(value) for value in theirs], atol=2e-3)


def test_every_choice_reads_its_context_from_the_cache(pico: Path) -> None:
    script = [sys.executable, "-c", WATCHED, str(pico)]
    said = subprocess.run(
        script, cwd=ROOT, env=_environment(RUNTIME), check=True, capture_output=True, text=True, timeout=300
    )
    (cached,) = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("[") and line.endswith("]")]
    assert len(cached) == 4
    assert min(cached) >= 512  # whole blocks, of 16 tokens on a GPU and more on a CPU


def test_item_scores_average_to_the_harness_result(evaluated: Path) -> None:
    for task, metric in (("arc_challenge", "acc_norm,none"), ("truthfulqa_mc2", "acc,none")):
        results = json.loads((evaluated / task / "results.json").read_text())["results"][f"sdd_{task}"]
        assert item_scores(task, evaluated / task).mean() == pytest.approx(results[metric])


def test_an_answer_that_stands_elsewhere_counts_by_the_lenient_filter_alone(tmp_path: Path) -> None:
    found = {"strict-match": [1.0, 0.0, 0.0, 0.0], "flexible-extract": [1.0, 1.0, 1.0, 0.0]}
    with (tmp_path / "samples_gsm8k.jsonl").open("w") as file:
        for kind, scores in found.items():
            for doc, score in enumerate(scores):
                sample = {"task": "gsm8k", "doc_id": doc, "filter": kind, "exact_match": score, "resps": [[""]]}
                file.write(json.dumps(sample) + "\n")
    facts = score_facts("gsm8k", tmp_path)
    assert (facts["value"], facts["lenient_value"], facts["items"]) == (0.25, 0.75, 4)
