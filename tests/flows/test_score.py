"""Scoring and pruning inside a real flow: a killed pass goes on, and what fails its gate is not published."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from prefect import flow
from transformers import AutoModelForCausalLM

import tasks.prune
import tasks.score
from flows.plan import build_plan
from tasks.algorithms.overlap import BenchmarkText
from tasks.domain.errors import EngineError, GateError
from tasks.domain.recipe import Preset, Prune, Runtime, load_preset
from tasks.domain.span import Span
from tasks.engines.child import Progress, run_child
from tasks.materialise import Ref, folder_of
from tasks.model import resolve_model
from tasks.prune import cut, prune
from tasks.score import score_blocks
from tasks.store.artifacts import ArtifactStore
from tests.conftest import pocket_pairs, write_jsonl
from tests.engines.test_child import children_running
from tests.store.conftest import contents, objects
from tests.tiny_data import write_data_root, write_preset

SAMPLES = 100
COUNT = 2  # blocks to remove

LEAKED = "Tell me: what did traveller 2 see near the garden? I must know."  # a question of tests/tiny_data.py


@flow(persist_result=False)
def scoring(preset: Preset) -> Ref:
    plan = build_plan(preset)
    model = resolve_model.submit(plan.model, preset.model, preset.runtime)
    once = score_blocks.with_options(retries=0)
    ref: Ref = once.submit(plan.distances, model, None, None, preset.score, preset.runtime).result()
    return ref


@flow(persist_result=False)
def pruning(preset: Preset) -> None:
    plan = build_plan(preset)
    model = resolve_model.submit(plan.model, preset.model, preset.runtime)
    distances = score_blocks.submit(plan.distances, model, None, None, preset.score, preset.runtime)
    prune.submit(plan.pruned, model, distances, preset.prune, preset.runtime).result()


@pytest.fixture(scope="module")
def preset(stack: dict[str, str], pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preset]:
    """Scores one benchmark item among its texts; these tests have a store of their own."""
    folder = tmp_path_factory.mktemp("scoring")
    texts = [{"text": LEAKED}, *({"text": pair["answer"]} for pair in pocket_pairs())]
    calibration = {"path": str(write_jsonl(folder / "text.jsonl", texts)), "samples": SAMPLES, "length": 32}
    path = write_preset(
        folder / "p.yaml", pico, score={"calibration": calibration},
        runtime={"device": "cpu", "kv_cache_gb": 1, "batch": 2},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDD_STORE", f"s3://sdd/{uuid4().hex}")
        patch.setenv("SDD_MIRROR", str(folder / "mirror"))
        patch.setenv("SDD_DATA_ROOT", str(write_data_root(folder / "data")))
        yield load_preset(str(path))


def test_a_killed_pass_goes_on_and_ends_with_the_same_bytes(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.score, "COMMIT_SECONDS", -1)  # after every batch
    seen: list[str] = []
    kill_at = SAMPLES + 1

    def watched(name: str, request: dict[str, Any], out: Path, runtime: Runtime, progress: Progress) -> None:
        def watch(done: float, text: str) -> None:
            progress(done, text)
            seen.append(text)
            if int(text.split()[0]) >= kill_at:
                for pid in children_running("score"):
                    os.kill(pid, signal.SIGKILL)

        run_child(name, request, out, runtime, watch)

    monkeypatch.setattr(tasks.score, "run_child", watched)
    ref = scoring(preset)
    undisturbed = contents(folder_of(ref))
    assert (ref["facts"]["samples"], ref["facts"]["overlapping"]) == (SAMPLES, 1)
    assert seen[0] == f"2 of {SAMPLES} samples" and seen[-1] == f"{SAMPLES} of {SAMPLES} samples"

    monkeypatch.setenv("SDD_STORE", f"s3://sdd/{uuid4().hex}")
    store = ArtifactStore.from_environment()
    kill_at = 20
    with pytest.raises(EngineError, match="ended by SIGKILL"):
        scoring(preset)
    assert objects(store, "parts/score")
    shutil.rmtree(store.mirror)  # as another machine would go on
    kill_at = SAMPLES + 1
    seen.clear()
    assert contents(folder_of(scoring(preset))) == undisturbed
    assert int(seen[0].split()[0]) > 20, "what was committed is not repeated"
    assert not objects(store, "parts/score")


def test_no_more_texts_are_checked_than_the_samples_need() -> None:
    """Of a hub's hundreds of thousands."""
    looked: list[str] = []

    class Watched(BenchmarkText):
        def overlaps(self, text: str) -> bool:
            looked.append(text)
            return super().overlaps(text)

    known = Watched([LEAKED], 13)
    long = [" ".join(f"word{number}-{place}" for place in range(64)) for number in range(50)]
    documents = ["a short one", LEAKED, *long]
    assert tasks.score._first_clean(documents, known, 3) == (["a short one", *long[:3]], 1)
    assert looked == documents[:5]
    assert tasks.score._first_clean(documents[:2], known, 3) == (["a short one"], 1), "the child says how many it found"


def test_a_cut_that_fails_its_gate_is_not_published(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring blocks instead of the chosen ones; the refusal says what differs by how much, and is not retried."""
    cuts: list[Span] = []

    def shifted(original: Path, out: Path, span: Span) -> dict[str, Any]:
        cuts.append(span)
        return cut(original, out, Span((span.start + 1) % (span.layers - span.count + 1), span.count, span.layers))

    monkeypatch.setattr(tasks.prune, "cut", shifted)
    with pytest.raises(GateError, match=r"logits of the pruned model differ by \d\.\d+e[+-]\d+ from the original's"):
        pruning(preset)
    assert len(cuts) == 1
    store = ArtifactStore.from_environment()
    assert objects(store, "score") and not objects(store, "prune")


def test_the_candidate_with_the_lowest_perplexity_is_cut(
    preset: Preset, pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the three nearest spans the first one is not the one that transformers itself finds the best."""
    cuts: list[Span] = []
    found: dict[int, float] = {}

    def watched(_original: Path, out: Path, span: Span) -> dict[str, Any]:
        cuts.append(span)
        found.update((each["start"], each["perplexity"]) for each in json.loads((out / "candidates.json").read_text()))
        raise GateError("the choice was seen")

    monkeypatch.setattr(tasks.prune, "cut", watched)
    scores = folder_of(scoring(preset))
    nearest = json.loads((scores / "ranking.json").read_text())["starts_by_count"][COUNT - 1][:3]
    samples = [json.loads(line) for line in (scores / "tokens.jsonl").read_text().splitlines()]
    losses = {start: loss_without(pico, start, samples) for start in nearest}
    best = min(losses, key=losses.__getitem__)
    assert best != nearest[0]
    with pytest.raises(GateError, match="the choice was seen"):
        pruning(preset.model_copy(update={"prune": Prune(blocks=COUNT, candidates=3)}))
    assert cuts == [Span(best, COUNT, 6)]
    assert {start: math.log(perplexity) for start, perplexity in found.items()} == pytest.approx(losses, rel=1e-4)


def loss_without(checkpoint: Path, start: int, samples: list[list[int]]) -> float:
    """Mean negative log-likelihood of a token in a model whose blocks were really taken out."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    del model.model.layers[start : start + COUNT]
    for place, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(model.model.layers)
    total = count = 0.0
    for sample in samples:
        ids = torch.tensor([sample])
        with torch.inference_mode():
            total += float(model(ids, labels=ids).loss) * (len(sample) - 1)
        count += len(sample) - 1
    return total / count
