"""Scoring beyond the last token's angle, and what it says about its own samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.domain.recipe import Runtime
from tasks.engines.children.candidates import candidates
from tasks.engines.children.score import score
from tests.conftest import pocket_pairs
from tests.engines.test_child import quiet, score_request, states_by_hand

RUNTIME = Runtime(device="cpu", batch=4)


def scored(pico: Path, folder: Path, documents: list[Any], **fields: Any) -> dict[str, Any]:
    """Every JSON file that scoring wrote."""
    request = score_request(pico, folder, documents, **fields) | {"runtime": RUNTIME.model_dump()}
    score(request, folder, quiet)
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("distances", "ranking")}
    return found | {"tokens": [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]}


@torch.inference_mode()
@pytest.mark.parametrize("metric", ["angular", "block_influence"])
def test_the_mean_over_tokens_takes_every_real_token_and_no_padding(pico: Path, tmp_path: Path, metric: str) -> None:
    words = " ".join(pair["answer"] for pair in pocket_pairs()[:2]).split()
    documents = [" ".join(words[length : 2 * length]) for length in (5, 9, 14, 18)]
    found = scored(pico, tmp_path, documents, token="mean", metric=metric)
    assert len({len(sample) for sample in found["tokens"]}) > 2, "lengths must differ, or padding is not tried"
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32, attn_implementation="eager").eval()
    each = []
    for sample in found["tokens"]:
        places = []
        for place in range(1, len(sample) + 1):  # a causal model's state at a place is that of the text up to there
            states = [state.double() for state in states_by_hand(model, sample[:place])]
            cosine = float(states[1] @ states[4]) / float(states[1].norm() * states[4].norm())
            places.append(np.arccos(min(1.0, cosine)) / np.pi if metric == "angular" else 1 - cosine)
        each.append(np.mean(places))
    assert found["distances"]["mean"][3 - 1][1] == pytest.approx(np.mean(each), abs=1e-5)


@torch.inference_mode()
def test_angles_are_exact_though_the_model_runs_in_bfloat16(pico: Path, tmp_path: Path) -> None:
    """Near blocks differ by less than bfloat16 resolves in a cosine: 1 - cos of the pico's neighbours is about 1e-3."""
    found = scored(pico, tmp_path, [pair["answer"] for pair in pocket_pairs()[:4]], dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16).eval()
    model.model.norm = torch.nn.Identity()
    each = []
    for sample in found["tokens"]:
        states = model(torch.tensor([sample]), output_hidden_states=True).hidden_states
        assert states[2].dtype == torch.bfloat16
        one, other = states[2][0, -1].double(), states[3][0, -1].double()
        each.append(float(torch.arccos(one @ other / (one.norm() * other.norm()))) / torch.pi)
    assert found["distances"]["mean"][0][2] == pytest.approx(np.mean(each), rel=0.02)


def test_samples_that_end_alike_are_warned_about(pico: Path, tmp_path: Path) -> None:
    texts = [pair["answer"] for pair in pocket_pairs()[:20]]
    (tmp_path / "plain").mkdir()
    (tmp_path / "chat").mkdir()
    plain = scored(pico, tmp_path / "plain", texts, length=20)
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in texts]
    chat = scored(pico, tmp_path / "chat", prompts, length=500)
    assert plain["ranking"]["warning"] is None
    assert "20 of 20 calibration samples end in the token" in chat["ranking"]["warning"]
    assert "score.token" in chat["ranking"]["warning"]


def test_the_share_of_first_places_is_one_a_count(pico: Path, tmp_path: Path) -> None:
    ranked = scored(pico, tmp_path, [pair["answer"] for pair in pocket_pairs()[:16]])["ranking"]
    for count, shares in enumerate(ranked["first_share"], 1):
        known = [share for share in shares if share is not None]
        assert len(known) == 6 - count + 1 and sum(known) == pytest.approx(1)
        assert max(known) > 1 / len(known) or len(known) == 1


@torch.inference_mode()
def test_candidates_are_measured_as_the_cut_model_reads(pico: Path, tmp_path: Path) -> None:
    """Perplexity with bypassed blocks equals that of a model whose blocks are taken out by hand."""
    samples = scored(pico, tmp_path, [pair["answer"] for pair in pocket_pairs()[:6]])["tokens"]
    request = {"checkpoint": str(pico), "tokens": str(tmp_path / "tokens.jsonl"), "dtype": "float32",
               "starts": [3, 0], "count": 2, "runtime": RUNTIME.model_dump()}  # fmt: skip
    candidates(request, tmp_path, quiet)
    found = json.loads((tmp_path / "candidates.json").read_text())
    assert [entry["start"] for entry in found] == [3, 0]
    for entry in found:
        model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
        del model.model.layers[entry["start"] : entry["start"] + 2]
        nll, count = 0.0, 0
        for sample in samples:
            logits = model(input_ids=torch.tensor([sample]), use_cache=False).logits[0].log_softmax(-1)
            nll -= sum(float(logits[place, token]) for place, token in enumerate(sample[1:]))
            count += len(sample) - 1
        assert entry["perplexity"] == pytest.approx(np.exp(nll / count), rel=1e-4)
    assert found[0]["perplexity"] != found[1]["perplexity"]
